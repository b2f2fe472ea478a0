"""Paged attention of one layer against the bytes of its context, and torch's own attention on the same keys and values.

Torch's is given keys and values in one piece, which an engine with pages would first have to gather: a bar for the
arithmetic, not a way to serve.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_bench.gpu_floors import attention_floor
from lorasrv_bench.gpu_kernels import attention
from lorasrv_bench.gpu_models import ModelShape
from lorasrv_bench.gpu_pool import BLOCK_TOKENS, DTYPE, fill_random, page_layout
from lorasrv_bench.gpu_records import timed
from lorasrv_bench.gpu_section import NotRun, Section, check, distance
from lorasrv_bench.gpu_sgmv_cases import some
from lorasrv_bench.gpu_timing import Round, Timing, free_memory
from lorasrv_kernels import reference

LIMIT = 2e-2
_CHECKED_SEQUENCES = 2
# The oracle holds every score of a sequence, so long chunks are compared at their last rows.
_CHECKED_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Load:
    """A step's attention on several layers of a pool of its own: each layer is the same work on other data."""

    model: ModelShape
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    kv: Tensor  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    tables: Tensor  # int32 [num_sequences, max_blocks]
    starts: Tensor  # int32 [num_sequences + 1]
    lengths: Tensor  # int32 [num_sequences]
    query: Tensor  # [num_tokens, num_heads, head_dim]
    out: Tensor  # [num_tokens, num_heads, head_dim]


def run(section: Section) -> None:
    cases = {
        str(index): {"sequences": sequences, "rows": rows, "context": context}
        for index, (sequences, rows, context) in enumerate(section.size.attention_loads)
    }
    section.each(cases, lambda key: _run_case(section, cases[key], section.size.attention_loads[int(key)]), 1.5)


def _run_case(section: Section, labels: dict[str, object], numbers: tuple[int, int, int]) -> None:
    load = lay_load(section, *numbers)
    model, device = load.model, section.device
    paged = attention(load.rows, load.contexts, model.num_heads, load.kv)
    layers = load.kv.shape[1]

    def call(layer: int) -> Callable[[], None]:
        return lambda: paged(load.query, load.kv, layer, load.tables, load.starts, load.lengths, None, load.out)

    calls = [call(layer) for layer in range(layers)]
    error = max(_error(load, layer, calls[layer]) for layer in {0, layers - 1})
    ready = Round(calls, device)
    ours, again = ready.time(section.size.case_s), ready.time(section.size.case_s)
    floor = attention_floor(model, load.rows, load.contexts, DTYPE.itemsize)
    floor_s = floor.seconds(section.ceilings)
    section.add(timed(section.name, {"peer": "ours"} | labels, ours, again=again, floor_s=floor_s, error=error))
    del ready
    with section.case({"peer": "torch sdpa"} | labels):
        _run_sdpa(section, {"peer": "torch sdpa"} | labels, load, ours, floor_s)
    free_memory(device)


def lay_load(section: Section, sequences: int, rows: int, context: int) -> Load:
    """As many layers as make three times the cache. Raises NotRun where they do not fit."""
    model, device = section.size.model, section.device
    blocks = sequences * -(-context // BLOCK_TOKENS)
    layer_bytes = blocks * page_layout(model, 1).page_bytes
    layers = min(4 * model.num_layers, max(2, -(-3 * section.size.cache_bytes // layer_bytes)))
    if blocks * page_layout(model, layers).page_bytes > section.size.pool_bytes:
        raise NotRun(f"{layers} layers of {layer_bytes} bytes do not fit {section.size.pool_bytes} bytes")
    kv = torch.empty(blocks, layers, 2, BLOCK_TOKENS, model.num_kv_heads, model.head_dim, dtype=DTYPE, device=device)
    fill_random(kv.view(torch.uint8), 1.0, section.seed)
    pages = torch.randperm(blocks, generator=torch.Generator().manual_seed(section.seed))
    query = torch.randn(sequences * rows, model.num_heads, model.head_dim, dtype=DTYPE, device=device)
    return Load(
        model=model,
        rows=(rows,) * sequences,
        contexts=(context,) * sequences,
        kv=kv,
        tables=pages.view(sequences, -1).to(device, torch.int32),
        starts=torch.arange(0, (sequences + 1) * rows, rows).to(device, torch.int32),
        lengths=torch.full((sequences,), context, dtype=torch.int32, device=device),
        query=query,
        out=torch.empty_like(query),
    )


def _error(load: Load, layer: int, call: Callable[[], None]) -> float:
    """Against the oracle on the last rows of some sequences; all other rows must be finite."""
    load.out.fill_(float("nan"))
    call()
    worst = 0.0 if bool(load.out.isfinite().all()) else float("inf")
    for index in some(range(len(load.rows)), _CHECKED_SEQUENCES):
        last = min(load.rows[index], _CHECKED_ROWS)
        end = sum(load.rows[: index + 1])
        query = load.query[end - last : end]
        expected = torch.empty_like(query)
        reference.paged_attention(
            query,
            load.kv,
            layer,
            load.tables[index : index + 1],
            torch.tensor([0, last], dtype=torch.int32, device=query.device),
            load.lengths[index : index + 1],
            None,
            expected,
        )
        worst = max(worst, distance(load.out[end - last : end], expected))
    return check(worst, LIMIT, "attention")


def _run_sdpa(section: Section, labels: dict[str, object], load: Load, ours: Timing, floor_s: float) -> None:
    sequences, rows, context = len(load.rows), load.rows[0], load.contexts[0]
    if 1 < rows < context:
        raise NotRun("its causal mask is that of a whole prompt, not of a chunk's last rows")
    query = load.query.view(sequences, rows, *load.query.shape[1:]).transpose(1, 2)

    def dense(layer: int, which: int) -> Tensor:  # [sequences, kv_heads, context, head_dim]
        found = load.kv[load.tables.long(), layer, which].flatten(1, 2)[:, :context]
        return found.transpose(1, 2).contiguous()

    layers = load.kv.shape[1]
    pairs = [(dense(layer, 0), dense(layer, 1)) for layer in range(layers)]
    results: list[Tensor] = [query] * layers

    def call(layer: int) -> Callable[[], None]:
        def attend() -> None:
            results[layer] = torch.nn.functional.scaled_dot_product_attention(
                query, *pairs[layer], is_causal=rows > 1, enable_gqa=True
            )

        return attend

    error = max(_error(load, layer, _into(load, call(layer), results, layer)) for layer in {0, layers - 1})
    timing = Round([call(layer) for layer in range(layers)], section.device).time(section.size.case_s)
    values = {"over_ours": timing.median_s / ours.median_s}
    section.add(timed(section.name, labels, timing, floor_s=floor_s, error=error, values=values))


def _into(load: Load, call: Callable[[], None], results: list[Tensor], layer: int) -> Callable[[], None]:
    def run() -> None:
        call()
        load.out.copy_(results[layer].transpose(1, 2).flatten(0, 1))

    return run
