"""The pool's bytes on the device: one buffer, its views, and the copies into it.

Which page belongs to whom is accounted elsewhere; nothing here hands out or takes back a page.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv.errors import ConfigurationError
from lorasrv.memory.layout import ALIGN_BYTES, PageLayout
from lorasrv.memory.packing import PackedAdapter


class PageStorage:
    """`num_pages` pages in one allocation. Owned by the engine's thread.

    Raises ConfigurationError when an int32 address in units of 128 bytes cannot reach the last page.
    """

    def __init__(self, layout: PageLayout, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        assert layout.itemsize == dtype.itemsize, (layout.itemsize, dtype)
        num_bytes, limit = num_pages * layout.page_bytes, ALIGN_BYTES << 31
        if num_bytes > limit:
            raise ConfigurationError(f"a pool of {num_bytes} bytes is over the limit of {limit}")
        self.layout = layout
        self.num_pages = num_pages
        self.bytes: Tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=device)  # [num_pages * page_bytes]
        self.pages: Tensor = self.bytes.view(num_pages, layout.page_bytes)
        self.kv: Tensor = self.bytes.view(dtype).view(  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
            num_pages, layout.num_layers, 2, layout.block_tokens, layout.num_kv_heads, layout.head_dim
        )

    def directory_address(self, pages: Sequence[int]) -> int:
        """The address, in units of 128 bytes, of the directory of an adapter that lies in `pages`."""
        return pages[0] * self.layout.page_bytes // ALIGN_BYTES

    def write_adapter(self, adapter: PackedAdapter, pages: Sequence[int]) -> int:
        """Copy an adapter's pages into `pages`, in any order and place, and return its directory's address."""
        assert len(pages) == adapter.num_pages == len(set(pages)), (pages, adapter.num_pages)
        assert all(0 <= page < self.num_pages for page in pages), (pages, self.num_pages)
        for local, page in enumerate(pages):
            self.pages[page].copy_(adapter.image[local], non_blocking=True)
        directory = adapter.directory(torch.tensor(pages, dtype=torch.int64)).view(torch.uint8)
        self.pages[pages[0], : directory.numel()].copy_(directory)
        return self.directory_address(pages)

    def check(self) -> None:
        """Raise AssertionError unless the views cover the buffer."""
        assert self.bytes.numel() == self.num_pages * self.layout.page_bytes, (self.bytes.shape, self.num_pages)
        assert self.kv.nbytes == self.bytes.nbytes, (self.kv.shape, self.bytes.shape)
        assert self.kv.data_ptr() == self.bytes.data_ptr()
