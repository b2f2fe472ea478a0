"""Which adapter versions are in the pool, on which pages, and who uses them. Integers and digests only."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ResidentAdapter:
    """`directory` is the address that kernels start from; `max_rank` bounds the adapter's ranks."""

    digest: str
    pages: tuple[int, ...]
    directory: int
    max_rank: int


@dataclass(frozen=True, kw_only=True)
class AdapterInput:
    """A resident adapter as a step uses it: `directory` is its address in the pool, in units of 128 bytes."""

    directory: int
    max_rank: int
    scale: float


class Residency:
    """Adapters that have pages; loaded ones have their weights in them. Idle ones, loaded and pinned by no running
    request, stand in least-recently-used order.

    Owned by the engine's thread. `now` is any number that never falls.
    """

    def __init__(self) -> None:
        self._adapters: dict[str, ResidentAdapter] = {}
        self._pins: dict[str, int] = {}
        self._loading: set[str] = set()
        self._idle: OrderedDict[str, int] = OrderedDict()

    def __contains__(self, digest: object) -> bool:
        return digest in self._adapters

    def __getitem__(self, digest: str) -> ResidentAdapter:
        return self._adapters[digest]

    def __iter__(self) -> Iterator[ResidentAdapter]:
        return iter(self._adapters.values())

    def add(self, adapter: ResidentAdapter) -> None:
        """An adapter whose weights are on their way to its pages."""
        assert adapter.digest not in self._adapters, f"{adapter.digest} is resident already"
        self._adapters[adapter.digest] = adapter
        self._pins[adapter.digest] = 0
        self._loading.add(adapter.digest)

    def loaded(self, digest: str, now: int) -> None:
        """They have arrived."""
        self._loading.remove(digest)
        if not self._pins[digest]:
            self._idle[digest] = now

    def is_loaded(self, digest: str) -> bool:
        return digest in self._adapters and digest not in self._loading

    def remove(self, digest: str) -> ResidentAdapter:
        """Forget an idle adapter; its pages are the caller's to retire."""
        assert not self._pins[digest], f"{digest} is in use"
        del self._pins[digest], self._idle[digest]
        return self._adapters.pop(digest)

    def pin(self, digest: str) -> None:
        self._pins[digest] += 1
        self._idle.pop(digest, None)

    def unpin(self, digest: str, now: int) -> None:
        assert self._pins[digest] > 0, f"{digest} is not pinned"
        self._pins[digest] -= 1
        if not self._pins[digest] and digest not in self._loading:
            self._idle[digest] = now

    def pins(self, digest: str) -> int:
        return self._pins[digest]

    @property
    def num_pins(self) -> int:
        return sum(self._pins.values())

    def idle(self) -> Iterator[tuple[ResidentAdapter, int]]:
        """(adapter, when it became idle), least recently used first."""
        return ((self._adapters[digest], now) for digest, now in self._idle.items())

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self._adapters.keys() == self._pins.keys(), "pins and adapters differ"
        assert self._loading <= self._adapters.keys(), "an adapter without pages is loading"
        unpinned = {digest for digest, pins in self._pins.items() if not pins}
        assert set(self._idle) == unpinned - self._loading, "idle set is stale"
        assert all(pins >= 0 for pins in self._pins.values()), "negative pins"
        pages = [page for adapter in self for page in adapter.pages]
        assert len(pages) == len(set(pages)), "two adapters share a page"
