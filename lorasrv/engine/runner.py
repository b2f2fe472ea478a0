"""Turns a step's chunks into tensors, runs the one forward pass, and draws the tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lorasrv.config import EngineConfig
from lorasrv.engine.batch import ChunkInput, Draw, PageCopy, SampleInput, ScoreInput, StepOutput
from lorasrv.engine.fitting import page_layout
from lorasrv.engine.graphs import DecodeGraph, DecodeGraphs, Forwarded, StaticStep, graph_sizes
from lorasrv.engine.step_arrays import Room, StepPlan, drawn_rows, step_arrays
from lorasrv.errors import ConfigurationError
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.staging import Array, Staging, num_bytes
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import module_geometry
from lorasrv.model.decoder import Decoder, ForwardBatch
from lorasrv.model.families import Architecture, read_architecture
from lorasrv.model.loader import dummy_weights, load_weights
from lorasrv.model.sampler import Drawn, Fence, Scores, draw, position_logprobs
from lorasrv.types import EngineInfo
from lorasrv_kernels import fixed
from lorasrv_kernels.attention_work import AttentionWork, Tiling
from lorasrv_kernels.dispatch import attention_tiling, forward_kernels
from lorasrv_kernels.tiles import Segments
from lorasrv_kernels.work import DECODE_HEIGHT, Work

# At a vocabulary of 128k tokens, 32 MiB of logits.
_SCORED_ROWS = 64


class ModelRunner:
    """Implements `engine.batch.Runner` on a decoder and a pool. Used by the engine's thread alone."""

    def __init__(self, decoder: Decoder, storage: PageStorage, tiling: Tiling | None = None) -> None:
        """`tiling` is how the decoder's kernels want attention cut, if they ask."""
        self._decoder = decoder
        self._storage = storage
        self._tiling = tiling
        self._staging = Staging(storage.bytes.device)
        self._graphs: DecodeGraphs | None = None
        self._drawn: Drawn | None = None
        self.num_forwards = 0

    @property
    def runs_ahead(self) -> bool:
        return self._storage.bytes.is_cuda

    def forward(self, chunks: tuple[ChunkInput, ...], copies: tuple[PageCopy, ...] = ()) -> "ModelStep":
        """One forward, whatever the chunks ask for."""
        assert chunks, "a step without chunks"
        for copy in copies:
            self._storage.copy_page(copy.source, copy.target)
        order = tuple(sorted(range(len(chunks)), key=lambda index: _adapter_key(chunks[index].adapter)))
        ordered = [chunks[index] for index in order]
        graph = self._graph_for(ordered)
        if graph is None:
            forwarded = self._forward(self.build_batch(ordered))
        else:
            self.load(graph.step, StepPlan.of(ordered, self._tiling, DECODE_HEIGHT))
            forwarded = graph.replay()
        self.num_forwards += 1
        return ModelStep(self, chunks, order, forwarded)

    def capture_graphs(self, max_rows: int, max_blocks: int, max_rank: int) -> None:
        """On CUDA, before the first step: from now on decode steps of up to so many rows are replayed, for adapters of
        up to `max_rank` and sequences of up to `max_blocks` blocks."""
        device, block_tokens = self._storage.bytes.device, self._storage.layout.block_tokens
        # Only a corner of it is ever written, and one graph runs at a time.
        block_tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)

        def static_step(num_rows: int, lora: bool) -> StaticStep:
            room = Room.of_decodes(num_rows, max_blocks, max_rank if lora else 0, block_tokens, self._tiling)
            return self.static_step(room, block_tables[:num_rows])

        def forward(batch: ForwardBatch) -> Forwarded:
            hidden = self._forward(batch).hidden
            return Forwarded(hidden=hidden, logits=self._decoder.logits(hidden))

        self._graphs = DecodeGraphs(graph_sizes(max_rows), static_step, forward)

    def static_step(
        self,
        room: Room,
        block_tables: Tensor,  # int32 [room.num_sequences, room.max_blocks]
    ) -> StaticStep:
        """A step without rows of its own, in arrays of fixed places."""
        plan = StepPlan.of((), self._tiling, DECODE_HEIGHT)
        arrays = self._arrays(plan, replace(room, max_blocks=0))
        del arrays["block_tables"]
        buffer = torch.zeros(num_bytes(arrays), dtype=torch.uint8, device=self._storage.bytes.device)
        tensors = self._staging.upload(arrays, buffer)
        batch = self._batch(tensors | {"block_tables": block_tables}, plan, room)
        return StaticStep(room=room, buffer=buffer, batch=batch)

    def load(self, step: StaticStep, plan: StepPlan) -> None:
        """Put a step into these places."""
        longest = max(len(chunk.block_table) for chunk in plan.chunks)
        arrays = self._arrays(plan, replace(step.room, max_blocks=longest))
        tables = self._staging.upload({"block_tables": arrays.pop("block_tables")})["block_tables"]
        step.batch.block_tables[:, :longest].copy_(tables)
        tensors = self._staging.upload(arrays, step.buffer)
        self._take_drawn(tensors["token_ids"], plan.chunks)

    def _graph_for(self, chunks: Sequence[ChunkInput]) -> DecodeGraph | None:
        if self._graphs is None or any(chunk.num_tokens > 1 for chunk in chunks):
            return None
        return self._graphs.find(len(chunks), any(chunk.adapter is not None for chunk in chunks))

    def _forward(self, batch: ForwardBatch) -> Forwarded:
        return Forwarded(hidden=self._decoder.forward(batch, self._storage.bytes, self._storage.kv), logits=None)

    def draw(self, forwarded: Forwarded, rows: Sequence[int], how: Sequence[SampleInput]) -> Drawn:
        """A token behind each of these rows. The next step may take its input from these draws."""
        if forwarded.logits is None:
            logits = self._decoder.logits(self._rows(forwarded.hidden, rows))
        else:
            logits = self._rows(forwarded.logits, rows)
        self._drawn = draw(logits, how)
        return self._drawn

    def _rows(
        self,
        values: Tensor,  # [num_tokens, ...]
        rows: Sequence[int],
    ) -> Tensor:  # [len(rows), ...]
        if list(rows) == list(range(len(rows))):
            return values[: len(rows)]
        return values.index_select(0, self._tensor(rows))

    def score(
        self,
        hidden: Tensor,  # [num_scored, hidden], of the rows before the tokens
        score: ScoreInput,
    ) -> tuple[Scores, ...]:
        """Logits exist for few rows at a time."""
        token_ids = self._tensor(score.token_ids)
        parts = [slice(first, first + _SCORED_ROWS) for first in range(0, len(token_ids), _SCORED_ROWS)]
        return tuple(
            position_logprobs(self._decoder.logits(hidden[part]), token_ids[part], score.num_top) for part in parts
        )

    def build_batch(self, chunks: Sequence[ChunkInput]) -> ForwardBatch:
        """The tensors of a step whose chunks stand in segment order."""
        plan = StepPlan.of(chunks, self._tiling)
        room = plan.room()
        tensors = self._staging.upload(self._arrays(plan, room))
        self._take_drawn(tensors["token_ids"], chunks)
        return self._batch(tensors, plan, room)

    def _arrays(self, plan: StepPlan, room: Room) -> dict[str, Array]:
        return step_arrays(plan, room, self._storage.layout.block_tokens, self._storage.scratch_page)

    def _take_drawn(
        self,
        token_ids: Tensor,  # int64 [num_tokens]
        chunks: Sequence[ChunkInput],
    ) -> None:
        """The tokens that the host does not know yet come from the draws of the step before, which the device has."""
        if all(chunk.drawn is None for chunk in chunks):
            return
        assert self._drawn is not None, "no step has drawn"
        tensors = self._staging.upload(drawn_rows(chunks))
        token_ids.index_copy_(0, tensors["rows"], self._drawn.tokens.index_select(0, tensors["places"]))

    def _batch(self, tensors: Mapping[str, Tensor], plan: StepPlan, room: Room) -> ForwardBatch:
        """What `step_arrays` made, uploaded."""
        segments = None
        if "starts" in tensors:
            segments = Segments(
                starts=tensors["starts"],
                ends=tensors["ends"],
                directories=tensors["directories"],
                scales=tensors["scales"],
                num_modules=len(self._decoder.architecture.module_shapes()),
                max_rank=room.max_rank,
                work=Work(
                    height=plan.work.height,
                    rank_step=plan.work.rank_step,
                    row_blocks=tensors["row_blocks"],
                    rank_blocks=tensors["rank_blocks"],
                    counts=tensors["work_counts"],
                ),
            )
        attention = None
        if self._tiling is not None:
            attention = AttentionWork(
                tiling=self._tiling,
                tiles=tensors["tiles"],
                splits=tensors["splits"],
                merges=tensors["merges"],
                counts=tensors["attention_counts"],
                num_slots=room.num_slots,
            )
        return ForwardBatch(
            token_ids=tensors["token_ids"],
            positions=tensors["positions"],
            slots=tensors["slots"],
            block_tables=tensors["block_tables"],
            query_starts=tensors["query_starts"],
            context_lengths=tensors["context_lengths"],
            segments=segments,
            attention=attention,
        )

    def _tensor(self, values: Sequence[int]) -> Tensor:  # int64
        return self._staging.upload({"values": np.array(values, dtype=np.int64)})["values"]


