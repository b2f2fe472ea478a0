"""The lists of a step's attention against loops over its rows and keys."""

import random
from collections import Counter

import pytest
import torch

from lorasrv_kernels.attention_work import (
    MAX_SPLITS,
    AttentionWork,
    Tile,
    Tiling,
    build_attention_work,
    tiling,
)


def table(group: int, *, deterministic: bool = False) -> Tiling:
    tall = Tile(height=64, width=16, num_warps=4, num_stages=1, per_processor=2)
    short = Tile(height=16, width=16, num_warps=4, num_stages=1, per_processor=2)
    return Tiling(group=group, tall=tall, short=None if deterministic else short, min_split=32)


def assert_covers(work: AttentionWork, rows: list[int], contexts: list[int]) -> None:
    """Every row meets every key that it may see in exactly one place, and every partial result is merged once."""
    starts = [sum(rows[:index]) for index in range(len(rows))]
    pairs: Counter[tuple[int, int]] = Counter()
    slots: dict[int, tuple[int, int]] = {}  # slot: (row, first key)
    direct: set[int] = set()
    items = [(item, work.tiling.tall) for item in work.tiles.tolist()]
    items += [(item, work.tiling.short) for item in work.splits.tolist()]
    for (sequence, first_row, num_rows, position, first, end, slot, num_splits), tile in items:
        assert tile is not None and 0 < num_rows * work.tiling.group <= tile.height
        assert first % tile.width == 0 and first < end
        assert starts[sequence] <= first_row and first_row + num_rows <= starts[sequence] + rows[sequence]
        assert position - first_row == contexts[sequence] - rows[sequence] - starts[sequence]
        for row in range(num_rows):
            pairs.update((first_row + row, key) for key in range(first, min(end, position + row + 1)))
            if num_splits > 1:
                assert slot + row not in slots
                slots[slot + row] = (first_row + row, first)
            else:
                direct.add(first_row + row)
    expected = {
        (starts[index] + row, key)
        for index, (n, context) in enumerate(zip(rows, contexts, strict=True))
        for row in range(n)
        for key in range(context - n + row + 1)
    }
    assert pairs == Counter(expected)
    merged: set[int] = set()
    for row, slot, step, num_splits, size, position in work.merges.tolist():
        assert 1 < num_splits <= MAX_SPLITS
        own = [slots.pop(slot + step * split) for split in range(num_splits)]
        assert own == [(row, split * size) for split in range(num_splits)]
        sequence = max(index for index, start in enumerate(starts) if start <= row and rows[index])
        assert position == contexts[sequence] - rows[sequence] + row - starts[sequence]
        merged.add(row)
    assert not slots, "partial results that nobody merges"
    assert len(merged) + len(direct) == sum(rows) and not merged & direct
    assert work.counts.tolist() == [len(work.tiles), len(work.splits), len(work.merges)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_row_meets_every_key_once(deterministic: bool) -> None:
    rng = random.Random(1)
    for _ in range(60):
        contexts = [rng.choice((1, 7, 31, 32, 33, 64, 65, rng.randint(1, 400))) for _ in range(rng.randint(1, 6))]
        rows = [rng.choice((0, 1, 1, min(c, 4), rng.randint(1, c))) for c in contexts]
        contexts = [context if n else rng.choice((0, context)) for n, context in zip(rows, contexts, strict=True)]
        chosen = table(rng.choice((1, 3, 4, 16)), deterministic=deterministic)
        work = build_attention_work(rows, contexts, chosen)
        assert_covers(work, rows, contexts)
        assert not (deterministic and len(work.splits))
        assert work.num_slots == sum(item[2] for item in work.splits.tolist() if item[7] > 1)
        ends = work.tiles[:, 5].tolist()
        assert ends == sorted(ends, reverse=True)


def test_a_long_contexts_splits_are_few_and_long() -> None:
    work = build_attention_work([1, 2], [100_000, 131_072], tiling(128, 4, torch.bfloat16, capability=90))
    assert [len([item for item in work.splits.tolist() if item[0] == index]) for index in (0, 1)] == [25, 32]
    assert {merge[4] for merge in work.merges.tolist()} == {4096}


def test_a_split_follows_from_its_own_context() -> None:
    for context in (1, 256, 8192, 8193, 10**6):
        size = next(256 << power for power in range(30) if (256 << power) * MAX_SPLITS >= context)
        work = build_attention_work([1, 1, 3], [context, 5, context], tiling(64, 1, torch.bfloat16, capability=90))
        for sequence in (0, 2):
            firsts = [item[4] for item in work.splits.tolist() if item[0] == sequence]
            assert firsts == list(range(0, context, size))
