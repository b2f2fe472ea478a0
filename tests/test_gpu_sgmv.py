"""SGMV on Triton against its oracle, on a GPU or in Triton's interpreter."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_device import DEVICE
from lora_pool import Adapter, LoraPool, Range
from lorasrv_kernels import reference, sgmv
from lorasrv_kernels.tiles import Segments

LAYER = 1
# Odd widths; widths of several tiles, whose rows begin at multiples of 16 bytes; q, k and v of one input.
SHAPES = {
    "odd": (("q", 75, 131), ("k", 75, 40), ("v", 75, 77)),
    "even": (("q", 208, 144), ("k", 208, 80), ("v", 208, 272)),
}
RANKS = {1: (0, 1, 2), 3: (0, 2), 16: (1,), 40: (0, 1, 2), 72: (0, 2), 200: (2,), 256: (0,)}
DTYPES = (torch.float32, torch.bfloat16)
# What a sum may lose: the order in fp32; h and the result rounded to the type, by the interpreter towards zero.
PRECISION = {torch.float32: 4e-6, torch.bfloat16: 2**-6}


@cache
def pool_of(shapes: str, dtype: torch.dtype) -> tuple[LoraPool, dict[int, Adapter]]:
    pool = LoraPool(shapes=SHAPES[shapes], dtype=dtype, device=DEVICE, kv_heads=16 if shapes == "even" else 4)
    # A module's rank may be below the adapter's.
    return pool, {
        rank: pool.load({index: max(1, rank - 5 * place) for place, index in enumerate(targets)})
        for rank, targets in RANKS.items()
    }


def compare(
    pool: LoraPool,
    num_rows: int,
    ranges: Sequence[Range],
    modules: slice = slice(0, 3),
    num_splits: int = 1,
    **how: int,
) -> None:
    """Both kernels, on fresh inputs."""
    segments, geometry = pool.segments(num_rows, ranges, **how), pool.geometry[modules]
    x = pool.normal(num_rows, geometry[0].a.cols)
    x[untouched(num_rows, ranges)] = float("nan")
    run(pool, segments, x.to(DEVICE), ranges, modules, num_splits)


def run(
    pool: LoraPool, segments: Segments, x: Tensor, ranges: Sequence[Range], modules: slice, num_splits: int
) -> None:
    geometry, memory, num_rows = pool.geometry[modules], pool.storage.bytes, len(x)
    # Rows of h begin at multiples of 16 bytes, as the rows of the others do, or all do not.
    width = segments.max_rank + (-segments.max_rank % 16 if geometry[0].a.cols % 16 == 0 else 3)
    shape = (num_splits, len(geometry), num_rows, width)
    oracle = plain(segments, len(ranges))
    h, want_h = (torch.full(shape, float("nan"), device=DEVICE) for _ in range(2))
    sgmv.sgmv_shrink(x, memory, segments, LAYER, geometry, h)
    reference.sgmv_shrink(x, memory, oracle, LAYER, geometry, want_h)
    torch.testing.assert_close(h, want_h, rtol=1e-4, atol=1e-5 if pool.dtype == torch.float32 else 1e-4, equal_nan=True)

    out = pool.normal(num_rows, sum(module.b.cols for module in geometry)).to(DEVICE)
    out[untouched(num_rows, ranges)] = float("nan")
    want, terms = out.clone(), out.float().abs()
    reference.sgmv_expand(want_h, memory, oracle, LAYER, geometry, want)
    for one in ranges:
        first = 0
        for index, module in enumerate(geometry):
            found = one.adapter.modules.get((LAYER, module.index))
            if found is not None:
                rows = want_h[:, index, one.start : one.end, : found.rank].sum(0).abs()
                terms[one.start : one.end, first : first + module.b.cols] += rows @ found.b.float().abs().T.to(DEVICE)
            first += module.b.cols
    sgmv.sgmv_expand(want_h, memory, segments, LAYER, geometry, out)
    assert torch.equal(out.isnan(), want.isnan())
    error = (out.float() - want.float()).abs()
    assert not (error > PRECISION[pool.dtype] * terms).any(), (error / terms).nan_to_num(0.0).amax()


def plain(segments: Segments, num_segments: int) -> Segments:
    """Without what stands behind the lists, which the oracle would read."""
    return Segments(
        starts=segments.starts,
        ends=segments.ends,
        directories=segments.directories[:num_segments],
        scales=segments.scales[:num_segments],
        num_modules=segments.num_modules,
        max_rank=segments.max_rank,
        work=segments.work,
    )


def untouched(num_rows: int, ranges: Sequence[Range]) -> Tensor:
    rows = torch.ones(num_rows, dtype=torch.bool)
    for one in ranges:
        rows[one.start : one.end] = False
    return rows


CASES: dict[str, tuple[int, tuple[tuple[int, int, int, float], ...]]] = {
    "ragged": (23, ((0, 5, 3, 1.0), (5, 6, 40, 2.0), (9, 20, 1, 0.5), (20, 22, 72, -1.5))),
    "single_rows": (5, ((0, 1, 1, 1.0), (1, 2, 3, 1.0), (2, 3, 16, 1.0), (3, 4, 40, 1.0), (4, 5, 200, 1.0))),
    "empty_segment": (6, ((0, 3, 40, 1.0), (3, 3, 200, 1.0), (3, 6, 3, 1.0))),
    "all_one_adapter": (37, ((0, 37, 40, 1.0),)),
    "largest_ranks": (7, ((1, 3, 256, 1.0), (3, 7, 200, 0.25))),
    "one_adapter_two_scales": (8, ((0, 4, 16, 1.0), (4, 8, 16, -3.0))),
    "no_segments": (4, ()),
    "no_rows": (0, ((0, 0, 3, 1.0),)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case: str) -> None:
    equals_the_oracle(case, "odd", torch.float32, height=16, num_splits=2)
    equals_the_oracle(case, "even", torch.float32, height=64, spare=3)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle_where_it_is_tuned(case: str) -> None:
    equals_the_oracle(case, "even", torch.bfloat16, height=16, num_splits=2)
    equals_the_oracle(case, "even", torch.bfloat16, height=64, spare=3)


def test_equals_the_oracle_in_bf16_that_is_not_aligned() -> None:
    equals_the_oracle("ragged", "odd", torch.bfloat16, height=64, num_splits=3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle_in_every_way(case: str, dtype: torch.dtype) -> None:
    for shapes in SHAPES:
        for height in (16, 64):
            equals_the_oracle(case, shapes, dtype, height=height, num_splits=2, spare=1)


def equals_the_oracle(case: str, shapes: str, dtype: torch.dtype, num_splits: int = 1, **how: int) -> None:
    num_rows, ranges = CASES[case]
    pool, adapters = pool_of(shapes, dtype)
    chosen = [Range(start=s, end=e, adapter=adapters[rank], scale=scale) for s, e, rank, scale in ranges]
    compare(pool, num_rows, chosen, num_splits=num_splits, **how)


@pytest.mark.parametrize("modules", [slice(0, 1), slice(2, 3), slice(1, 3)], ids=str)
def test_modules_of_a_launch(modules: slice) -> None:
    """o and down go alone, gate and up as two."""
    for shapes in SHAPES:
        pool, adapters = pool_of(shapes, torch.float32)
        ranges = [Range(start=1, end=9, adapter=adapters[40]), Range(start=9, end=10, adapter=adapters[1])]
        compare(pool, 12, ranges, modules, height=16)
        compare(pool, 12, ranges, modules, height=64)


@pytest.mark.parametrize("num_splits", [1, 3, 5])
def test_splits(num_splits: int) -> None:
    """More of them than there are columns to sum leaves zeros."""
    pool, adapters = pool_of("even", torch.float32)
    compare(pool, 5, [Range(start=0, end=5, adapter=adapters[40])], num_splits=num_splits)


@settings(max_examples=6)
@given(st.data())
def test_random_steps(data: st.DataObject) -> None:
    random_step(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=150)
@given(st.data())
def test_many_random_steps(data: st.DataObject) -> None:
    random_step(data)


def random_step(data: st.DataObject) -> None:
    pool, adapters = pool_of(data.draw(st.sampled_from(list(SHAPES))), data.draw(st.sampled_from(DTYPES)))
    num_rows = data.draw(st.integers(1, 30))
    bounds = sorted(data.draw(st.lists(st.integers(0, num_rows), min_size=2, max_size=6)))
    ranges = [
        Range(
            start=s, end=e, adapter=adapters[data.draw(st.sampled_from(list(RANKS)))], scale=data.draw(st.floats(-2, 2))
        )
        for s, e in zip(bounds[::2], bounds[1::2], strict=False)
    ]
    first = data.draw(st.integers(0, 2))
    compare(
        pool,
        num_rows,
        ranges,
        slice(first, data.draw(st.integers(first + 1, 3))),
        data.draw(st.integers(1, 3)),
        height=data.draw(st.sampled_from((16, 64))),
        spare=data.draw(st.integers(0, 2)),
    )


def test_a_row_has_the_same_bits_in_any_company() -> None:
    pool, adapters = pool_of("even", torch.bfloat16)
    x, other = pool.normal(1, 208).to(DEVICE), pool.normal(20, 208).to(DEVICE)
    geometry = pool.geometry
    results: list[Tensor] = []
    for row, ranges in (
        (0, [Range(start=0, end=1, adapter=adapters[40])]),
        (5, [Range(start=0, end=4, adapter=adapters[200]), Range(start=4, end=18, adapter=adapters[40])]),
    ):
        rows = other.clone()
        rows[row] = x
        segments = pool.segments(20, ranges, height=16)
        h = torch.empty(2, 3, 20, 256, device=DEVICE)
        out = torch.ones(20, sum(module.b.cols for module in geometry), dtype=pool.dtype, device=DEVICE)
        sgmv.sgmv_shrink(rows, pool.storage.bytes, segments, LAYER, geometry, h)
        sgmv.sgmv_expand(h, pool.storage.bytes, segments, LAYER, geometry, out)
        results.append(out[row])
    assert torch.equal(*results)


def test_adapters_move_between_replays() -> None:
    """The same buffers, as a captured graph has them, while adapters are moved, evicted and loaded: no stale read."""
    pool = LoraPool(shapes=SHAPES["even"], dtype=torch.float32, device=DEVICE, kv_heads=16, seed=5)
    adapters = [pool.load({0: 3, 2: 8}), pool.load({0: 16, 1: 16, 2: 16}), pool.load({1: 40})]
    spans = ((0, 1), (1, 4), (4, 5))
    fixed = pool.segments(6, [Range(start=0, end=1, adapter=adapters[2])] * 1, height=16, spare=8)
    x = torch.empty(6, 208, device=DEVICE)
    for step in range(6):
        if step:
            moved = step % 3
            if step % 2:
                adapters[moved] = pool.move(adapters[moved])
            else:
                pool.unload(adapters[moved])
                adapters[moved] = pool.load({0: 5 * step, 1: 17})
        chosen = [spans[(step + i) % 3] for i in range(1 + step % 3)]
        ranges = [
            Range(start=s, end=e, adapter=adapters[(step + i) % 3], scale=0.5 + step)
            for i, (s, e) in enumerate(sorted(chosen))
        ]
        new = pool.segments(6, ranges, height=16)
        for target, source in (
            (fixed.directories, new.directories),
            (fixed.scales, new.scales),
            (fixed.work.row_blocks, new.work.row_blocks),
            (fixed.work.rank_blocks, new.work.rank_blocks),
            (fixed.work.counts, new.work.counts),
        ):
            target[: len(source)] = source
        x.copy_(pool.normal(6, 208))
        x[untouched(6, ranges)] = float("nan")
        step_segments = Segments(
            starts=new.starts,
            ends=new.ends,
            directories=fixed.directories,
            scales=fixed.scales,
            num_modules=3,
            max_rank=64,
            work=fixed.work,
        )
        run(pool, step_segments, x, ranges, slice(0, 3), 2)


def test_an_adapters_nan_stays_its_own() -> None:
    pool, adapters = pool_of("even", torch.bfloat16)
    spoilt = pool.load({0: 16, 1: 16, 2: 16})
    for page in spoilt.pages[1:]:
        pool.storage.pages[page].view(pool.dtype).fill_(float("nan"))
    ranges = [Range(start=0, end=3, adapter=adapters[40]), Range(start=3, end=5, adapter=spoilt)]
    segments = pool.segments(8, ranges)
    h, out = torch.empty(1, 3, 8, 40, device=DEVICE), torch.zeros(8, 496, dtype=pool.dtype, device=DEVICE)
    sgmv.sgmv_shrink(pool.normal(8, 208).to(DEVICE), pool.storage.bytes, segments, LAYER, pool.geometry, h)
    sgmv.sgmv_expand(h, pool.storage.bytes, segments, LAYER, pool.geometry, out)
    assert out.isnan().any(1).tolist() == [False] * 3 + [True] * 2 + [False] * 3