class ModelStep:
    """Implements `engine.batch.RunningStep`."""

    def __init__(
        self,
        runner: ModelRunner,
        chunks: tuple[ChunkInput, ...],
        order: tuple[int, ...],  # chunk numbers as their rows stand in `hidden`
        forwarded: Forwarded,
    ) -> None:
        self._runner = runner
        self._chunks = chunks
        lengths = [chunks[number].num_tokens for number in order]
        self._ends = dict(zip(order, accumulate(lengths), strict=True))
        self._forwarded = forwarded
        self._drawn: Drawn | None = None
        self._scores: dict[int, tuple[Scores, ...]] = {}
        self._submitted: Fence | None = None

    def draw(self, draws: tuple[Draw, ...]) -> None:
        if draws:
            rows = [self._ends[draw.chunk] - 1 for draw in draws]
            self._drawn = self._runner.draw(self._forwarded, rows, [draw.how for draw in draws])
        for number, chunk in enumerate(self._chunks):
            if chunk.score is not None:
                first = self._ends[number] - chunk.num_tokens + chunk.score.start - 1 - chunk.start
                rows = self._forwarded.hidden[first : first + len(chunk.score.token_ids)]
                self._scores[number] = self._runner.score(rows, chunk.score)
        self._submitted = Fence(self._forwarded.hidden.device)

    def output(self) -> StepOutput:
        assert self._submitted is not None, "output before draw"
        # A step that draws nothing has pages too, which nobody else may write before it has completed.
        self._submitted.wait()
        tokens, logprobs = ((), {}) if self._drawn is None else self._drawn.read()
        return StepOutput(
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs={
                number: tuple(logprobs for scores in chunk_scores for logprobs in scores.read())
                for number, chunk_scores in self._scores.items()
            },
        )


