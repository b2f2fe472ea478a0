"""Packing as tensors see it: how modules' matrices are cut, for the kernels, and adapters that are tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorasrv.memory.casts import Array
from lorasrv.memory.layout import TILE_ROWS, PageLayout, chunk_cols
from lorasrv.memory.packing import LoraModule, ModuleShapes, PackedAdapter, fill_pages, plan_adapter
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


def module_geometry(layout: PageLayout, module_shapes: Iterable[tuple[str, int, int]]) -> tuple[Module, ...]:
    """How each module's matrices are cut, for the kernels; `module_shapes` is (path, in_features, out_features)."""

    def matrix(cols: int) -> Matrix:
        full, odd = (chunk_cols(cols, rows, layout.page_bytes, layout.itemsize) for rows in (TILE_ROWS, TILE_ROWS - 1))
        return Matrix(cols=cols, chunk=full, odd_chunk=odd)

    return tuple(
        Module(index=index, a=matrix(in_features), b=matrix(out_features))
        for index, (_, in_features, out_features) in enumerate(module_shapes)
    )


def pack_adapter(modules: Iterable[PackedModule], layout: PageLayout, module_shapes: ModuleShapes) -> PackedAdapter:
    """An adapter that is tensors, in pages of its own. Raises AdapterLoadFailed as `packing.plan_adapter` does."""
    ordered = sorted(modules, key=lambda m: (m.layer, m.module))
    shapes = (LoraModule(layer=m.layer, module=m.module, rank=m.rank, scale=m.scale) for m in ordered)
    plan = plan_adapter(shapes, layout, module_shapes)
    pages = np.empty((plan.num_pages, layout.page_bytes), np.uint8)
    return fill_pages(plan, ((_array(m.a), _array(m.b)) for m in ordered), pages, range(plan.num_pages))


def _array(values: Tensor) -> Array:
    """As `memory.casts` has it: bfloat16 by its bits."""
    return (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
