"""An adapter's matrices cut to tiles and laid out in pages on the host: the image that is copied to the pool.

`memory.layout` decides where every tile lies; this fills the pages. What the directory means to a reader is stated in
`lorasrv_kernels.reference`. Knows numpy and no torch: images are built in processes that start fast and stay small.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.casts import Array, cast
from lorasrv.memory.layout import ALIGN_BYTES, DIRECTORY_FIELDS, AdapterImage, MatrixShape, PageLayout
from lorasrv.memory.strips import Filling, Strip, filling

ModuleShapes = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """One targeted module of one layer; `module` is its index in directory order."""

    layer: int
    module: int
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """How an adapter's modules, in directory order, come to lie in its pages."""

    modules: tuple[LoraModule, ...]
    filling: Filling
    layout: PageLayout
    module_shapes: ModuleShapes

    @property
    def placed(self) -> AdapterImage:
        return self.filling.image

    @property
    def num_pages(self) -> int:
        return self.placed.num_pages

    @property
    def num_headers(self) -> int:
        return self.layout.num_layers * len(self.module_shapes)

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.modules), default=0)


@dataclass(frozen=True, kw_only=True)
class PackedAdapter:
    """An adapter as pages on the host: rows `places` of `pages`, in order. Its directory stands in the first; there,
    addresses of tiles are as if page i of the adapter were page i of the pool.
    """

    pages: Array  # uint8 [any, page_bytes]
    places: tuple[int, ...]
    num_headers: int
    num_tiles: int
    max_rank: int

    @property
    def num_pages(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.pages.shape[1]

    @property
    def headers(self) -> Array:  # int32 [num_headers, DIRECTORY_FIELDS]
        return self._directory[: self.num_headers * DIRECTORY_FIELDS].reshape(-1, DIRECTORY_FIELDS)

    @property
    def tile_addresses(self) -> Array:  # int32 [num_tiles]
        return self._directory[self.num_headers * DIRECTORY_FIELDS :]

    def directory(self, targets: Sequence[int]) -> Array:
        """int32: the directory for an adapter whose page i is page `targets[i]` of the pool."""
        found = self._directory.copy()
        page_units = self.pages.shape[1] // ALIGN_BYTES
        local_pages, offsets = np.divmod(self.tile_addresses.astype(np.int64), page_units)
        found[self.num_headers * DIRECTORY_FIELDS :] = np.array(targets)[local_pages] * page_units + offsets
        return found

    @property
    def _directory(self) -> Array:
        num_fields = self.num_headers * DIRECTORY_FIELDS + self.num_tiles
        return self.pages[self.places[0], : 4 * num_fields].view(np.int32)


def plan_adapter(modules: Iterable[LoraModule], layout: PageLayout, module_shapes: ModuleShapes) -> AdapterPlan:
    """`module_shapes` is (path, in_features, out_features) in directory order. Raises AdapterLoadFailed when the
    adapter's directory does not fit a page."""
    ordered = tuple(sorted(modules, key=lambda m: (m.layer, m.module)))
    shapes = tuple(MatrixShape(rank=m.rank, cols=cols) for m in ordered for cols in module_shapes[m.module][1:])
    found = filling(shapes, layout.num_layers * len(module_shapes), layout.page_bytes, layout.itemsize)
    if found is None:
        raise AdapterLoadFailed(f"the adapter's tile directory exceeds a page of {layout.page_bytes} bytes")
    return AdapterPlan(modules=ordered, filling=found, layout=layout, module_shapes=module_shapes)


def fill_pages(
    plan: AdapterPlan,
    matrices: Iterable[tuple[Array, Array]],  # A [rank, in_features], B [out_features, rank] of each module, in order
    pages: Array,  # uint8 [any, page_bytes]
    places: Sequence[int],
) -> PackedAdapter:
    """Cast to the serving type, which is float32 or bfloat16 by its size, transpose B, cut and place, into the rows
    `places` of `pages`. Values are otherwise untouched; what nothing is placed in is zero.
    """
    assert len(places) == plan.num_pages, (places, plan.num_pages)
    for page, begin, end in plan.filling.gaps:
        pages[places[page], begin:end] = 0
    for index, (module, pair) in enumerate(zip(plan.modules, matrices, strict=True)):
        _, in_features, out_features = plan.module_shapes[module.module]
        a, b = pair
        assert a.shape == (module.rank, in_features), (module, a.shape)
        assert b.shape == (out_features, module.rank), (module, b.shape)
        for number, matrix in ((2 * index, a), (2 * index + 1, b.T)):
            for strip in plan.filling.strips[number]:
                _place(_cut(matrix, strip, plan.layout.itemsize), strip, pages, places)
    _write_directory(plan, pages[places[0]])
    return PackedAdapter(
        pages=pages,
        places=tuple(places),
        num_headers=plan.num_headers,
        num_tiles=len(plan.placed.tiles),
        max_rank=plan.max_rank,
    )


def _cut(
    matrix: Array,  # [rank, cols]
    strip: Strip,
    itemsize: int,
) -> Array:  # uint8 [num_tiles, bytes of a tile]
    blocks, rows, chunks, cols = strip.num_blocks, strip.num_rows, strip.num_chunks, strip.num_cols
    part = matrix[strip.row : strip.row + blocks * rows, strip.col : strip.col + chunks * cols]
    tiles = part.reshape(blocks, rows, chunks, cols).transpose(0, 2, 1, 3)
    return cast(np.ascontiguousarray(tiles), itemsize).reshape(blocks * chunks, rows * cols).view(np.uint8)


def _place(
    tiles: Array,  # uint8 [num_tiles, bytes of a tile]
    strip: Strip,
    pages: Array,  # uint8 [any, page_bytes]
    places: Sequence[int],
) -> None:
    for move in strip.moves:
        moved = tiles[move.first : move.first + move.num_tiles].reshape(-1)
        pages[places[move.local_page], move.offset_bytes : move.offset_bytes + moved.size] = moved


def _write_directory(
    plan: AdapterPlan,
    page: Array,  # uint8 [page_bytes], of zeros where the directory is to stand
) -> None:
    fields = page[: plan.placed.directory_bytes].view(np.int32)
    first_address = plan.num_headers * DIRECTORY_FIELDS
    headers = fields[:first_address].reshape(-1, DIRECTORY_FIELDS)
    for index, module in enumerate(plan.modules):
        header = headers[module.layer * len(plan.module_shapes) + module.module]
        first_a, first_b = plan.placed.first_tile[2 * index : 2 * index + 2]
        header[:3] = (module.rank, first_address + first_a, first_address + first_b)
        header[3:].view(np.float32)[:] = module.scale
    addresses = plan.filling.addresses
    fields[first_address : first_address + len(addresses)] = addresses
