"""An adapter's matrices cut to tiles and laid out in pages on the host: the image that is copied to the pool.

`memory.layout` decides where every tile lies; this is its tensors' half. What the directory means to a reader is
stated in `lorasrv_kernels.reference`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.layout import (
    ALIGN_BYTES,
    DIRECTORY_FIELDS,
    TILE_ROWS,
    AdapterImage,
    MatrixShape,
    PageLayout,
    adapter_image,
    chunk_cols,
)
from lorasrv_kernels.tiles import Matrix, Module


@dataclass(frozen=True, kw_only=True)
class PackedModule:
    """One targeted module of one layer; `module` is its index in directory order."""

    layer: int
    module: int
    rank: int
    scale: float
    a: Tensor  # [rank, in_features]
    b: Tensor  # [out_features, rank]


@dataclass(frozen=True, kw_only=True)
class PackedAdapter:
    """An adapter as pages on the host. Only the directory's tile addresses depend on where the pages will land."""

    image: Tensor  # uint8 [num_pages, page_bytes]; the directory's place in page 0 is left zero
    headers: Tensor  # int32 [num_layers * num_modules * DIRECTORY_FIELDS]
    tile_pages: Tensor  # int64 [num_tiles], numbered from 0 within the adapter
    tile_offsets: Tensor  # int64 [num_tiles], bytes within the page
    max_rank: int

    @property
    def num_pages(self) -> int:
        return self.image.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.image, self.headers, self.tile_pages, self.tile_offsets))

    def directory(self, pages: Tensor) -> Tensor:
        """int32: the directory for an adapter whose local page i is page `pages[i]` (int64) of the pool."""
        addresses = (pages[self.tile_pages] * self.image.shape[1] + self.tile_offsets) // ALIGN_BYTES
        return torch.cat((self.headers, addresses.to(torch.int32)))


def module_geometry(layout: PageLayout, module_shapes: Iterable[tuple[str, int, int]]) -> tuple[Module, ...]:
    """How each module's matrices are cut, for the kernels; `module_shapes` is (path, in_features, out_features)."""

    def matrix(cols: int) -> Matrix:
        full, odd = (chunk_cols(cols, rows, layout.page_bytes, layout.itemsize) for rows in (TILE_ROWS, TILE_ROWS - 1))
        return Matrix(cols=cols, chunk=full, odd_chunk=odd)

    return tuple(
        Module(index=index, a=matrix(in_features), b=matrix(out_features))
        for index, (_, in_features, out_features) in enumerate(module_shapes)
    )


def pack_adapter(
    modules: Iterable[PackedModule],
    layout: PageLayout,
    module_shapes: tuple[tuple[str, int, int], ...],
    dtype: torch.dtype,
    *,
    pinned: bool = False,
) -> PackedAdapter:
    """Cast to the serving dtype, transpose B, cut and place; values are otherwise untouched.

    Raises AdapterLoadFailed when the adapter's directory does not fit a page.
    """
    ordered = sorted(modules, key=lambda m: (m.layer, m.module))
    for module in ordered:
        _check_shapes(module, module_shapes)
    num_headers = layout.num_layers * len(module_shapes)
    shapes = [MatrixShape(rank=m.rank, cols=cols) for m in ordered for cols in (m.a.shape[1], m.b.shape[0])]
    placed = adapter_image(shapes, num_headers, layout.page_bytes, dtype.itemsize)
    if placed is None:
        raise AdapterLoadFailed(f"the adapter's tile directory exceeds a page of {layout.page_bytes} bytes")
    return PackedAdapter(
        image=_fill_pages(ordered, placed, layout, dtype, pinned),
        headers=_headers(ordered, placed, num_headers, len(module_shapes)),
        tile_pages=torch.tensor([tile.local_page for tile in placed.tiles], dtype=torch.int64),
        tile_offsets=torch.tensor([tile.offset_bytes for tile in placed.tiles], dtype=torch.int64),
        max_rank=max((m.rank for m in ordered), default=0),
    )


def _check_shapes(module: PackedModule, module_shapes: tuple[tuple[str, int, int], ...]) -> None:
    _, in_features, out_features = module_shapes[module.module]
    assert module.a.shape == (module.rank, in_features), (module.layer, module.module, module.a.shape)
    assert module.b.shape == (out_features, module.rank), (module.layer, module.module, module.b.shape)


def _fill_pages(
    modules: list[PackedModule], placed: AdapterImage, layout: PageLayout, dtype: torch.dtype, pinned: bool
) -> Tensor:
    image = torch.zeros(placed.num_pages, layout.page_bytes, dtype=torch.uint8, pin_memory=pinned)
    elems = image.view(-1).view(dtype)
    bounds = (*placed.first_tile, len(placed.tiles))
    matrices = (matrix for module in modules for matrix in (module.a, module.b.T))
    for index, matrix in enumerate(matrices):
        values = matrix.to(dtype)
        for tile in placed.tiles[bounds[index] : bounds[index + 1]]:
            begin = (tile.local_page * layout.page_bytes + tile.offset_bytes) // dtype.itemsize
            target = elems[begin : begin + tile.num_rows * tile.num_cols].view(tile.num_rows, tile.num_cols)
            target.copy_(values[tile.row : tile.row + tile.num_rows, tile.col : tile.col + tile.num_cols])
    return image


def _headers(modules: list[PackedModule], placed: AdapterImage, num_headers: int, num_modules: int) -> Tensor:
    headers = torch.zeros(num_headers, DIRECTORY_FIELDS, dtype=torch.int32)
    first_address = num_headers * DIRECTORY_FIELDS
    for index, module in enumerate(modules):
        header = headers[module.layer * num_modules + module.module]
        first_a, first_b = placed.first_tile[2 * index : 2 * index + 2]
        header[:3] = torch.tensor([module.rank, first_address + first_a, first_address + first_b])
        header[3:].view(torch.float32).fill_(module.scale)
    return headers.view(-1)
