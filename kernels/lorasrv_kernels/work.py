"""What a step's LoRA kernels have to do, as lists on the device: grids stay fixed while the work changes.

A kernel is launched with as many programs as the device holds at a time, and each takes every num_programs-th entry of
a list whose length it reads from the device. So a captured graph is valid for any set of adapters, and a program that
finds nothing to do costs a read. The lists are made once a step, from integers, and serve all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DECODE_HEIGHT = 16
PREFILL_HEIGHT = 64
# Partial sums shorter than this cost more to write and read than another program saves; more of them, too.
_SPLIT_COLS, _MAX_SPLITS = 1024, 8


@dataclass(frozen=True, kw_only=True)
class Work:
    """The lists of a step. Their capacity may exceed their length; what lies behind it is not read."""

    height: int  # most rows of a row block
    rank_step: int  # rank rows of a rank block
    row_blocks: Tensor  # int32 [capacity, 4]: first row, number of rows, segment, rank
    rank_blocks: Tensor  # int32 [capacity, 2]: row block, first rank row
    counts: Tensor  # int32 [2]: how many row blocks and rank blocks there are


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """`Work` in integers.

    Every row of the step lies in exactly one row block, whose rows share a segment; its rank is the largest of the
    segment's adapter. Rows of no segment lie in blocks of rank 0, whose segment means nothing. For every row block,
    the rank blocks cover the rank rows [0, rank) in steps of `rank_step`.
    """

    height: int
    rank_step: int
    row_blocks: tuple[tuple[int, int, int, int], ...]
    rank_blocks: tuple[tuple[int, int], ...]

    def upload(self, device: torch.device) -> Work:
        def tensor(values: Sequence[object], *shape: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device).view(*shape)

        return Work(
            height=self.height,
            rank_step=self.rank_step,
            row_blocks=tensor(self.row_blocks, -1, 4),
            rank_blocks=tensor(self.rank_blocks, -1, 2),
            counts=tensor((len(self.row_blocks), len(self.rank_blocks)), 2),
        )


def plan_work(
    starts: Sequence[int],
    ends: Sequence[int],
    ranks: Sequence[int],  # the largest rank of each segment's adapter
    num_rows: int,
    height: int | None = None,  # None takes what suits the segments
) -> WorkPlan:
    """The work of a step whose segments are the disjoint, ascending row ranges [starts[i], ends[i]).

    There are at most `num_rows` row blocks, and at most `num_rows // height + 2 * len(starts) + 1`; for each of them at
    most `max(ranks) / rank_step` rank blocks, rounded up.
    """
    runs = _runs(starts, ends, ranks, num_rows)
    if height is None:
        longest = max((end - start for start, end, _, _ in runs), default=0)
        height = PREFILL_HEIGHT if longest > PREFILL_HEIGHT else DECODE_HEIGHT
    rank_step = 16 if height == DECODE_HEIGHT or max(ranks, default=0) <= 16 else 32
    row_blocks = [
        (row, min(height, end - row), segment, rank)
        for start, end, segment, rank in runs
        for row in range(start, end, height)
    ]
    rank_blocks = [
        (block, first) for block, (_, _, _, rank) in enumerate(row_blocks) for first in range(0, rank, rank_step)
    ]
    return WorkPlan(height=height, rank_step=rank_step, row_blocks=tuple(row_blocks), rank_blocks=tuple(rank_blocks))


def _runs(
    starts: Sequence[int], ends: Sequence[int], ranks: Sequence[int], num_rows: int
) -> list[tuple[int, int, int, int]]:
    """(start, end, segment, rank) of the segments that hold rows, and of the rows between them with rank 0."""
    runs: list[tuple[int, int, int, int]] = []
    row = 0
    for segment, (start, end, rank) in enumerate(zip(starts, ends, ranks, strict=True)):
        assert row <= start <= end <= num_rows, (segment, start, end)
        if row < start:
            runs.append((row, start, 0, 0))
        if start < end:
            runs.append((start, end, segment, rank))
        row = end
    if row < num_rows:
        runs.append((row, num_rows, 0, 0))
    return runs


def num_splits(in_features: int, num_rows: int) -> int:
    """How many partial sums a shrink of `num_rows` rows best makes: parallel work for few rows, little to add for many.

    The same for all numbers of rows up to 256.
    """
    by_rows = _MAX_SPLITS * 256 // max(num_rows, 256)
    return max(1, min(in_features // _SPLIT_COLS, _MAX_SPLITS, by_rows))


def split_cols(in_features: int, splits: int) -> int:
    """Columns of a split: split s sums over [s, s + 1) times this many, as far as there are columns."""
    return -(-in_features // (128 * splits)) * 128
