"""A step's work lists against brute force."""

import random

import pytest
import torch

from lorasrv_kernels.work import WorkPlan, num_splits, plan_work, split_cols


def check(plan: WorkPlan, starts: list[int], ends: list[int], ranks: list[int], num_rows: int) -> None:
    """Every row exactly once and every rank row of it exactly once, each with its own segment; the stated bounds."""
    segment_of = {row: s for s, (start, end) in enumerate(zip(starts, ends, strict=True)) for row in range(start, end)}
    rows: list[int] = []
    for first, count, segment, rank in plan.row_blocks:
        assert 0 < count <= plan.height
        rows += range(first, first + count)
        for row in range(first, first + count):
            assert rank == (ranks[segment_of[row]] if row in segment_of else 0)
            assert row not in segment_of or segment == segment_of[row]
    assert sorted(rows) == list(range(num_rows))
    pairs: list[tuple[int, int]] = []
    for block, first in plan.rank_blocks:
        pairs += [
            (block, rank_row) for rank_row in range(first, min(first + plan.rank_step, plan.row_blocks[block][3]))
        ]
    assert sorted(pairs) == [(i, r) for i, block in enumerate(plan.row_blocks) for r in range(block[3])]
    assert len(plan.row_blocks) <= min(num_rows, num_rows // plan.height + 2 * len(starts) + 1)
    assert len(plan.rank_blocks) <= len(plan.row_blocks) * -(-max(ranks, default=0) // plan.rank_step)


@pytest.mark.parametrize("seed", range(300))
def test_covers_every_row_and_rank_row_once(seed: int) -> None:
    rng = random.Random(seed)
    num_rows, num_segments = rng.choice((0, 1, 5, 17, 64, 65, 200, 513)), rng.choice((0, 1, 2, 5, 40))
    bounds = sorted(rng.choices(range(num_rows + 1), k=2 * num_segments))  # empty and adjacent ones among them
    starts, ends = bounds[::2], bounds[1::2]
    ranks = [rng.choice((0, 1, 3, 16, 17, 64, 200, 256)) for _ in starts]
    for height in (None, 16, 64):
        plan = plan_work(starts, ends, ranks, num_rows, height)
        assert height is None or plan.height == height
        check(plan, starts, ends, ranks, num_rows)


def test_long_runs_take_high_blocks() -> None:
    assert plan_work([0, 10], [10, 74], [8, 8], 74).height == 16
    assert plan_work([0, 10], [10, 75], [8, 8], 75).height == 64
    assert plan_work([0], [1], [8], 8_000).height == 64  # rows without an adapter are rows
    assert plan_work([0], [8_000], [16], 8_000).rank_step == 16
    assert plan_work([0], [8_000], [17], 8_000).rank_step == 32


def test_segments_must_ascend() -> None:
    with pytest.raises(AssertionError):
        plan_work([4, 0], [8, 4], [1, 1], 8)
    with pytest.raises(AssertionError):
        plan_work([0], [9], [1], 8)


def test_uploads_empty_lists() -> None:
    work = plan_work([], [], [], 0).upload(torch.device("cpu"))
    assert work.row_blocks.shape == (0, 4) and work.rank_blocks.shape == (0, 2) and work.counts.tolist() == [0, 0]


@pytest.mark.parametrize("cols", [1, 127, 128, 768, 896, 4096, 14336])
def test_splits_cover_the_columns(cols: int) -> None:
    for splits in (1, 2, 3, 8, 16):
        width = split_cols(cols, splits)
        assert width % 128 == 0 and splits * width >= cols
    of_rows = [num_splits(cols, num_rows) for num_rows in (1, 16, 256, 512, 1024, 8192)]
    assert of_rows[0] == of_rows[1] == of_rows[2] >= 1
    assert of_rows == sorted(of_rows, reverse=True) and of_rows[-1] == 1
    assert (num_splits(4096, 1), num_splits(14336, 1)) == (4, 8)
