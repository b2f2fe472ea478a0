"""A step's chunks as flat integer arrays: what the runner uploads. Pure; knows no device.

A captured graph reads arrays of fixed shapes, so they can be made larger than the step: rows behind its own are
computed and mean nothing. Their KV goes to the pool's scratch page, and they belong to no sequence and no segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import DTypeLike

from lorasrv.engine.batch import ChunkInput
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.staging import Array
from lorasrv_kernels.attention_work import AttentionWork, Tiling, build_attention_work, empty_attention_work
from lorasrv_kernels.tiles import TILE_ROWS
from lorasrv_kernels.work import WorkPlan, plan_work


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the arrays of a step have room for."""

    num_tokens: int
    num_sequences: int
    max_blocks: int
    num_segments: int = 0
    num_row_blocks: int = 0
    num_rank_blocks: int = 0
    max_rank: int = 0
    num_tiles: int = 0
    num_splits: int = 0
    num_merges: int = 0
    num_slots: int = 0

    @staticmethod
    def of_decodes(num_rows: int, max_blocks: int, max_rank: int, block_tokens: int, tiling: Tiling | None) -> "Room":
        """For any step of so many rows, one of each sequence; `max_rank` 0 for one without adapters."""
        num_segments = num_rows if max_rank else 0
        attention = None
        if tiling is not None:
            attention = empty_attention_work(num_rows, max_blocks * block_tokens, tiling, torch.device("cpu"))
        return Room(
            num_tokens=num_rows,
            num_sequences=num_rows,
            max_blocks=max_blocks,
            num_segments=num_segments,
            num_row_blocks=num_segments,
            num_rank_blocks=num_segments * -(-max_rank // TILE_ROWS),
            max_rank=max_rank,
            **_attention_room(attention),
        )


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """A step's chunks, those of an adapter and scale adjacent, and what its LoRA kernels have to do."""

    chunks: tuple[ChunkInput, ...]
    segments: tuple[tuple[int, int, AdapterInput], ...]  # (start, end, adapter)
    work: WorkPlan
    attention: AttentionWork | None  # on the host

    @staticmethod
    def of(chunks: Sequence[ChunkInput], tiling: Tiling | None = None, height: int | None = None) -> "StepPlan":
        """`height` bounds the rows of a block of LoRA's work; None takes what suits the chunks."""
        segments = _segments(chunks)
        work = plan_work(
            [start for start, _, _ in segments],
            [end for _, end, _ in segments],
            [adapter.max_rank for _, _, adapter in segments],
            sum(chunk.num_tokens for chunk in chunks),
            height,
        )
        attention = None
        if tiling is not None:
            lengths = [chunk.num_tokens for chunk in chunks], [chunk.start + chunk.num_tokens for chunk in chunks]
            attention = build_attention_work(*lengths, tiling)
        return StepPlan(chunks=tuple(chunks), segments=segments, work=work, attention=attention)

    def room(self) -> Room:
        """Just what the step needs."""
        return Room(
            num_tokens=sum(chunk.num_tokens for chunk in self.chunks),
            num_sequences=len(self.chunks),
            max_blocks=max(len(chunk.block_table) for chunk in self.chunks),
            num_segments=len(self.segments),
            num_row_blocks=len(self.work.row_blocks),
            num_rank_blocks=len(self.work.rank_blocks),
            max_rank=max((adapter.max_rank for _, _, adapter in self.segments), default=0),
            **_attention_room(self.attention),
        )


def step_arrays(plan: StepPlan, room: Room, block_tokens: int, scratch_page: int) -> dict[str, Array]:
    """The arrays by name, as `model.decoder.ForwardBatch`, `lorasrv_kernels.tiles.Segments`, its `Work` and
    `AttentionWork` have them.

    Those of segments are left out where there is room for none.
    """
    chunks = plan.chunks
    lengths, starts = [chunk.num_tokens for chunk in chunks], [chunk.start for chunk in chunks]
    firsts = [0, *accumulate(lengths)]
    num_tokens = firsts[-1]
    tables = np.zeros((room.num_sequences, room.max_blocks), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        tables[row, : len(chunk.block_table)] = chunk.block_table
    positions = np.zeros(room.num_tokens, dtype=np.int64)
    slots = np.full(room.num_tokens, scratch_page * block_tokens, dtype=np.int64)
    if chunks:
        # By token: its chunk, and its place in the sequence.
        numbers = np.repeat(np.arange(len(chunks)), lengths)
        places = np.arange(num_tokens) + np.repeat(np.subtract(starts, firsts[:-1]), lengths)
        positions[:num_tokens] = places
        blocks, places = np.divmod(places, block_tokens)
        slots[:num_tokens] = tables[numbers, blocks].astype(np.int64) * block_tokens + places
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids or (0,)]
    arrays: dict[str, Array] = {
        "token_ids": _padded(token_ids, room.num_tokens, np.int64),
        "positions": positions,
        "slots": slots,
        "block_tables": tables,
        "query_starts": _padded(firsts, room.num_sequences + 1, np.int32, behind=num_tokens),
        "context_lengths": _padded(np.add(starts, lengths), room.num_sequences, np.int32),
    }
    if room.num_segments:
        arrays |= _lora_arrays(plan, room)
    if plan.attention is not None:
        arrays |= _attention_arrays(plan.attention, room)
    return arrays


def drawn_rows(chunks: Sequence[ChunkInput]) -> dict[str, Array]:
    """Which rows' tokens come from the draws of the step before, and from which of them."""
    ends = accumulate(chunk.num_tokens for chunk in chunks)
    taken = [(end - 1, chunk.drawn) for chunk, end in zip(chunks, ends, strict=True) if chunk.drawn is not None]
    rows, places = zip(*taken, strict=True) if taken else ((), ())
    return {"rows": np.array(rows, dtype=np.int64), "places": np.array(places, dtype=np.int64)}


def _segments(chunks: Sequence[ChunkInput]) -> tuple[tuple[int, int, AdapterInput], ...]:
    """(start, end, adapter) of every range of rows that share an adapter and scale."""
    found: list[tuple[int, int, AdapterInput]] = []
    end = 0
    for chunk in chunks:
        start, end = end, end + chunk.num_tokens
        if chunk.adapter is None:
            continue
        if found and found[-1][1:] == (start, chunk.adapter):
            start = found.pop()[0]
        found.append((start, end, chunk.adapter))
    return tuple(found)


def _lora_arrays(plan: StepPlan, room: Room) -> dict[str, Array]:
    segments, work = plan.segments, plan.work
    return {
        "starts": _padded([start for start, _, _ in segments], room.num_segments, np.int32),
        "ends": _padded([end for _, end, _ in segments], room.num_segments, np.int32),
        "directories": _padded([adapter.directory for _, _, adapter in segments], room.num_segments, np.int32),
        "scales": _padded([adapter.scale for _, _, adapter in segments], room.num_segments, np.float32),
        "row_blocks": _table(work.row_blocks, room.num_row_blocks, 4),
        "rank_blocks": _table(work.rank_blocks, room.num_rank_blocks, 2),
        "work_counts": np.array([len(work.row_blocks), len(work.rank_blocks)], dtype=np.int32),
    }


def _attention_room(work: AttentionWork | None) -> dict[str, int]:
    if work is None:
        return {}
    return {
        "num_tiles": len(work.tiles),
        "num_splits": len(work.splits),
        "num_merges": len(work.merges),
        "num_slots": work.num_slots,
    }


def _attention_arrays(work: AttentionWork, room: Room) -> dict[str, Array]:
    assert work.num_slots <= room.num_slots, (work.num_slots, room)
    return {
        "tiles": _padded(work.tiles.numpy(), room.num_tiles, np.int32),
        "splits": _padded(work.splits.numpy(), room.num_splits, np.int32),
        "merges": _padded(work.merges.numpy(), room.num_merges, np.int32),
        "attention_counts": work.counts.numpy(),
    }


def _padded(values: Sequence[float] | Array, size: int, dtype: DTypeLike, behind: int = 0) -> Array:
    """`size` entries along the first dimension."""
    padded = np.full((size, *np.shape(values)[1:]), behind, dtype=dtype)
    padded[: len(values)] = values
    return padded


def _table(rows: Sequence[tuple[int, ...]], size: int, width: int) -> Array:
    table = np.zeros((size, width), dtype=np.int32)
    if rows:
        table[: len(rows)] = rows
    return table
