"""An adapter's matrices cut to tiles and laid out in pages on the host: the image that is copied to the pool.

`memory.layout` decides where every tile lies; this fills the pages. What the directory means to a reader is stated in
`lorasrv_kernels.reference`. Knows numpy and no torch: images are built in processes that start fast and stay small.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.casts import Array, cast
from lorasrv.memory.layout import (
    ALIGN_BYTES,
    DIRECTORY_FIELDS,
    AdapterImage,
    MatrixShape,
    PageLayout,
    adapter_image,
)

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
    placed: AdapterImage
    layout: PageLayout
    module_shapes: ModuleShapes

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
    shapes = [MatrixShape(rank=m.rank, cols=cols) for m in ordered for cols in module_shapes[m.module][1:]]
    placed = adapter_image(shapes, layout.num_layers * len(module_shapes), layout.page_bytes, layout.itemsize)
    if placed is None:
        raise AdapterLoadFailed(f"the adapter's tile directory exceeds a page of {layout.page_bytes} bytes")
    return AdapterPlan(modules=ordered, placed=placed, layout=layout, module_shapes=module_shapes)


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
    for place in places:
        pages[place] = 0
    placed, itemsize = plan.placed, plan.layout.itemsize
    bounds = (*placed.first_tile, len(placed.tiles))
    for index, (module, pair) in enumerate(zip(plan.modules, matrices, strict=True)):
        _, in_features, out_features = plan.module_shapes[module.module]
        a, b = pair
        assert a.shape == (module.rank, in_features), (module, a.shape)
        assert b.shape == (out_features, module.rank), (module, b.shape)
        for number, matrix in ((2 * index, a), (2 * index + 1, b.T)):
            values = cast(matrix, itemsize)
            for tile in placed.tiles[bounds[number] : bounds[number + 1]]:
                num_bytes = tile.num_rows * tile.num_cols * itemsize
                target = pages[places[tile.local_page], tile.offset_bytes : tile.offset_bytes + num_bytes]
                target.view(values.dtype).reshape(tile.num_rows, tile.num_cols)[:] = values[
                    tile.row : tile.row + tile.num_rows, tile.col : tile.col + tile.num_cols
                ]
    _write_directory(plan, pages[places[0]])
    return PackedAdapter(
        pages=pages,
        places=tuple(places),
        num_headers=plan.num_headers,
        num_tiles=len(placed.tiles),
        max_rank=plan.max_rank,
    )


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
    page_bytes = plan.layout.page_bytes
    addresses = [(tile.local_page * page_bytes + tile.offset_bytes) // ALIGN_BYTES for tile in plan.placed.tiles]
    fields[first_address : first_address + len(addresses)] = addresses
