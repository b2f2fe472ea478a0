"""Triton's paged attention against the oracle: in the interpreter, or on a GPU where there is one."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_device import DEVICE
from paged_case import NOWHERE, Case, Shape, random_case

from lorasrv_kernels.attention import paged_attention  # isort: skip
from lorasrv_kernels.attention_work import (
    AttentionWork,
    Tile,
    Tiling,
    build_attention_work,
    empty_attention_work,
    tiling,
)

SEQUENCES = ((1, 1), (1, 22), (9, 9), (5, 18), (16, 16), (3, 4), (20, 45), (4, 75), (1, 130))
# A GPU's exp2 is off by 2^-22, in every weight and at every new maximum.
TOLERANCE = {torch.float32: 6e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def small_tiling(group: int, *, min_split: int = 32, deterministic: bool = False) -> Tiling:
    """Tiles so small that few positions make many of them."""
    tile = Tile(height=max(16, 1 << (group - 1).bit_length()), width=16, num_warps=4, num_stages=1, per_processor=2)
    return Tiling(group=group, tall=tile, short=None if deterministic else tile, min_split=min_split)


def on_device(work: AttentionWork) -> AttentionWork:
    lists = {name: getattr(work, name).to(DEVICE) for name in ("tiles", "splits", "merges", "counts")}
    return replace(work, **lists)


def attend(case: Case, table: Tiling, work: AttentionWork | None = None) -> Tensor:
    work = work or build_attention_work(case.rows, case.contexts, table)
    out = torch.full_like(case.query, float("nan"))
    paged_attention(*case.arguments(), out, work=on_device(work))
    return out


def assert_matches(case: Case, table: Tiling) -> None:
    tolerance = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(attend(case, table).float(), case.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 2, 16, 33, 500])
@pytest.mark.parametrize("deterministic", [False, True])
def test_chunks_and_decode_rows_are_the_oracles_in_small_tiles(window: int | None, deterministic: bool) -> None:
    assert_matches(random_case(SEQUENCES, window), small_tiling(3, deterministic=deterministic))


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "shape",
    [
        Shape(kv_heads=1, group=1, head_dim=64, block_tokens=16),
        Shape(kv_heads=1, group=1, head_dim=64, block_tokens=16, dtype=BF16),
        Shape(kv_heads=2, group=4, head_dim=128, block_tokens=16, dtype=BF16),
        Shape(kv_heads=1, group=7, head_dim=96, block_tokens=32, dtype=FP16),
        Shape(kv_heads=1, group=20, head_dim=40, block_tokens=8, dtype=BF16),
        Shape(kv_heads=1, group=2, head_dim=256, block_tokens=16, dtype=FP16),
        Shape(kv_heads=1, group=2, head_dim=256, block_tokens=16),
    ],
)
@pytest.mark.parametrize("window", [None, 60])
def test_the_tables_tiles_are_the_oracles(shape: Shape, window: int | None) -> None:
    case = random_case(((1, 300), (2, 30), (40, 70)), window, shape)
    for deterministic in (False, True):
        table = tiling(shape.head_dim, shape.group, shape.dtype, capability=90, deterministic=deterministic)
        assert_matches(case, table)


@given(st.data())
@settings(max_examples=8)
def test_any_batch_is_the_oracles(data: st.DataObject) -> None:
    sequence = st.integers(1, 70).flatmap(
        lambda c: st.tuples(st.integers(1, c) | st.integers(1, min(c, 4)), st.just(c))
    )
    sequences = data.draw(st.lists(sequence, min_size=1, max_size=4))
    shape = Shape(
        kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 9)),
        head_dim=data.draw(st.sampled_from([8, 16, 20, 64])),
        block_tokens=data.draw(st.sampled_from([2, 8, 16])),
    )
    window = data.draw(st.none() | st.integers(1, 80))
    table = small_tiling(shape.group, deterministic=data.draw(st.booleans()))
    assert_matches(random_case(sequences, window, shape, data.draw(st.integers(0, 99))), table)


@pytest.mark.parametrize("context", [32, 33, 64, 65])
@pytest.mark.parametrize("window", [None, 1, 32, 33])
def test_contexts_at_the_borders_of_splits(context: int, window: int | None) -> None:
    shape = Shape(kv_heads=1, group=2)
    assert_matches(random_case(((1, context), (5, context)), window, shape), small_tiling(2))


def test_a_context_of_more_than_the_most_splits() -> None:
    case = random_case(((1, 32 * 16 + 1),), None, Shape(kv_heads=1, group=1))
    table = small_tiling(1, min_split=16)
    assert build_attention_work(case.rows, case.contexts, table).merges[:, 3:5].tolist() == [[17, 32]]
    assert_matches(case, table)


def bits_of(row: int, sequences: Sequence[tuple[int, int]], case: Case, table: Tiling) -> Tensor:
    """The answer for the first sequence's row at a position, its context in these chunks beside other sequences."""
    rows, context = sequences[0]
    at = row - (context - rows)
    own = replace(case, sequences=sequences, query=case.query[: sum(rows for rows, _ in sequences)].clone())
    own.query[:rows] = case.query[context - rows : context]
    return attend(own, table)[at]


