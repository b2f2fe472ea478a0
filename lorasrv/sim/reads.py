"""Reads of adapters from a disk that is a bandwidth, by readers that are a number."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush

from lorasrv.sim.clock import VirtualClock
from lorasrv.sim.hardware import Hardware
from lorasrv.sim.images import SimImage
from lorasrv_adapters.host_cache import HostCache


@dataclass(kw_only=True)
class SimReads:
    """In place of the processes that read (`engine.image_readers.ImageSource`).

    Each of `num_readers` has one adapter at a time from the opening of its files to its last byte, or until nobody
    wants it; the bytes of all go through one disk, in the order in which they are asked for.
    """

    clock: VirtualClock
    hardware: Hardware
    num_readers: int
    find: Callable[[str], SimImage]
    read_bytes: int = 0
    _busy: set[str] = field(default_factory=set[str])
    _disk_free_s: float = 0.0
    _events: list[tuple[float, int, str]] = field(default_factory=list[tuple[float, int, str]])  # (when, order, digest)
    _num_events: int = 0

    @property
    def is_free(self) -> bool:
        return len(self._busy) < self.num_readers

    def measure(self, digest: str) -> None:
        """Size and image come together, as from builders that have room to build ahead."""
        self._busy.add(digest)
        num_bytes = self.find(digest).nbytes
        begins_s = max(self._disk_free_s, self.clock.now_s + self.hardware.read_s)
        self._disk_free_s = begins_s + num_bytes / self.hardware.disk_bytes_per_s
        self.read_bytes += num_bytes
        self._num_events += 1
        heappush(self._events, (self._disk_free_s, self._num_events, digest))

    def build(self, digest: str) -> SimImage | None:
        self._busy.remove(digest)
        return self.find(digest)

    def abandon(self, digest: str) -> None:
        self._busy.remove(digest)

    @property
    def reading(self) -> Mapping[str, bool]:
        """None hangs."""
        return dict.fromkeys(self._busy, False)

    def free(self, image: SimImage) -> None:
        """It has no bytes."""

    def deliver(self, cache: HostCache[SimImage]) -> None:
        while self._events and self._events[0][0] <= self.clock.now_s:
            _, _, digest = heappop(self._events)
            cache.measured(digest, self.find(digest).nbytes)

    def wait(self, timeout_s: float) -> None:
        at_s = self.clock.now_s + timeout_s
        self.clock.sleep_until(min(at_s, self._events[0][0]) if self._events else at_s)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._busy) <= self.num_readers, "too many adapters are read at once"
        assert {digest for _, _, digest in self._events} <= self._busy, "a read has no reader"

    def close(self) -> None:
        self._events.clear()
        self._busy.clear()
