"""Which adapter versions are in the pool, on which pages, and who uses them. Integers and digests only."""

from collections.abc import Iterator
from dataclasses import dataclass

from lorasrv.memory.eviction import EvictionOrder, IdleAdapter
from lorasrv.memory.likelihood import Likelihood, Uses


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
    request, are in the eviction order. Owned by the engine's thread.
    """

    def __init__(self, order: EvictionOrder, likelihood: Likelihood) -> None:
        self._order = order
        self._likelihood = likelihood
        self._adapters: dict[str, ResidentAdapter] = {}
        self._pins: dict[str, int] = {}
        self._loading: set[str] = set()
        # Those that nobody has pinned yet.
        self._unused: set[str] = set()
        self._uses: dict[str, Uses] = {}

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
        self._unused.add(adapter.digest)
        self._uses[adapter.digest] = self._likelihood.first()

    def loaded(self, digest: str, cost_s: float) -> None:
        """They have arrived. `cost_s` is what bringing them back would cost, here and below."""
        self._loading.remove(digest)
        if not self._pins[digest]:
            self._add_idle(digest, cost_s)

    def is_loaded(self, digest: str) -> bool:
        return digest in self._adapters and digest not in self._loading

    def remove(self, digest: str) -> ResidentAdapter:
        """Forget an idle adapter; its pages are the caller's to retire."""
        assert not self._pins[digest], f"{digest} is in use"
        assert digest not in self._loading, f"{digest} is being loaded"
        del self._pins[digest], self._uses[digest]
        self._unused.discard(digest)
        self._order.discard(digest)
        return self._adapters.pop(digest)

    def pin(self, digest: str, *, again: bool = True) -> None:
        """For a running sequence; `again` says that this tells of further uses."""
        self._pins[digest] += 1
        self._order.discard(digest)
        if digest in self._unused:
            self._unused.remove(digest)
        elif again:
            self._likelihood.again(self._uses[digest])

    def unpin(self, digest: str, cost_s: float) -> None:
        assert self._pins[digest] > 0, f"{digest} is not pinned"
        self._pins[digest] -= 1
        if not self._pins[digest] and digest not in self._loading:
            self._add_idle(digest, cost_s)

    def pins(self, digest: str) -> int:
        return self._pins[digest]

    @property
    def num_pins(self) -> int:
        return sum(self._pins.values())

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self._adapters.keys() == self._pins.keys(), "pins and adapters differ"
        assert self._adapters.keys() == self._uses.keys() >= self._unused, "uses and adapters differ"
        assert self._loading <= self._adapters.keys(), "an adapter without pages is loading"
        idle = {digest for digest, pins in self._pins.items() if not pins} - self._loading
        assert idle == {each.digest for each in self._order if isinstance(each, IdleAdapter)}, "idle set is stale"
        assert all(pins >= 0 for pins in self._pins.values()), "negative pins"
        pages = [page for adapter in self for page in adapter.pages]
        assert len(pages) == len(set(pages)), "two adapters share a page"

    def _add_idle(self, digest: str, cost_s: float) -> None:
        num_pages = len(self._adapters[digest].pages)
        likelihood = self._likelihood.of(self._uses[digest])
        self._order.add(digest, num_pages, self._order.worth(likelihood, cost_s, num_pages))
