"""The pool's bytes on the device: one buffer, its views, and the copies into it.

Which page belongs to whom is accounted elsewhere; nothing here hands out or takes back a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv.errors import ConfigurationError
from lorasrv.memory.layout import ALIGN_BYTES, PageLayout
from lorasrv.memory.packing import PackedAdapter


@dataclass(frozen=True, kw_only=True)
class AdapterCopy:
    """A copy to the device that may still run, and keeps what it reads. `directory` is the adapter's address there."""

    directory: int
    sources: tuple[Tensor, ...]
    event: torch.Event | None

    @property
    def ended(self) -> bool:
        return self.event is None or self.event.query()


class PageStorage:
    """`num_pages` pages in one allocation, and behind them a scratch page that nobody owns: rows which only fill up a
    step leave their KV there. Owned by the engine's thread.

    Raises ConfigurationError when an int32 address in units of 128 bytes cannot reach the last page.
    """

    def __init__(self, layout: PageLayout, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        assert layout.itemsize == dtype.itemsize, (layout.itemsize, dtype)
        num_bytes, limit = (num_pages + 1) * layout.page_bytes, ALIGN_BYTES << 31
        if num_bytes > limit:
            raise ConfigurationError(f"a pool of {num_bytes} bytes is over the limit of {limit}")
        self.layout = layout
        self.num_pages = num_pages
        self.scratch_page = num_pages
        self.bytes: Tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=device)  # [all pages' bytes]
        self.pages: Tensor = self.bytes.view(-1, layout.page_bytes)
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)
            # No copy is to be overwritten by the zeros.
            self._copies.wait_stream(torch.cuda.current_stream(device))
        self.kv: Tensor = self.bytes.view(dtype).view(  # [all pages, layers, 2, block_tokens, kv_heads, head_dim]
            -1, layout.num_layers, 2, layout.block_tokens, layout.num_kv_heads, layout.head_dim
        )

    def directory_address(self, pages: Sequence[int]) -> int:
        """The address, in units of 128 bytes, of the directory of an adapter that lies in `pages`."""
        return pages[0] * self.layout.page_bytes // ALIGN_BYTES

    def write_adapter(self, adapter: PackedAdapter, pages: Sequence[int], *, wait_for_steps: bool) -> AdapterCopy:
        """Begin to copy an adapter's pages into `pages`, in any order and place.

        On a GPU the copy runs beside the steps; with `wait_for_steps` it begins behind those submitted by now.
        """
        assert len(pages) == adapter.num_pages == len(set(pages)), (pages, adapter.num_pages)
        assert all(0 <= page < self.num_pages for page in pages), (pages, self.num_pages)
        if self._copies is not None and wait_for_steps:
            self._copies.wait_stream(torch.cuda.current_stream(self.bytes.device))
        with torch.cuda.stream(self._copies):
            for local, page in enumerate(pages):
                self.pages[page].copy_(adapter.image[local], non_blocking=True)
            directory = adapter.directory(torch.tensor(pages, dtype=torch.int64)).view(torch.uint8)
            if self._copies is not None:
                directory = directory.pin_memory()
            self.pages[pages[0], : directory.numel()].copy_(directory, non_blocking=True)
        return AdapterCopy(
            directory=self.directory_address(pages),
            sources=(adapter.image, directory),
            event=None if self._copies is None else self._copies.record_event(),
        )

    def copy_page(self, source: int, target: int) -> None:
        """In the steps' order."""
        self.pages[target].copy_(self.pages[source])

    def check(self) -> None:
        """Raise AssertionError unless the views cover the buffer."""
        assert self.bytes.numel() == (self.num_pages + 1) * self.layout.page_bytes, (self.bytes.shape, self.num_pages)
        assert self.kv.nbytes == self.bytes.nbytes, (self.kv.shape, self.bytes.shape)
        assert self.kv.data_ptr() == self.bytes.data_ptr()