@pytest.mark.parametrize("window", [None, 20])
def test_a_rows_bits_do_not_follow_from_its_batch_or_its_chunk(window: int | None) -> None:
    """In chunks of many rows, whatever else is in the tile; decode rows, whatever else is in the batch."""
    case = random_case(((90, 90), (30, 61), (1, 90)), window, Shape(kv_heads=1))
    kinds = {False: ((40, 80), (7, 71)), True: ((1, 71), (20, 80))}
    for deterministic, chunks in kinds.items():
        table = small_tiling(3, deterministic=deterministic)
        want = bits_of(70, [(90, 90)], case, table)
        for chunk in chunks:
            for others in ((), ((0, 0), (1, 90))):
                assert torch.equal(bits_of(70, [chunk, *others], case, table), want), (deterministic, chunk, others)
    want = bits_of(89, [(1, 90)], case, small_tiling(3))
    assert torch.equal(bits_of(89, [(1, 90), (30, 61), (1, 90)], case, small_tiling(3)), want)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graphs_room_may_be_larger_than_the_step(deterministic: bool) -> None:
    """Rows of sequences that are not there keep what was there; what stands behind the counts is not looked at."""
    case = random_case(((1, 90), (1, 3), (1, 33)))
    table = small_tiling(3, deterministic=deterministic)
    room = empty_attention_work(8, 128, table, DEVICE)
    step = build_attention_work(case.rows, case.contexts, table)
    for name in ("tiles", "splits", "merges"):
        getattr(room, name).fill_(NOWHERE)
        getattr(room, name)[: len(getattr(step, name))] = getattr(step, name).to(DEVICE)
    room.counts.copy_(step.counts)
    padded = replace(case, query=torch.cat((case.query, case.query.new_full((5, *case.query.shape[1:]), float("nan")))))
    out = attend(padded, table, room)
    torch.testing.assert_close(out[:3], case.expected(), atol=2e-6, rtol=2e-6)
    assert out[3:].isnan().all()
    room.counts.zero_()
    assert attend(padded, table, room).isnan().all()


@pytest.mark.parametrize("max_context", [20, 32, 33, 1023, 1024, 1025, 5000])
def test_a_graph_has_room_for_every_context(max_context: int) -> None:
    table = small_tiling(3)
    room = empty_attention_work(4, max_context, table, torch.device("cpu"))
    for context in {1, 31, 32, 33, 1000, 1024, 1025, 3000, max_context}:
        if context <= max_context:
            step = build_attention_work([1] * 4, [context] * 4, table)
            for name in ("tiles", "splits", "merges"):
                assert len(getattr(step, name)) <= len(getattr(room, name)), (context, name)
            assert step.num_slots <= room.num_slots


def test_queries_may_stand_among_other_columns() -> None:
    case = random_case(SEQUENCES)
    wide = torch.full((len(case.query), 9, *case.query.shape[2:]), float("nan"), device=DEVICE)
    wide[:, 2:8] = case.query
    strided = replace(case, query=wide[:, 2:8])
    out = torch.full_like(wide, 7.0)
    work = on_device(build_attention_work(case.rows, case.contexts, small_tiling(3)))
    paged_attention(*strided.arguments(), out[:, 2:8], work=work)
    torch.testing.assert_close(out[:, 2:8], case.expected(), atol=2e-6, rtol=2e-6)
    assert (out[:, [0, 1, 8]] == 7.0).all()
