"""The free list: every page of the device pool has one owner, is free, or retires. Integers only.

This is the only code that hands out or takes back pages.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lorasrv.types import PoolStats


class OwnerKind(StrEnum):
    SEQUENCE = "sequence"
    PREFIX = "prefix"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Owner:
    kind: OwnerKind
    owner_id: str


class PagePool:
    """Pages `0 .. num_pages - 1`. Owned by the engine's thread.

    A page given back is not free at once: a submitted step may still read it, so it retires until the step it names
    (the last one submitted) has completed.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners: list[Owner | None] = [None] * num_pages
        self._retiring: deque[tuple[int, tuple[int, ...]]] = deque()
        self._num_owned = dict.fromkeys(OwnerKind, 0)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_retiring(self) -> int:
        return sum(len(pages) for _, pages in self._retiring)

    def alloc(self, count: int, owner: Owner) -> list[int]:
        """Take `count` free pages. The planner asked `num_free` first, so running short is a defect."""
        assert count <= len(self._free), f"{count} pages asked, {len(self._free)} free"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = owner
        self._num_owned[owner.kind] += count
        return pages

    def transfer(self, page: int, owner: Owner, to: Owner) -> None:
        """Change a page's owner, its content staying as it is."""
        assert self._owners[page] == owner, f"page {page} belongs to {self._owners[page]}, not {owner}"
        self._owners[page] = to
        self._num_owned[owner.kind] -= 1
        self._num_owned[to.kind] += 1

    def retire(self, pages: Sequence[int], owner: Owner, last_step: int) -> None:
        """Give back `owner`'s pages; they are free once step `last_step` has completed."""
        for page in pages:
            assert self._owners[page] == owner, f"page {page} belongs to {self._owners[page]}, not {owner}"
            self._owners[page] = None
        self._num_owned[owner.kind] -= len(pages)
        self._retiring.append((last_step, tuple(pages)))

    def reclaim(self, completed_step: int) -> None:
        """Free what retired under steps up to `completed_step`."""
        while self._retiring and self._retiring[0][0] <= completed_step:
            self._free.extend(self._retiring.popleft()[1])

    def owner(self, page: int) -> Owner | None:
        return self._owners[page]

    def stats(self) -> PoolStats:
        return PoolStats(
            num_pages=self.num_pages,
            free=self.num_free,
            retiring=self.num_retiring,
            sequences=self._num_owned[OwnerKind.SEQUENCE],
            prefix=self._num_owned[OwnerKind.PREFIX],
            adapters=self._num_owned[OwnerKind.ADAPTER],
        )

    def check(self) -> None:
        """Raise AssertionError unless every page is exactly one of free, retiring and owned."""
        retiring = [page for _, pages in self._retiring for page in pages]
        owned = [page for page, owner in enumerate(self._owners) if owner is not None]
        assert sorted([*self._free, *retiring, *owned]) == list(range(self.num_pages)), "a page is lost or held twice"
        for kind in OwnerKind:
            count = sum(1 for owner in self._owners if owner is not None and owner.kind is kind)
            assert count == self._num_owned[kind], f"{kind} pages: {count} owned, {self._num_owned[kind]} counted"
        steps = [step for step, _ in self._retiring]
        assert steps == sorted(steps), "retiring pages out of order"
