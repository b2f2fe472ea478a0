"""The fused kernels against their oracles, on a GPU or in Triton's interpreter."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from kernel_device import DEVICE
from lora_pool import Adapter, LoraPool, Range
from lorasrv_kernels import fused, norm, reference
from lorasrv_kernels.tiles import Delta

Kind = tuple[torch.dtype, tuple[int, int]]  # type, (a linear module's columns, head_dim)
LAYER = 1
HEADS, KV_HEADS = 3, 2
DTYPES = (torch.float32, torch.bfloat16)
# The oracles round between steps, which a result near zero shows.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
CASES: dict[str, tuple[int, tuple[tuple[int, int, int], ...]]] = {  # rows, (start, end, adapter)
    "ragged": (23, ((0, 5, 1), (5, 6, 2), (9, 20, 0), (20, 22, 3))),
    "single_rows": (4, ((0, 1, 0), (1, 2, 3), (2, 3, 1))),
    "empty_segment": (6, ((0, 3, 2), (3, 3, 3), (3, 6, 1))),
    "all_one_adapter": (19, ((0, 19, 3),)),
    "no_segments": (3, ()),
    "no_rows": (0, ()),
}


def build(dtype: torch.dtype, width: int, head_dim: int) -> tuple[LoraPool, list[Adapter]]:
    shapes = (
        *(("q", 16, HEADS * head_dim), ("k", 16, KV_HEADS * head_dim), ("v", 16, KV_HEADS * head_dim)),
        *(("o", 16, width), ("gate", 16, width), ("up", 16, width)),
    )
    pool = LoraPool(shapes=shapes, dtype=dtype, device=DEVICE, kv_heads=KV_HEADS, num_pages=700)
    all_modules = range(len(shapes))
    return pool, [
        pool.load(dict.fromkeys(all_modules, 1)),
        pool.load({0: 3, 2: 16, 3: 17, 4: 8}),
        pool.load({1: 20, 3: 3, 5: 40}),
        pool.load(dict.fromkeys(all_modules, 72)),
    ]


POOLS = {(dtype, shape): build(dtype, *shape) for dtype in DTYPES for shape in ((144, 64), (75, 80))}


def delta_of(pool: LoraPool, num_rows: int, ranges: Sequence[Range], modules: slice, height: int) -> Delta | None:
    """Two partial sums, NaN where shrink writes nothing."""
    segments = pool.segments(num_rows, ranges, height, spare=2)
    geometry = pool.geometry[modules]
    h = torch.full((2, len(geometry), num_rows, segments.max_rank + 8), float("nan"), device=DEVICE)
    for one in ranges:
        for index, module in enumerate(geometry):
            found = one.adapter.modules.get((LAYER, module.index))
            if found is not None:
                h[:, index, one.start : one.end, : found.rank] = torch.randn(2, one.end - one.start, found.rank)
    return Delta(h=h, pool=pool.storage.bytes, segments=segments, layer=LAYER, modules=geometry)


def plain(delta: Delta | None, num_segments: int) -> Delta | None:
    """Without what stands behind the lists, which the oracle would read."""
    if delta is None:
        return None
    segments = replace(
        delta.segments,
        directories=delta.segments.directories[:num_segments],
        scales=delta.segments.scales[:num_segments],
    )
    return replace(delta, segments=segments)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


def steps(case: str, adapters: list[Adapter]) -> tuple[int, list[Range]]:
    num_rows, ranges = CASES[case]
    return num_rows, [Range(start=s, end=e, adapter=adapters[a]) for s, e, a in ranges]


def kinds() -> Iterator[object]:
    """(case, without adapters or their height, pool): every case where it is tuned, in one of
    the plain ways too, one in the others, the rest slow."""
    for case, height, (dtype, shape) in product(CASES, (None, 16, 64), POOLS):
        tuned = dtype == torch.bfloat16 and shape[0] == 144
        quick = case == "ragged" or tuned or (dtype == torch.float32 and shape[0] == 75 and height == 64)
        yield pytest.param(
            case, height, (dtype, shape), id=f"{case}-{height}-{dtype}-{shape}", marks=() if quick else pytest.mark.slow
        )


EVERY = pytest.mark.parametrize(("case", "height", "kind"), list(kinds()))


@EVERY
def test_silu_mul(case: str, height: int | None, kind: Kind) -> None:
    shape, (pool, adapters) = kind[1], POOLS[kind]
    num_rows, ranges = steps(case, adapters)
    delta = None if height is None else delta_of(pool, num_rows, ranges, slice(4, 6), height)
    gate_up = pool.normal(num_rows, 2 * shape[0]).to(DEVICE)
    want = reference.silu_mul(gate_up.clone(), plain(delta, len(ranges)))
    close(fused.silu_mul(gate_up, delta), want)


@EVERY
def test_add_and_norm(case: str, height: int | None, kind: Kind) -> None:
    shape, (pool, adapters) = kind[1], POOLS[kind]
    num_rows, ranges = steps(case, adapters)
    delta = None if height is None else delta_of(pool, num_rows, ranges, slice(3, 4), height)
    residual, out = (pool.normal(num_rows, shape[0]).to(DEVICE) for _ in range(2))
    weight = pool.normal(shape[0]).to(DEVICE)
    want_x, want_normed = reference.add_rms_norm(residual, out.clone(), plain(delta, len(ranges)), weight, 1e-5)
    close(fused.add(residual, out, delta), want_x)
    x, normed = norm.add_rms_norm(residual, out, delta, weight, 1e-5)
    close(x, want_x)
    close(normed, want_normed)
    close(norm.rms_norm(residual, weight, 1e-5), reference.rms_norm(residual, weight, 1e-5))


@EVERY
@pytest.mark.parametrize("normed", [False, True])
def test_rope_write_kv(case: str, normed: bool, height: int | None, kind: Kind) -> None:
    (dtype, shape), (pool, adapters) = kind, POOLS[kind]
    num_rows, ranges = steps(case, adapters)
    head_dim = shape[1]
    delta = None if height is None else delta_of(pool, num_rows, ranges, slice(0, 3), height)
    qkv = pool.normal(num_rows, (HEADS + 2 * KV_HEADS) * head_dim).to(DEVICE)
    norms = (pool.normal(head_dim).to(DEVICE), pool.normal(head_dim).to(DEVICE)) if normed else None
    # Side by side, as the decoder has them.
    cos, sin = pool.normal(num_rows, 2, head_dim // 2).to(DEVICE).unbind(1)
    kv = torch.full((9, 2, 2, 16, KV_HEADS, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    slots = torch.randperm(9 * 16)[:num_rows].to(DEVICE)
    want_kv = kv.clone()
    want = reference.rope_write_kv(qkv.clone(), plain(delta, len(ranges)), norms, 1e-5, cos, sin, want_kv, LAYER, slots)
    close(fused.rope_write_kv(qkv, delta, norms, 1e-5, cos, sin, kv, LAYER, slots), want)
    assert torch.equal(kv.isnan(), want_kv.isnan())
    close(kv.nan_to_num(), want_kv.nan_to_num())


def test_base_rows_have_the_same_bits_with_and_without_adapters() -> None:
    pool, adapters = POOLS[torch.bfloat16, (144, 64)]
    ranges = [Range(start=2, end=4, adapter=adapters[3])]
    gate_up = pool.normal(6, 288).to(DEVICE)
    alone = fused.silu_mul(gate_up)
    for height in (16, 64):
        together = fused.silu_mul(gate_up, delta_of(pool, 6, ranges, slice(4, 6), height))
        assert torch.equal(together[[0, 1, 4, 5]], alone[[0, 1, 4, 5]])
        assert not torch.equal(together[2:4], alone[2:4])
