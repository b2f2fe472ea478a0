"""What the attention of a step is cut into, built on the host once a step and read by the kernels of every layer.

Semantics: a sequence's last n rows attend to its context of c positions. Rows meet keys in one of two ways.

- Rows of many (a prefill chunk) go in *tiles* of up to `height // group` rows, each over all its keys.
- Rows so few that one short tile holds them (decode) have their keys cut to *splits* `[k * size, (k + 1) * size)`,
  whose partial results are merged in ascending order. `size` is a function of c alone, so that a long context fills
  the chip and a row's bits do not follow from what else is in the batch.

A CUDA graph of decode steps keeps its tensors and gets other items and counts, whatever the contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A row has at most so many splits, which one program merges.
MAX_SPLITS = 32
# At 8 KV heads of 128 elements in two bytes, 128 KiB of keys and values a program: a batch of one with a context of 1k
# has 32 programs, and the partial results are 1/64 of what is read.
MIN_SPLIT = 256

ITEM_FIELDS = 8
MERGE_FIELDS = 6


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How the attention kernel is compiled: packed rows (rows × query heads of a kv head) by keys a round."""

    height: int
    width: int
    num_warps: int
    num_stages: int
    per_processor: int  # programs that a processor holds at a time


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The kernels that a model's steps use. `short` None: all rows go through `tall`, over all their keys, so that a
    row's bits follow from its position and its keys alone, in a chunk of any size or in decode."""

    group: int  # query heads of a kv head
    tall: Tile
    short: Tile | None
    min_split: int = MIN_SPLIT


def tiling(head_dim: int, group: int, dtype: torch.dtype, *, capability: int, deterministic: bool = False) -> Tiling:
    """The launcher's table. `dtype` is the query's; `capability` is 80 for an sm_80 (0 for none)."""
    wide, hopper = head_dim > 128, capability >= 90

    def tile(height: int, width: int, *, num_warps: int, num_stages: int = 3, per_processor: int = 1) -> Tile:
        height = max(height, 1 << (group - 1).bit_length())  # one row's heads fit
        return Tile(height=height, width=width, num_warps=num_warps, num_stages=num_stages, per_processor=per_processor)

    if dtype.itemsize == 4:  # no tensor cores: for parity, not for speed
        tall = tile(16, 16, num_warps=4, num_stages=1) if wide else tile(32, 32, num_warps=8, num_stages=1)
        short = tile(16, 16 if wide else 32, num_warps=4, num_stages=1, per_processor=2)
    else:
        # Before Hopper both operands pass through registers, which 128 rows would spill. A tile of few live rows, as
        # in deterministic decode, computes all of its height.
        height, width = 128 if hopper and not wide and not deterministic else 64, 32 if wide else 64
        tall = tile(height, width, num_warps=4 if height == 64 and head_dim <= 64 else 8)
        # By shared memory, and where head_dim is wide by registers.
        short = tile(16, width, num_warps=4, per_processor=3 if hopper and not wide else 2)
    return Tiling(group=group, tall=tall, short=None if deterministic else short)


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """The items of one step. Behind their counts the lists mean nothing, so they may be longer.

    An item is (sequence, first row, number of rows, position of the first row, first key, end of its keys, slot,
    number of the row's splits). Row i of an item with several splits leaves its partial result in place slot + i.
    A merge is (row, first slot, slots from split to split, number of splits, size of a split, position of the row).
    """

    tiling: Tiling
    tiles: Tensor  # int32 [tile capacity, ITEM_FIELDS], those with the most keys first
    splits: Tensor  # int32 [split capacity, ITEM_FIELDS]
    merges: Tensor  # int32 [merge capacity, MERGE_FIELDS], the rows of more than one split
    counts: Tensor  # int32 [3]: how many tiles, splits and merges
    num_slots: int  # room for partial results that the step's layers take


