"""How KV blocks and adapter weights are cut to pages. Pure functions of shapes: integers, no tensors.

A page holds one KV block of `block_tokens` tokens for all layers, `[layers, 2, block_tokens, kv_heads, head_dim]`,
or adapter tiles. A tile is up to 16 rank rows by a column chunk of an A or of a transposed B matrix, contiguous,
128-byte aligned and never across pages. The cut depends on (shape, rank, dtype, page size) alone; where an adapter
landed shows only in its page list. What the directory means to a kernel is stated in `lorasrv_kernels.reference`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

TILE_ROWS = 16
ALIGN_BYTES = 128
MIN_CHUNK_COLS = 64
DIRECTORY_FIELDS = 4

# A page holds at least this many full tiles, which keeps what a page cannot use under 1 %: a chunk is a power of two,
# so tiles of 1, 2, 4, 8 or 16 rows fill pages exactly, and the others are cut finer.
_FULL_TILES_PER_PAGE = 16
_ODD_TILES_PER_PAGE = 128


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """The one layout of a pool. `page_bytes` follows from the KV block; raises ValueError if not 128-byte aligned."""

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.page_bytes % ALIGN_BYTES:
            raise ValueError(f"a page of {self.page_bytes} bytes is not a multiple of {ALIGN_BYTES}")

    @property
    def page_elems(self) -> int:
        return self.num_layers * 2 * self.block_tokens * self.num_kv_heads * self.head_dim

    @property
    def page_bytes(self) -> int:
        return self.page_elems * self.itemsize

    def pages_for_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)


@dataclass(frozen=True, kw_only=True)
class MatrixShape:
    """A rank-by-columns matrix: A is `[rank, in_features]`, B is kept transposed, `[rank, out_features]`."""

    rank: int
    cols: int


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Rows `[row, row + num_rows)` and columns `[col, col + num_cols)` of matrix number `matrix`, placed."""

    matrix: int
    row: int
    num_rows: int
    col: int
    num_cols: int
    local_page: int
    offset_bytes: int


@dataclass(frozen=True, kw_only=True)
class AdapterImage:
    """Where every tile of an adapter lies in its own pages, numbered from 0.

    The directory stands at offset 0 of local page 0. Tiles are in directory order: matrix, row block, column chunk.
    """

    num_pages: int
    directory_bytes: int
    tiles: tuple[Tile, ...]
    first_tile: tuple[int, ...]


def chunk_cols(cols: int, num_rows: int, page_bytes: int, itemsize: int) -> int:
    """Columns of a full tile of `num_rows` rows of a matrix `cols` wide: a power of two, at least 64."""
    odd = num_rows & (num_rows - 1)
    limit = page_bytes // ((_ODD_TILES_PER_PAGE if odd else _FULL_TILES_PER_PAGE) * TILE_ROWS * itemsize)
    return max(MIN_CHUNK_COLS, min(_floor_power_of_two(limit), _floor_power_of_two(cols)))


def cut_matrix(matrix: int, shape: MatrixShape, page_bytes: int, itemsize: int) -> list[tuple[int, int, int, int, int]]:
    """Tiles of one matrix as (matrix, row, num_rows, col, num_cols), row blocks first, then column chunks."""
    cuts: list[tuple[int, int, int, int, int]] = []
    for row in range(0, shape.rank, TILE_ROWS):
        num_rows = min(TILE_ROWS, shape.rank - row)
        chunk = chunk_cols(shape.cols, num_rows, page_bytes, itemsize)
        cuts += [(matrix, row, num_rows, col, min(chunk, shape.cols - col)) for col in range(0, shape.cols, chunk)]
    return cuts


def adapter_image(
    matrices: Sequence[MatrixShape], num_headers: int, page_bytes: int, itemsize: int
) -> AdapterImage | None:
    """Place an adapter's tiles into as few of its own pages as first-fit-decreasing finds.

    `matrices` in directory order; `num_headers` is layers x modules, each `DIRECTORY_FIELDS` int32. None when the
    directory or a tile exceeds a page.
    """
    cuts, directory_bytes, sizes = _measure(matrices, num_headers, page_bytes, itemsize)
    if max([directory_bytes, *sizes]) > page_bytes:
        return None
    places, num_pages = _first_fit_decreasing(sizes, page_bytes, directory_bytes)
    tiles = tuple(
        Tile(matrix=m, row=r, num_rows=nr, col=c, num_cols=nc, local_page=page, offset_bytes=offset)
        for (m, r, nr, c, nc), (page, offset) in zip(cuts, places, strict=True)
    )
    first_tile: list[int] = []
    for index, cut in enumerate(cuts):
        if cut[0] == len(first_tile):
            first_tile.append(index)
    return AdapterImage(
        num_pages=num_pages,
        directory_bytes=directory_bytes,
        tiles=tiles,
        first_tile=tuple(first_tile),
    )


def min_page_bytes(matrices: Sequence[MatrixShape], num_headers: int, page_bytes: int, itemsize: int) -> int:
    """What cut for pages of `page_bytes` must lie in one of them: the whole directory, and each tile."""
    _, directory_bytes, sizes = _measure(matrices, num_headers, page_bytes, itemsize)
    return max([directory_bytes, *sizes])


def _measure(
    matrices: Sequence[MatrixShape], num_headers: int, page_bytes: int, itemsize: int
) -> tuple[list[tuple[int, int, int, int, int]], int, list[int]]:
    """An adapter's cuts as `cut_matrix` makes them, the bytes of its directory, and those of each tile."""
    cuts = [cut for index, shape in enumerate(matrices) for cut in cut_matrix(index, shape, page_bytes, itemsize)]
    sizes = [_align(num_rows * num_cols * itemsize) for _, _, num_rows, _, num_cols in cuts]
    return cuts, _align(4 * (num_headers * DIRECTORY_FIELDS + len(cuts))), sizes


def _first_fit_decreasing(sizes: Sequence[int], page_bytes: int, reserved: int) -> tuple[list[tuple[int, int]], int]:
    """(page, offset) for every size, and the number of pages; `reserved` bytes of page 0 are taken already.

    Fills one page after the other, largest tiles that still fit first: first-fit-decreasing, by size class.
    """
    by_size: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        by_size.setdefault(size, []).append(index)
    classes = [(size, iter(by_size[size]), len(by_size[size])) for size in sorted(by_size, reverse=True)]
    places: list[tuple[int, int]] = [(0, 0)] * len(sizes)
    page, offset = 0, reserved
    while classes:
        remaining: list[tuple[int, Iterator[int], int]] = []
        for size, indices, count in classes:
            fit = min(count, (page_bytes - offset) // size)
            for index in islice(indices, fit):
                places[index] = (page, offset)
                offset += size
            if count > fit:
                remaining.append((size, indices, count - fit))
        classes = remaining
        if classes:
            page, offset = page + 1, 0
    return places, page + 1


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _floor_power_of_two(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)
