"""The host tier's memory: pages that several processes share. Images take any of them, in any order and place."""

import mmap
import os
from collections.abc import Sequence

import numpy as np

from lorasrv.memory.casts import Array


def map_pages(descriptor: int, num_pages: int, page_bytes: int) -> Array:  # uint8 [num_pages, page_bytes]
    """The pages of an arena, in whichever process has its file. Unmapped when nothing refers to the array any more."""
    mapped = mmap.mmap(descriptor, num_pages * page_bytes)
    return np.frombuffer(mapped, np.uint8).reshape(num_pages, page_bytes)


class HostArena:
    """`num_pages` pages of memory that takes up what has been written to, and a free list of them. Pages that were
    free last are given first, so that few are ever touched. Owned by one thread of the process that made it; other
    processes write to the pages that they are told, by the file `descriptor`.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.descriptor = os.memfd_create("lorasrv-host-tier")
        os.ftruncate(self.descriptor, num_pages * page_bytes)
        self.pages = map_pages(self.descriptor, num_pages, page_bytes)
        self._free = list(range(num_pages))[::-1]
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> frozenset[int]:
        return frozenset(self._used)

    def alloc(self, num_pages: int) -> tuple[int, ...] | None:
        """Pages, or None when so many are not free."""
        if num_pages > len(self._free):
            return None
        places = tuple(self._free.pop() for _ in range(num_pages))
        self._used.update(places)
        return places

    def free(self, places: Sequence[int]) -> None:
        assert self._used.issuperset(places) and len(set(places)) == len(places), places
        self._used.difference_update(places)
        self._free.extend(reversed(places))

    def check(self) -> None:
        """Raise AssertionError unless every page is free or in use."""
        assert sorted([*self._free, *self._used]) == list(range(len(self.pages))), "a host page is lost"

    def close(self) -> None:
        os.close(self.descriptor)
