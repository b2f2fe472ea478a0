"""Turns a step's chunks into tensors, runs the one forward pass, and draws the tokens."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lorasrv.config import EngineConfig
from lorasrv.engine.batch import AdapterInput, ChunkInput, StepOutput
from lorasrv.engine.fitting import page_layout
from lorasrv.errors import ConfigurationError
from lorasrv.memory.packing import module_geometry
from lorasrv.memory.storage import PageStorage
from lorasrv.model.decoder import Decoder, ForwardBatch
from lorasrv.model.families import Architecture, read_architecture
from lorasrv.model.loader import dummy_weights, load_weights
from lorasrv.model.sampler import draw, position_logprobs
from lorasrv.types import EngineInfo, PositionLogprobs
from lorasrv_kernels import fixed, reference
from lorasrv_kernels.tiles import Segments

# At a vocabulary of 128k tokens, 32 MiB of logits.
_SCORED_ROWS = 64


class ModelRunner:
    """Implements `engine.batch.Runner` on a decoder and a pool. Used by the engine's thread alone."""

    def __init__(self, decoder: Decoder, storage: PageStorage) -> None:
        self._decoder = decoder
        self._storage = storage
        self.num_forwards = 0

    def run(self, chunks: tuple[ChunkInput, ...]) -> StepOutput:
        """See `engine.batch.StepOutput`. One forward, whatever the chunks ask for."""
        if not chunks:
            return StepOutput(tokens=())
        order = sorted(range(len(chunks)), key=lambda index: _adapter_key(chunks[index].adapter))
        ordered = [chunks[index] for index in order]
        batch = self.build_batch(ordered)
        hidden = self._decoder.forward(batch, self._storage.bytes, self._storage.kv)
        self.num_forwards += 1
        sampling = [(index, chunks[index].sample) for index in order]
        rows = [(index, sample) for index, sample in sampling if sample is not None]
        tokens, logprobs = draw(self._decoder.logits(hidden[batch.sample_rows]), [sample for _, sample in rows])
        # From rows in segment order to places in the chunks' order.
        places = sorted(range(len(rows)), key=lambda row: rows[row][0])
        return StepOutput(
            tokens=tuple(tokens[row] for row in places),
            logprobs={place: logprobs[row] for place, row in enumerate(places) if row in logprobs},
            prompt_logprobs=self._prompt_logprobs(order, ordered, hidden),
        )

    def _prompt_logprobs(
        self,
        order: Sequence[int],
        ordered: Sequence[ChunkInput],
        hidden: Tensor,  # [num_tokens, hidden]
    ) -> dict[int, tuple[PositionLogprobs, ...]]:
        """By place of the chunk, for those that ask. Logits exist for few rows at a time."""
        found: dict[int, tuple[PositionLogprobs, ...]] = {}
        first_row = 0
        for index, chunk in zip(order, ordered, strict=True):
            score = chunk.score
            if score is not None:
                rows = hidden[first_row + score.start - 1 - chunk.start :][: len(score.token_ids)]
                found[index] = tuple(
                    logprobs
                    for start in range(0, len(rows), _SCORED_ROWS)
                    for logprobs in position_logprobs(
                        self._decoder.logits(rows[start : start + _SCORED_ROWS]),
                        score.token_ids[start : start + _SCORED_ROWS],
                        score.num_top,
                    )
                )
            first_row += len(chunk.token_ids)
        return found

    def build_batch(self, chunks: Sequence[ChunkInput]) -> ForwardBatch:
        """The tensors of a step whose chunks stand in segment order."""
        block_tokens = self._storage.layout.block_tokens
        ends = list(accumulate(len(chunk.token_ids) for chunk in chunks))
        positions = [p for c in chunks for p in range(c.start, c.start + len(c.token_ids))]
        slots = [
            chunk.block_table[position // block_tokens] * block_tokens + position % block_tokens
            for chunk in chunks
            for position in range(chunk.start, chunk.start + len(chunk.token_ids))
        ]
        max_blocks = max(len(chunk.block_table) for chunk in chunks)
        tables = [chunk.block_table + (0,) * (max_blocks - len(chunk.block_table)) for chunk in chunks]
        return ForwardBatch(
            token_ids=self._tensor([token for chunk in chunks for token in chunk.token_ids], torch.int64),
            positions=self._tensor(positions, torch.int64),
            slots=self._tensor(slots, torch.int64),
            block_tables=self._tensor(tables, torch.int32),
            query_starts=self._tensor([0, *ends], torch.int32),
            context_lengths=self._tensor([chunk.start + len(chunk.token_ids) for chunk in chunks], torch.int32),
            segments=self._segments(chunks, ends),
            sample_rows=self._tensor(
                [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.sample is not None], torch.int64
            ),
        )

    def _segments(self, chunks: Sequence[ChunkInput], ends: Sequence[int]) -> Segments | None:
        """One segment per (adapter, scale): chunks that share it are adjacent."""
        starts: list[int] = []
        segment_ends: list[int] = []
        adapters: list[AdapterInput] = []
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.adapter is None:
                continue
            if adapters and adapters[-1] == chunk.adapter:
                segment_ends[-1] = end
            else:
                adapters.append(chunk.adapter)
                starts.append(end - len(chunk.token_ids))
                segment_ends.append(end)
        if not adapters:
            return None
        return Segments(
            starts=self._tensor(starts, torch.int32),
            ends=self._tensor(segment_ends, torch.int32),
            directories=self._tensor([adapter.directory for adapter in adapters], torch.int32),
            scales=self._tensor([adapter.scale for adapter in adapters], torch.float32),
            num_modules=len(self._decoder.architecture.module_shapes()),
            max_rank=max(adapter.max_rank for adapter in adapters),
        )

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._storage.bytes.device)


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
    kernels = fixed if config.model.deterministic else reference
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
    return ModelRunner(decoder, storage), storage, architecture, info


def _adapter_key(adapter: AdapterInput | None) -> tuple[bool, int, float]:
    """Sorts the chunks of an adapter and scale together, and base rows last."""
    return (True, 0, 0.0) if adapter is None else (False, adapter.directory, adapter.scale)
