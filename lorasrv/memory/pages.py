"""The free list: every page of the device pool has one owner or is free. Integers only.

This is the only code that hands out or takes back pages.

Steps run in the order in which they are submitted, so a page that is given back while a step that reads it is still in
flight may be written by any later step at once. A writer outside that order (a copy from the host) must first wait for
the page's readers: `last_reader` names the step.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from lorasrv.types import PoolStats


class OwnerKind(StrEnum):
    SEQUENCE = "sequence"
    PREFIX = "prefix"
    ADAPTER = "adapter"


class Owner(NamedTuple):
    kind: OwnerKind
    owner_id: str


class PagePool:
    """Pages `0 .. num_pages - 1`. Owned by the engine's thread."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: list[Owner | None] = [None] * num_pages
        self._last_readers = [0] * num_pages
        self._num_owned = dict.fromkeys(OwnerKind, 0)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, count: int, owner: Owner) -> list[int]:
        """Take `count` free pages. The planner asked `num_free` first, so running short is a defect."""
        assert count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = owner
        self._num_owned[owner.kind] += count
        return pages

    def transfer(self, pages: Sequence[int], owner: Owner, to: Owner) -> None:
        """Change pages' owner, their content staying as it is."""
        owners = self._owners
        for page in pages:
            assert owners[page] == owner, f"page {page} belongs to {owners[page]}, not {owner}"
            owners[page] = to
        self._num_owned[owner.kind] -= len(pages)
        self._num_owned[to.kind] += len(pages)

    def retire(self, pages: Sequence[int], owner: Owner, last_reader: int) -> None:
        """Give back `owner`'s pages, which steps up to `last_reader` may read or write."""
        owners, last_readers = self._owners, self._last_readers
        for page in pages:
            assert owners[page] == owner, f"page {page} belongs to {owners[page]}, not {owner}"
            owners[page] = None
            last_readers[page] = last_reader
        self._num_owned[owner.kind] -= len(pages)
        self._free.extend(pages)

    def last_reader(self, pages: Sequence[int]) -> int:
        """The last step that may touch what these pages held before; 0 where no step ever did."""
        return max((self._last_readers[page] for page in pages), default=0)

    def owner(self, page: int) -> Owner | None:
        return self._owners[page]

    def stats(self) -> PoolStats:
        return PoolStats(
            num_pages=self.num_pages,
            free=self.num_free,
            sequences=self._num_owned[OwnerKind.SEQUENCE],
            prefix=self._num_owned[OwnerKind.PREFIX],
            adapters=self._num_owned[OwnerKind.ADAPTER],
        )

    def check(self) -> None:
        """Raise AssertionError unless every page is either free or owned, and counted."""
        owned = [page for page, owner in enumerate(self._owners) if owner is not None]
        assert sorted([*self._free, *owned]) == list(range(self.num_pages)), "a page is lost or held twice"
        for kind in OwnerKind:
            count = sum(1 for owner in self._owners if owner is not None and owner.kind is kind)
            assert count == self._num_owned[kind], f"{kind} pages: {count} owned, {self._num_owned[kind]} counted"
