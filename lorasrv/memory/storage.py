"""The pool's bytes on the device: one buffer, its views, and the copies into it.

Which page belongs to whom is accounted elsewhere; nothing here hands out or takes back a page.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorasrv.errors import ConfigurationError
from lorasrv.memory.arena import HostArena
from lorasrv.memory.casts import Array
from lorasrv.memory.layout import ALIGN_BYTES, PageLayout
from lorasrv.memory.packing import PackedAdapter

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


@dataclass(kw_only=True)
class AdapterCopy:
    """A copy to the device, made in slices: `num_issued` of its pages are on their way or there. It keeps what it
    reads. `directory` is the adapter's address there. Owned by the engine's thread.
    """

    adapter: PackedAdapter
    pages: tuple[int, ...]
    directory: int
    num_issued: int = 0
    fields: Tensor | None = None  # uint8: the directory's bytes
    event: torch.Event | None = None

    @property
    def issued(self) -> bool:
        return self.num_issued == len(self.pages)

    @property
    def ended(self) -> bool:
        return self.issued and (self.event is None or self.event.query())


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

    @property
    def beside_steps(self) -> bool:
        """Whether copies run beside the steps; elsewhere they are made when they are issued."""
        return self._copies is not None

    def directory_address(self, pages: Sequence[int]) -> int:
        """The address, in units of 128 bytes, of the directory of an adapter that lies in `pages`."""
        return pages[0] * self.layout.page_bytes // ALIGN_BYTES

    def begin_adapter(self, adapter: PackedAdapter, pages: Sequence[int], *, wait_for_steps: bool) -> AdapterCopy:
        """A copy of an adapter's pages into `pages`, in any order and place; `advance` makes it.

        On a GPU it runs beside the steps; with `wait_for_steps` it begins behind those submitted by now.
        """
        assert len(pages) == adapter.num_pages == len(set(pages)), (pages, adapter.num_pages)
        assert all(0 <= page < self.num_pages for page in pages), (pages, self.num_pages)
        if self._copies is not None and wait_for_steps:
            self._copies.wait_stream(torch.cuda.current_stream(self.bytes.device))
        return AdapterCopy(adapter=adapter, pages=tuple(pages), directory=self.directory_address(pages))

    def advance(self, copy: AdapterCopy, max_bytes: int) -> int:
        """Issue the next pages of a copy, as many as begin within `max_bytes`, and return their bytes."""
        page_bytes = self.layout.page_bytes
        end = min(len(copy.pages), copy.num_issued - (-max_bytes // page_bytes))
        slices = range(copy.num_issued, end)
        if self._copies is None:
            self._move(copy, slices)
            return len(slices) * page_bytes
        with torch.cuda.stream(self._copies):
            for local in slices:
                source = _tensor(copy.adapter.pages[copy.adapter.places[local]])
                self.pages[copy.pages[local]].copy_(source, non_blocking=True)
                if local == 0:
                    self._write_directory(copy)
            copy.num_issued = end
            if copy.issued:
                copy.event = self._copies.record_event()
        return len(slices) * page_bytes

    def _move(self, copy: AdapterCopy, slices: range) -> None:
        """Within the host's memory, where a tensor's copy costs more than the bytes of a small page."""
        page_bytes = self.layout.page_bytes
        assert copy.adapter.pages.flags.c_contiguous, "an image's pages have gaps"
        source, target = copy.adapter.pages.ctypes.data, self.bytes.data_ptr()
        for local in slices:
            from_byte, to_byte = copy.adapter.places[local] * page_bytes, copy.pages[local] * page_bytes
            ctypes.memmove(target + to_byte, source + from_byte, page_bytes)
            if local == 0:
                self._write_directory(copy)
        copy.num_issued = slices.stop

    def write_adapter(self, adapter: PackedAdapter, pages: Sequence[int], *, wait_for_steps: bool) -> AdapterCopy:
        """The same at once."""
        copy = self.begin_adapter(adapter, pages, wait_for_steps=wait_for_steps)
        self.advance(copy, adapter.nbytes)
        return copy

    def _write_directory(self, copy: AdapterCopy) -> None:
        """Over the one in the first page, whose addresses are the adapter's own."""
        fields = _tensor(copy.adapter.directory(copy.pages)).view(torch.uint8)
        copy.fields = fields.pin_memory() if self._copies is not None else fields
        self.pages[copy.pages[0], : fields.numel()].copy_(copy.fields, non_blocking=True)

    def copy_page(self, source: int, target: int) -> None:
        """In the steps' order."""
        self.pages[target].copy_(self.pages[source])

    def check(self) -> None:
        """Raise AssertionError unless the views cover the buffer."""
        assert self.bytes.numel() == (self.num_pages + 1) * self.layout.page_bytes, (self.bytes.shape, self.num_pages)
        assert self.kv.nbytes == self.bytes.nbytes, (self.kv.shape, self.bytes.shape)
        assert self.kv.data_ptr() == self.bytes.data_ptr()


def pinned_pages(num_pages: int, page_bytes: int) -> Array:  # uint8 [num_pages, page_bytes]
    """Memory of this process that a GPU copies from beside its steps."""
    return torch.empty(num_pages, page_bytes, dtype=torch.uint8, pin_memory=True).numpy()


class PinnedArena(HostArena):
    """An arena that a GPU copies from beside its steps. All of it is backed by real memory from the start.

    Raises ConfigurationError when the driver cannot pin so much.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        super().__init__(num_pages, page_bytes)
        self._is_pinned = False
        self._runtime = cast(Any, torch.cuda.cudart())
        code = int(self._runtime.cudaHostRegister(self.pages.ctypes.data, self.pages.nbytes, _PORTABLE))
        if code:
            self.close()
            raise ConfigurationError(f"{self.pages.nbytes} bytes of host memory cannot be pinned: CUDA error {code}")
        self._is_pinned = True

    def close(self) -> None:
        """Waits for the copies that the device has begun."""
        if self._is_pinned:
            torch.cuda.synchronize()
            self._runtime.cudaHostUnregister(self.pages.ctypes.data)
        super().close()


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]
