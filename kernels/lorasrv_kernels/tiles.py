"""What a LoRA kernel is told: the segments of a step, how a module's matrices are cut to tiles, what is left to add."""

from dataclasses import dataclass

from torch import Tensor

from lorasrv_kernels.work import Work

ADDRESS_BYTES = 128
TILE_ROWS = 16
HEADER_FIELDS = 4


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Columns of an A or a transposed B, and the width of its full tiles.

    `chunk` holds for row blocks whose row count is a power of two, `odd_chunk` for the others.
    """

    cols: int
    chunk: int
    odd_chunk: int

    def chunk_for(self, num_rows: int) -> int:
        return self.odd_chunk if num_rows & (num_rows - 1) else self.chunk


@dataclass(frozen=True, kw_only=True)
class Module:
    """A linear module of a layer. `index` is its place among the directory's modules; A is `[rank, a.cols]`
    (in_features), B transposed is `[rank, b.cols]` (out_features)."""

    index: int
    a: Matrix
    b: Matrix


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Token ranges of one step with an adapter and a scale each: built once, used by all layers.

    Ranges are disjoint and ascending; tokens of no range have no adapter and cost nothing. `max_rank` bounds the
    ranks of the step's adapters.
    """

    starts: Tensor  # int32 [num_segments]
    ends: Tensor  # int32 [num_segments]
    directories: Tensor  # int32 [num_segments], in units of 128 bytes from the pool's start
    scales: Tensor  # float32 [num_segments], the request's own scale
    num_modules: int
    max_rank: int
    work: Work  # the same ranges, for the kernels


@dataclass(frozen=True, kw_only=True)
class Delta:
    """LoRA's part of the stacked output of `modules`, shrunk: whoever reads that output next adds it, as
    `reference.sgmv_expand` says."""

    h: Tensor  # float32 [num_splits, len(modules), num_tokens, >= max_rank], as sgmv_shrink left it
    pool: Tensor  # uint8 [num_bytes]
    segments: Segments
    layer: int
    modules: tuple[Module, ...]