def build_runner(config: EngineConfig) -> tuple[ModelRunner, PageStorage, Architecture, EngineInfo]:
    """Load the model and allocate the pool. Raises UnsupportedModel or ConfigurationError."""
    architecture = read_architecture(config.model.path)
    dtype, device = getattr(torch, config.model.dtype), torch.device(config.model.device)
    if config.model.deterministic and not fixed.is_available(device, dtype):
        raise ConfigurationError(f"deterministic in {config.model.dtype} needs oneDNN, which this torch lacks here")
    layout = page_layout(architecture, config.pool.block_tokens, dtype.itemsize)
    num_pages = config.pool.pool_bytes // layout.page_bytes
    if num_pages < 2:
        raise ConfigurationError(
            f"pool_bytes {config.pool.pool_bytes} holds {num_pages} pages of {layout.page_bytes} bytes; at least 2 are "
            f"needed, {2 * layout.page_bytes} bytes"
        )
    if config.model.dummy_weights:
        weights = dummy_weights(architecture, dtype, device, config.model.seed)
    else:
        weights = load_weights(config.model.path, architecture, dtype, device)
    storage = PageStorage(layout, num_pages, dtype, device)
    kernels = forward_kernels(device, deterministic=config.model.deterministic)
    decoder = Decoder(architecture, weights, module_geometry(layout, architecture.module_shapes()), kernels)
    info = EngineInfo(
        device=config.model.device,
        dtype=config.model.dtype,
        vocab_size=architecture.vocab_size,
        context_tokens=architecture.context_tokens,
        block_tokens=config.pool.block_tokens,
        page_bytes=layout.page_bytes,
        num_pages=num_pages,
    )
    group = architecture.num_heads // architecture.num_kv_heads
    tiling = attention_tiling(kernels, device, dtype, architecture.head_dim, group)
    return ModelRunner(decoder, storage, tiling), storage, architecture, info


def _adapter_key(adapter: AdapterInput | None) -> tuple[bool, int, float]:
    """Sorts the chunks of an adapter and scale together, and base rows last."""
    return (True, 0, 0.0) if adapter is None else (False, adapter.directory, adapter.scale)
