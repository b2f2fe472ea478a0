"""Adapters of random values, laid into a pool without the host ever holding them.

All of the pool is filled with random numbers on the device, and adapters of one rank differ only in the pages that
they own: packing one tells the directory of every other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv.memory.layout import MatrixShape, PageLayout, cut_matrix
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.tensors import PackedModule, pack_adapter
from lorasrv_bench.gpu_models import ModelShape
from lorasrv_kernels.tiles import ADDRESS_BYTES

BLOCK_TOKENS = 16
WEIGHT_STD = 0.02
DTYPE = torch.bfloat16


def page_layout(model: ModelShape, num_layers: int | None = None) -> PageLayout:
    return PageLayout(
        num_layers=model.num_layers if num_layers is None else num_layers,
        block_tokens=BLOCK_TOKENS,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        itemsize=DTYPE.itemsize,
    )


def fill_random(pages: Tensor, std: float, seed: int) -> None:
    """Normal bf16 values in all bytes of a uint8 tensor."""
    generator = torch.Generator(device=pages.device).manual_seed(seed)
    flat = pages.view(-1).view(DTYPE)
    # In parts, since the generator needs room of its own.
    for part in flat.split(1 << 28):
        part.normal_(0.0, std, generator=generator)


def adapter_form(
    model: ModelShape,
    layout: PageLayout,
    rank: int,
    modules: Sequence[int],
    num_layers: int,  # the first layers have it, the others are left alone
    scale: float = 1.0,
) -> PackedAdapter:
    """How an adapter of these modules lies in its pages; its values mean nothing."""
    nothing = torch.zeros(1, 1, dtype=DTYPE)
    return pack_adapter(
        [
            PackedModule(
                layer=layer,
                module=module,
                rank=rank,
                scale=scale,
                a=nothing.expand(rank, model.module_shapes[module][1]),
                b=nothing.expand(model.module_shapes[module][2], rank),
            )
            for layer in range(num_layers)
            for module in modules
        ],
        layout,
        model.module_shapes,
    )


@dataclass(frozen=True, kw_only=True)
class LaidAdapter:
    """An adapter's pages, and the address of its directory."""

    pages: tuple[int, ...]
    directory: int


def lay(pool: Tensor, page_bytes: int, form: PackedAdapter, pages: Sequence[int]) -> LaidAdapter:
    """Write the directory of an adapter that owns these pages; the rest of them is its weights as it stands."""
    directory = torch.from_numpy(form.directory(pages)).view(torch.uint8)  # pyright: ignore[reportUnknownMemberType]
    begin = pages[0] * page_bytes
    pool[begin : begin + directory.numel()].copy_(directory)
    return LaidAdapter(pages=tuple(pages), directory=begin // ADDRESS_BYTES)


def dense_matrices(
    pool: Tensor,  # uint8 [num_bytes]
    page_bytes: int,
    form: PackedAdapter,
    adapters: Sequence[LaidAdapter],
    layer: int,
    module: int,
    module_shapes: Sequence[tuple[str, int, int]],
) -> tuple[Tensor, Tensor]:  # A [len(adapters), rank, in_features], B transposed [len(adapters), rank, out_features]
    """A module's matrices of every adapter, gathered from their tiles, for those who want each in one piece."""
    header = form.headers[layer * len(module_shapes) + module]
    rank, first_a, first_b, _ = header.tolist()
    _, num_in, num_out = module_shapes[module]

    def gather(first_address: int, cols: int) -> Tensor:
        elems = pool.view(DTYPE)
        dense = torch.empty(len(adapters), rank, cols, dtype=DTYPE, device=pool.device)
        cuts = cut_matrix(0, MatrixShape(rank=rank, cols=cols), page_bytes, DTYPE.itemsize)
        for index, (_, row, num_rows, col, num_cols) in enumerate(cuts, start=first_address - form.headers.size):
            local, offset = divmod(int(form.tile_addresses[index]) * ADDRESS_BYTES, page_bytes)
            starts = torch.tensor([(a.pages[local] * page_bytes + offset) // DTYPE.itemsize for a in adapters])
            places = starts.to(pool.device)[:, None] + torch.arange(num_rows * num_cols, device=pool.device)
            dense[:, row : row + num_rows, col : col + num_cols] = elems[places].view(-1, num_rows, num_cols)
        return dense

    return gather(first_a, num_in), gather(first_b, num_out)
