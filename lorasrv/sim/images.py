"""Adapters as the simulator has them: how many pages and bytes, cut by the layout that production cuts them by."""

from dataclasses import dataclass

from lorasrv.errors import ConfigurationError
from lorasrv.memory.layout import MatrixShape, PageLayout, adapter_image
from lorasrv.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class SimImage:
    """A page image without bytes. `params` are its weights; a file holds as many."""

    num_pages: int
    page_bytes: int
    max_rank: int
    params: int

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.page_bytes


class Adapters:
    """The images of a workload's adapters, all modules targeted, by digest; equal ranks share one."""

    def __init__(self, shape: ModelShape, layout: PageLayout, ranks: tuple[int, ...]) -> None:
        """Adapter number i has `ranks[i % len(ranks)]`. Raises ConfigurationError where a page is too small for one."""
        self._ranks = ranks
        self._images = {rank: _image(shape, layout, rank) for rank in set(ranks)}

    def __getitem__(self, digest: str) -> SimImage:
        return self._images[self._ranks[int(digest) % len(self._ranks)]]


def page_layout(shape: ModelShape, block_tokens: int, itemsize: int) -> PageLayout:
    try:
        return PageLayout(
            num_layers=shape.num_layers,
            block_tokens=block_tokens,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            itemsize=itemsize,
        )
    except ValueError as error:
        raise ConfigurationError(f"model {shape.name}: {error}") from None


def _image(shape: ModelShape, layout: PageLayout, rank: int) -> SimImage:
    matrices = [
        MatrixShape(rank=rank, cols=cols) for _, num_in, num_out in shape.module_shapes for cols in (num_in, num_out)
    ] * shape.num_layers
    num_headers = shape.num_layers * len(shape.module_shapes)
    placed = adapter_image(matrices, num_headers, layout.page_bytes, layout.itemsize)
    if placed is None:
        raise ConfigurationError(
            f"an adapter of rank {rank} has a directory beyond a page of {layout.page_bytes} bytes"
        )
    return SimImage(
        num_pages=placed.num_pages,
        page_bytes=layout.page_bytes,
        max_rank=rank,
        params=shape.adapter_params(rank),
    )
