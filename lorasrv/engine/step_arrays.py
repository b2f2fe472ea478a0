"""A step's chunks as flat integer arrays: what the runner uploads. Pure; knows no device.

A captured graph reads arrays of fixed shapes, so they can be made larger than the step: rows behind its own are
computed and mean nothing. Their KV goes to the pool's scratch page, and they belong to no sequence and no segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import DTypeLike

from lorasrv.engine.batch import AdapterInput, ChunkInput
from lorasrv.memory.staging import Array


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the arrays of a step have room for."""

    num_tokens: int
    num_sequences: int
    max_blocks: int
    num_segments: int

    @staticmethod
    def of(chunks: Sequence[ChunkInput]) -> "Room":
        """Just what these chunks need."""
        return Room(
            num_tokens=sum(chunk.num_tokens for chunk in chunks),
            num_sequences=len(chunks),
            max_blocks=max(len(chunk.block_table) for chunk in chunks),
            num_segments=len(_segments(chunks)),
        )


def step_arrays(
    chunks: Sequence[ChunkInput],  # those of an adapter and scale are adjacent
    room: Room,
    block_tokens: int,
    scratch_page: int,
) -> dict[str, Array]:
    """The arrays by name, as `model.decoder.ForwardBatch` and `lorasrv_kernels.tiles.Segments` have them.

    Those of segments are left out where there is room for none.
    """
    lengths = [chunk.num_tokens for chunk in chunks]
    ends = list(accumulate(lengths))
    positions = [np.arange(chunk.start, chunk.start + chunk.num_tokens) for chunk in chunks]
    tables = np.zeros((room.num_sequences, room.max_blocks), dtype=np.int32)
    slots = np.full(room.num_tokens, scratch_page * block_tokens, dtype=np.int64)
    for row, (chunk, place, end) in enumerate(zip(chunks, positions, ends, strict=True)):
        tables[row, : len(chunk.block_table)] = chunk.block_table
        slots[end - len(place) : end] = tables[row, place // block_tokens].astype(np.int64) * block_tokens + (
            place % block_tokens
        )
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids or (0,)]
    arrays: dict[str, Array] = {
        "token_ids": _padded(token_ids, room.num_tokens, np.int64),
        "positions": _padded(np.concatenate(positions), room.num_tokens, np.int64),
        "slots": slots,
        "block_tables": tables,
        "query_starts": _padded([0, *ends], room.num_sequences + 1, np.int32, behind=ends[-1]),
        "context_lengths": _padded([c.start + c.num_tokens for c in chunks], room.num_sequences, np.int32),
    }
    if room.num_segments:
        arrays |= _segment_arrays(_segments(chunks), room.num_segments)
    return arrays


def drawn_rows(chunks: Sequence[ChunkInput]) -> dict[str, Array]:
    """Which rows' tokens come from the draws of the step before, and from which of them."""
    ends = accumulate(chunk.num_tokens for chunk in chunks)
    taken = [(end - 1, chunk.drawn) for chunk, end in zip(chunks, ends, strict=True) if chunk.drawn is not None]
    rows, places = zip(*taken, strict=True) if taken else ((), ())
    return {"rows": np.array(rows, dtype=np.int64), "places": np.array(places, dtype=np.int64)}


def _segments(chunks: Sequence[ChunkInput]) -> list[tuple[int, int, AdapterInput]]:
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
    return found


def _segment_arrays(segments: Sequence[tuple[int, int, AdapterInput]], num_segments: int) -> dict[str, Array]:
    return {
        "starts": _padded([start for start, _, _ in segments], num_segments, np.int32),
        "ends": _padded([end for _, end, _ in segments], num_segments, np.int32),
        "directories": _padded([adapter.directory for _, _, adapter in segments], num_segments, np.int32),
        "scales": _padded([adapter.scale for _, _, adapter in segments], num_segments, np.float32),
    }


def _padded(values: Sequence[float] | Array, size: int, dtype: DTypeLike, behind: int = 0) -> Array:
    padded = np.full(size, behind, dtype=dtype)
    padded[: len(values)] = values
    return padded
