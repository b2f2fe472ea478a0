"""A model of random weights with random adapters and random KV in its pool, and steps to run on it.

Adapters and KV are drawn on the device, in place. The oracle has the same weights, drawn again, and the torch kernels.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorasrv.config import EngineConfig, ModelConfig, PoolConfig
from lorasrv.engine.batch import ChunkInput, Draw, SampleInput
from lorasrv.engine.runner import ModelRunner, build_runner
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import module_geometry
from lorasrv.model.decoder import Decoder
from lorasrv.model.families import Architecture
from lorasrv.model.loader import dummy_weights
from lorasrv.types import PositionLogprobs
from lorasrv_bench.gpu_kernels import make_ready
from lorasrv_bench.gpu_models import GROUPS, ModelShape, llama_config
from lorasrv_bench.gpu_pool import BLOCK_TOKENS, DTYPE, WEIGHT_STD, adapter_form, fill_random, lay, page_layout
from lorasrv_bench.gpu_section import NotRun, Section, WrongOutput, check
from lorasrv_bench.gpu_sizes import Size
from lorasrv_kernels import reference

RANK = 16
# Differences of log-probabilities over the deviation of the oracle's. After 32 layers of random weights the order of
# bf16 sums alone gives 0.02; an adapter left out gives 0.16 to 0.40 in two narrow layers (12 seeds), more in 32.
LIMIT = 8e-2
_TOP = 16
_ORACLE_ROWS = 1024
# Room for activations, workspaces of libraries and graphs.
_RESERVE_BYTES = 10 << 30


@dataclass(frozen=True, kw_only=True)
class Rig:
    runner: ModelRunner
    storage: PageStorage
    architecture: Architecture
    size: Size
    forms: dict[int, PackedAdapter]  # by rank
    adapters: dict[int, tuple[AdapterInput, ...]]  # by rank
    free_pages: tuple[int, ...]
    oracle: Decoder

    @property
    def device(self) -> torch.device:
        return self.storage.bytes.device

    def tables(self, num_sequences: int, num_tokens: int) -> list[tuple[int, ...]]:
        """Pages of their own for so many sequences. Raises NotRun where there are too few."""
        blocks = -(-num_tokens // BLOCK_TOKENS)
        if num_sequences * blocks > len(self.free_pages):
            raise NotRun(f"{num_sequences * blocks} KV pages are more than the {len(self.free_pages)} that there are")
        return [self.free_pages[first : first + blocks] for first in range(0, num_sequences * blocks, blocks)]


def build(section: Section, *, deterministic: bool = False) -> Rig:
    """Weights, pool, adapters, graphs. The pool is as large as the cases ask for, or as the device has room for."""
    size, device = section.size, section.device
    layout = page_layout(size.model)
    every = tuple(module for group in GROUPS.values() for module in group)
    layers = size.model.num_layers
    forms = {rank: adapter_form(size.model, layout, rank, every, layers, scale=4.0) for rank in _ranks(size)}
    most_adapters = max(1, *(n for n, _ in _every_decode(size)))
    counts = {rank: most_adapters if rank == RANK else 1 for rank in forms}
    adapter_pages = sum(forms[rank].num_pages * counts[rank] for rank in forms)
    # Beside the KV of the largest batch there is room to copy an adapter in.
    kv_pages = max(
        size.prefill_tokens // BLOCK_TOKENS + 1, *(batch * _blocks(size) for _, batch in _every_decode(size))
    )
    most = adapter_pages + kv_pages + 2 * forms[RANK].num_pages
    num_pages = min(most, _room_bytes(size.model, device) // layout.page_bytes)
    if num_pages <= adapter_pages:
        raise NotRun(f"{num_pages} pages have no room for {adapter_pages} pages of adapters and KV beside them")
    with tempfile.TemporaryDirectory() as folder:
        config = llama_config(size.model, max(size.prefill_tokens, size.context + size.num_steps) + BLOCK_TOKENS)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = ModelConfig(
            path=folder,
            dtype="bfloat16",
            device=str(device),
            dummy_weights=True,
            seed=section.seed,
            deterministic=deterministic,
        )
        pool = PoolConfig(pool_bytes=num_pages * layout.page_bytes, block_tokens=BLOCK_TOKENS)
        runner, storage, architecture, _ = build_runner(EngineConfig(model=model, pool=pool))
    generator = torch.Generator().manual_seed(section.seed)
    fill_random(storage.pages[:adapter_pages], WEIGHT_STD, section.seed)
    fill_random(storage.pages[adapter_pages:], 1.0, section.seed + 1)
    taken = iter(torch.randperm(adapter_pages, generator=generator).tolist())
    adapters: dict[int, tuple[AdapterInput, ...]] = {}
    for rank, form in forms.items():
        laid = [
            lay(storage.bytes, layout.page_bytes, form, [next(taken) for _ in range(form.num_pages)])
            for _ in range(counts[rank])
        ]
        adapters[rank] = tuple(AdapterInput(directory=a.directory, max_rank=rank, scale=1.0) for a in laid)
    max_rows = max(batch for _, batch in _every_decode(size))
    make_ready(runner, max_rows, _blocks(size), max(forms), deterministic=deterministic)
    weights = dummy_weights(architecture, DTYPE, device, section.seed)
    return Rig(
        runner=runner,
        storage=storage,
        architecture=architecture,
        size=size,
        forms=forms,
        adapters=adapters,
        free_pages=tuple((adapter_pages + torch.randperm(num_pages - adapter_pages, generator=generator)).tolist()),
        oracle=Decoder(architecture, weights, module_geometry(layout, architecture.module_shapes()), reference),
    )


def _every_decode(size: Size) -> tuple[tuple[int, int], ...]:
    return size.decodes + size.more_decodes


def _ranks(size: Size) -> tuple[int, ...]:
    return tuple(dict.fromkeys((RANK, *size.prefill_ranks)))


def _blocks(size: Size) -> int:
    """Of a decoding sequence, with the tokens that it gets while it is timed."""
    return -(-(size.context + size.num_steps) // BLOCK_TOKENS) + 1


def _room_bytes(model: ModelShape, device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    weights = 2 * DTYPE.itemsize * (model.linear_params + 2 * model.head_params)
    return torch.cuda.mem_get_info(device)[0] - weights - _RESERVE_BYTES


def decodes(rig: Rig, num_adapters: int, batch: int) -> list[ChunkInput]:
    """One token of each sequence, at the size's context; sequences share the adapters out evenly, or have none."""
    size = rig.size
    tables = rig.tables(batch, size.context + size.num_steps)
    chunks: list[ChunkInput] = []
    for index, table in enumerate(tables):
        adapter = rig.adapters[RANK][index * num_adapters // batch] if num_adapters else None
        chunks.append(
            ChunkInput(
                token_ids=((17 * index + 3) % size.model.vocab_size,),
                start=size.context - 1,
                block_table=table,
                adapter=adapter,
            )
        )
    return chunks


def draws(chunks: Sequence[ChunkInput], *, temperature: float, logprobs: int | None = None) -> tuple[Draw, ...]:
    return tuple(
        Draw(
            chunk=number,
            how=SampleInput(
                temperature=temperature,
                top_p=1.0,
                top_k=None,
                seed=number,
                position=chunk.start + chunk.num_tokens,
                logprobs=logprobs,
            ),
        )
        for number, chunk in enumerate(chunks)
    )


def check_step(rig: Rig, chunks: Sequence[ChunkInput], numbers: Sequence[int]) -> float:
    """The error of a step's log-probabilities behind these chunks. Raises WrongOutput where it is too large, and where
    a greedy token is not among the likeliest."""
    step = rig.runner.forward(tuple(chunks))
    step.draw(draws(chunks, temperature=0.0, logprobs=_TOP))
    output = step.output()
    worst = 0.0
    for number in numbers:
        token, found = output.tokens[number], output.logprobs.get(number)
        if token is None or found is None:
            raise WrongOutput(f"the logits behind chunk {number} are not finite")
        # In bf16 the likeliest are often equal.
        if token != found.token_id or found.logprob < found.top[0][1]:
            raise WrongOutput(f"the greedy token {token} behind chunk {number} is not as likely as {found.top[0][0]}")
        worst = max(worst, _logprob_error(found, _oracle_logprobs(rig, chunks[number])))
    return check(worst, LIMIT, "the log-probability")


def _logprob_error(
    found: PositionLogprobs,
    expected: Tensor,  # float32 [vocab_size]
) -> float:
    ids, logprobs = zip(*found.top, strict=True)
    difference = torch.tensor(logprobs, dtype=torch.float64) - expected.cpu().double()[list(ids)]
    return (difference.square().mean().sqrt() / expected.double().std().cpu()).item()


@torch.inference_mode()
def _oracle_logprobs(rig: Rig, chunk: ChunkInput) -> Tensor:  # float32 [vocab_size]
    """By the torch kernels, long chunks in parts: their attention holds all scores at once."""
    hidden = None
    for first in range(0, chunk.num_tokens, _ORACLE_ROWS):
        end = min(first + _ORACLE_ROWS, chunk.num_tokens)
        part = ChunkInput(
            token_ids=chunk.token_ids[first:end],
            start=chunk.start + first,
            block_table=chunk.block_table[: -(-(chunk.start + end) // BLOCK_TOKENS)],
            adapter=chunk.adapter,
        )
        hidden = rig.oracle.forward(rig.runner.build_batch([part]), rig.storage.bytes, rig.storage.kv)
    assert hidden is not None, "a chunk without tokens"
    return rig.oracle.logits(hidden[-1:])[0].log_softmax(-1)
