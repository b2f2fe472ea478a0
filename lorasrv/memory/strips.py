"""How an adapter's image is filled in few moves: its tiles grouped into what numpy can cut and place at once.

Adapters of the same ranks and shapes are filled alike, whatever their weights: so this is worked out once for them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from lorasrv.memory.layout import ALIGN_BYTES, AdapterImage, MatrixShape, Tile, adapter_image


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Tiles `[first, first + num_tiles)` of a strip lie one behind the other from `offset_bytes` of a page."""

    first: int
    num_tiles: int
    local_page: int
    offset_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Strip:
    """A grid of tiles of one size, in their order: `num_blocks` row blocks from row `row`, each of `num_chunks` column
    chunks from column `col`."""

    row: int
    col: int
    num_blocks: int
    num_chunks: int
    num_rows: int
    num_cols: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, kw_only=True)
class Filling:
    """`strips` are each matrix's; `gaps` are (local page, begin, end) of bytes in which no tile lies;
    `addresses` are the tiles', in units of 128 bytes, as if page i of the adapter were page i of the pool."""

    image: AdapterImage
    strips: tuple[tuple[Strip, ...], ...]
    gaps: tuple[tuple[int, int, int], ...]
    addresses: tuple[int, ...]


@lru_cache(maxsize=64)
def filling(matrices: tuple[MatrixShape, ...], num_headers: int, page_bytes: int, itemsize: int) -> Filling | None:
    """None as `layout.adapter_image` says it."""
    image = adapter_image(matrices, num_headers, page_bytes, itemsize)
    if image is None:
        return None
    return Filling(
        image=image,
        strips=tuple(
            tuple(_strips(tiles, itemsize)) for _, tiles in groupby(image.tiles, key=lambda tile: tile.matrix)
        ),
        gaps=tuple(_gaps(image, page_bytes, itemsize)),
        addresses=tuple((tile.local_page * page_bytes + tile.offset_bytes) // ALIGN_BYTES for tile in image.tiles),
    )


def _strips(tiles: Iterable[Tile], itemsize: int) -> Iterator[Strip]:
    for _, alike in groupby(tiles, key=lambda tile: (tile.num_rows, tile.num_cols)):
        yield _strip(list(alike), itemsize)


def _strip(tiles: Sequence[Tile], itemsize: int) -> Strip:
    """Of neighbours in a matrix that have one size: whole row blocks, or the part of one that has this size."""
    first = tiles[0]
    num_chunks = sum(tile.row == first.row for tile in tiles)
    assert len(tiles) % num_chunks == 0, "row blocks of one size are cut alike"
    return Strip(
        row=first.row,
        col=first.col,
        num_blocks=len(tiles) // num_chunks,
        num_chunks=num_chunks,
        num_rows=first.num_rows,
        num_cols=first.num_cols,
        moves=tuple(_moves(tiles, first.num_rows * first.num_cols * itemsize)),
    )


def _moves(tiles: Sequence[Tile], tile_bytes: int) -> Iterator[Move]:
    begin = 0
    for end in range(1, len(tiles) + 1):
        before, behind = tiles[end - 1], tiles[end] if end < len(tiles) else None
        if behind is None or (behind.local_page, behind.offset_bytes) != (
            before.local_page,
            before.offset_bytes + tile_bytes,
        ):
            start = tiles[begin]
            yield Move(first=begin, num_tiles=end - begin, local_page=start.local_page, offset_bytes=start.offset_bytes)
            begin = end


def _gaps(image: AdapterImage, page_bytes: int, itemsize: int) -> Iterator[tuple[int, int, int]]:
    ends = [0] * image.num_pages
    for tile in sorted(image.tiles, key=lambda tile: (tile.local_page, tile.offset_bytes)):
        if tile.offset_bytes > ends[tile.local_page]:
            yield tile.local_page, ends[tile.local_page], tile.offset_bytes
        ends[tile.local_page] = tile.offset_bytes + tile.num_rows * tile.num_cols * itemsize
    yield from ((page, end, page_bytes) for page, end in enumerate(ends) if end < page_bytes)