def build_attention_work(
    num_rows: Sequence[int],  # of each sequence; 0 for one that is not there
    context_lengths: Sequence[int],  # those rows included
    tiling: Tiling,
) -> AttentionWork:
    """On the host, lists as long as their counts. Rows stand in the order of the sequences."""
    rows = torch.tensor(num_rows, dtype=torch.int64)
    contexts = torch.tensor(context_lengths, dtype=torch.int64)
    starts = rows.cumsum(0) - rows
    short = torch.zeros_like(rows, dtype=torch.bool)
    if tiling.short is not None:
        short = rows * tiling.group <= tiling.short.height
    tall_ids = (~short).nonzero().squeeze(1)
    short_ids = (short & (rows > 0)).nonzero().squeeze(1)
    tiles = _tiles(tall_ids, starts, rows, contexts, tiling.tall.height // tiling.group)
    splits, merges, num_slots = _splits(short_ids, starts, rows, contexts, tiling.min_split)
    counts = torch.tensor([len(tiles), len(splits), len(merges)], dtype=torch.int32)
    return AttentionWork(tiling=tiling, tiles=tiles, splits=splits, merges=merges, counts=counts, num_slots=num_slots)


def empty_attention_work(num_sequences: int, max_context: int, tiling: Tiling, device: torch.device) -> AttentionWork:
    """What a CUDA graph of decode steps is captured with: room for one row each of so many sequences."""
    num_splits = min(MAX_SPLITS, -(-max_context // tiling.min_split))
    room = num_sequences * num_splits if tiling.short else 0

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return AttentionWork(
        tiling=tiling,
        tiles=empty(0 if tiling.short else num_sequences, ITEM_FIELDS),
        splits=empty(room, ITEM_FIELDS),
        merges=empty(num_sequences if tiling.short and num_splits > 1 else 0, MERGE_FIELDS),
        counts=empty(3),
        num_slots=room,
    )


def _tiles(ids: Tensor, starts: Tensor, rows: Tensor, contexts: Tensor, height: int) -> Tensor:
    sequence, index = _each(ids, -(-rows[ids] // height))
    first = index * height
    num = (rows[sequence] - first).clamp(max=height)
    position = contexts[sequence] - rows[sequence] + first
    end = position + num
    items = _table(sequence, starts[sequence] + first, num, position, 0, end, 0, 1)
    return items[end.argsort(descending=True, stable=True)]


def _splits(ids: Tensor, starts: Tensor, rows: Tensor, contexts: Tensor, min_split: int) -> tuple[Tensor, Tensor, int]:
    size = torch.full_like(contexts, min_split)
    while bool((size * MAX_SPLITS < contexts).any()):
        size = torch.where(size * MAX_SPLITS < contexts, size * 2, size)
    num_splits = -(-contexts // size)
    slots = torch.zeros_like(rows)
    slots[ids] = torch.where(num_splits[ids] > 1, num_splits[ids] * rows[ids], 0)
    first_slot = slots.cumsum(0) - slots
    oldest = contexts - rows  # the position of the first row

    sequence, split = _each(ids, num_splits[ids])
    first = split * size[sequence]
    end = torch.minimum(first + size[sequence], contexts[sequence])
    slot = first_slot[sequence] + split * rows[sequence]
    items = _table(sequence, starts[sequence], rows[sequence], oldest[sequence], first, end, slot, num_splits[sequence])

    sequence, row = _each(ids, torch.where(num_splits[ids] > 1, rows[ids], 0))
    merges = _table(
        starts[sequence] + row,
        first_slot[sequence] + row,
        rows[sequence],
        num_splits[sequence],
        size[sequence],
        oldest[sequence] + row,
    )
    return items, merges, int(slots.sum())


def _each(ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Every id as often as its count says, and which of them it is."""
    repeated = ids.repeat_interleave(counts)
    return repeated, torch.arange(len(repeated)) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def _table(*columns: Tensor | int) -> Tensor:
    length = len(next(column for column in columns if isinstance(column, Tensor)))
    table = torch.empty(length, len(columns), dtype=torch.int32)
    for index, column in enumerate(columns):
        table[:, index] = column
    return table
