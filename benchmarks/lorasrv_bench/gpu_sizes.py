"""How much is measured: all of it on a GPU, small shapes on a CPU, the smallest that still run every path in a test."""

from dataclasses import dataclass

import torch

from lorasrv_bench.gpu_models import LLAMA_8B, LLAMA_70B_TP8, SMALL, TINY, ModelShape


@dataclass(frozen=True, kw_only=True)
class Size:
    """`decodes` are (distinct adapters, batch), `more_decodes` those that no target asks for; `pool_bytes` bounds what
    SGMV and attention lay out at a time."""

    name: str
    model: ModelShape
    sgmv_models: tuple[ModelShape, ...]
    ranks: tuple[int, ...]  # the most telling first, as in all lists here
    loads: tuple[tuple[int, int], ...]  # (tokens, distinct adapters)
    decodes: tuple[tuple[int, int], ...]
    more_decodes: tuple[tuple[int, int], ...]
    context: int
    num_steps: int
    prefill_tokens: int
    prefill_ranks: tuple[int, ...]
    attention_loads: tuple[tuple[tuple[int, int, int], ...], ...]  # parts (sequences, rows of each, context of each)
    ceiling_bytes: int
    matmul_sizes: tuple[int, ...]
    pool_bytes: int
    cache_bytes: int  # a working set is three times as large
    case_s: float  # for the timing of one case
    checked_rows: int  # of an engine step, against the oracle


def gpu_size(device: torch.device) -> Size:
    properties = torch.cuda.get_device_properties(device)
    return Size(
        name="gpu",
        model=LLAMA_8B,
        sgmv_models=(LLAMA_8B, LLAMA_70B_TP8),
        ranks=(16, 64, 8, 32, 128),
        loads=_loads((64, 1, 256, 8192, 16, 1024), (64, 1, 16, 256, 4)),
        decodes=(
            (0, 1),
            (1, 1),
            (0, 64),
            (1, 64),
            (64, 64),
            (0, 16),
            (1, 16),
            (256, 256),
            (64, 256),
            (0, 4),
            (1, 4),
        ),
        more_decodes=((0, 256), (16, 64), (1, 256), (16, 16), (16, 256)),
        context=1024,
        num_steps=40,
        prefill_tokens=8192,
        prefill_ranks=(16, 64),
        attention_loads=(
            ((64, 1, 1024),),
            ((1, 1, 1024),),
            ((1, 8192, 8192),),
            ((16, 1, 8192),),
            ((256, 1, 1024),),
            ((63, 1, 1024), (1, 2048, 4096)),
            ((1, 1, 32768),),
            ((4, 2048, 8192),),
            ((16, 1, 1024),),
            ((64, 1, 8192),),
            ((16, 1, 32768),),
            ((256, 1, 8192),),
        ),
        ceiling_bytes=8 << 30,
        matmul_sizes=(8192, 4096, 16384),
        pool_bytes=min(24 << 30, properties.total_memory // 4),
        cache_bytes=properties.L2_cache_size,
        case_s=0.06,
        checked_rows=4,
    )


CPU_SIZE = Size(
    name="cpu",
    model=SMALL,
    sgmv_models=(SMALL,),
    ranks=(16, 64, 8),
    loads=((16, 16), (1, 1), (64, 4), (256, 1)),
    decodes=((0, 1), (1, 1), (0, 16), (1, 16), (4, 16)),
    more_decodes=((16, 16),),
    context=64,
    num_steps=8,
    prefill_tokens=256,
    prefill_ranks=(16, 64),
    attention_loads=(((16, 1, 64),), ((1, 256, 256),), ((4, 32, 128),), ((15, 1, 64), (1, 64, 128))),
    ceiling_bytes=64 << 20,
    matmul_sizes=(512, 1024),
    pool_bytes=256 << 20,
    cache_bytes=256 << 10,
    case_s=0.1,
    checked_rows=3,
)

QUICK_SIZE = Size(
    name="quick",
    model=TINY,
    sgmv_models=(TINY,),
    ranks=(8,),
    loads=((4, 2), (1, 1)),
    decodes=((0, 2), (1, 2)),
    more_decodes=((2, 2),),
    context=20,
    num_steps=3,
    prefill_tokens=32,
    prefill_ranks=(8,),
    attention_loads=(((2, 1, 20),), ((1, 24, 24),), ((2, 1, 20), (1, 8, 24))),
    ceiling_bytes=1 << 20,
    matmul_sizes=(128,),
    pool_bytes=4 << 20,
    cache_bytes=32 << 10,
    case_s=0.01,
    checked_rows=2,
)


def _loads(tokens: tuple[int, ...], adapters: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """All pairs of no more adapters than tokens, those of the first of both lists first."""
    pairs = [(a + b, t, n) for a, t in enumerate(tokens) for b, n in enumerate(adapters) if n <= t]
    return tuple((t, n) for _, t, n in sorted(pairs, key=lambda pair: pair[0]))
