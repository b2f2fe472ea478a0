"""The host tier: page images of adapters, by digest, within a byte budget. It knows bytes, not pages.

What builds an image is handed in (`load`) and runs in worker threads; everything else happens in the one thread
that owns the cache, so there is no lock: finished loads wait in a queue until the owner's next `poll`.
"""

import queue
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from lorasrv_adapters.errors import ImageTooLarge

Image = TypeVar("Image")


class HostState(StrEnum):
    ABSENT = "absent"
    READING = "reading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class HostCacheSnapshot:
    """What the cache holds at a moment; `states` has no absent digests."""

    budget_bytes: int
    used_bytes: int
    pinned_bytes: int
    num_loads: int
    num_evictions: int
    states: dict[str, HostState]


@dataclass(kw_only=True)
class _Ready(Generic[Image]):
    image: Image
    size_bytes: int
    seen: bool = False


@dataclass(frozen=True, kw_only=True)
class _Loaded(Generic[Image]):
    digest: str
    result: Image | Exception


class HostCache(Generic[Image]):
    """All methods are called by one owner thread; `load` and `on_load_end` run in workers.

    A digest that is requested is READING, then READY or FAILED; requests in between change nothing. A failure stays,
    for its requests to see, until `forget_failure`; the next `request` then reads again. Images come and go in `poll`
    alone: what was ready before another call is ready after it. Ready images that are not pinned go, least recently
    got first, when a new one needs room, and discarded ones in any case. While pins leave no room, loaded images wait
    (still READING) and no further load begins: beyond the budget there are at most `num_threads` images.
    """

    def __init__(
        self,
        budget_bytes: int,
        load: Callable[[str], Image],
        size_of: Callable[[Image], int],
        num_threads: int = 2,
        on_load_end: Callable[[], None] | None = None,
    ) -> None:
        """`on_load_end` is called in a worker after each load: it may only wake the owner."""
        self._budget_bytes = budget_bytes
        self._load = load
        self._size_of = size_of
        self._num_threads = num_threads
        self._on_load_end = on_load_end
        self._workers = ThreadPoolExecutor(num_threads, thread_name_prefix="host-cache")
        self._done: queue.SimpleQueue[_Loaded[Image]] = queue.SimpleQueue()
        self._queued: deque[str] = deque()
        self._in_flight: set[str] = set()
        self._parked: deque[tuple[str, Image, int]] = deque()
        self._ready: OrderedDict[str, _Ready[Image]] = OrderedDict()
        self._failed: dict[str, Exception] = {}
        self._pins: dict[str, int] = {}
        self._discarded: set[str] = set()
        self._used_bytes = 0
        self._num_loads = 0
        self._num_evictions = 0

    def request(self, digest: str) -> None:
        """Have an image read, unless it is ready, being read or has failed; never blocks."""
        self._discarded.discard(digest)
        if self.state(digest) is HostState.ABSENT:
            self._queued.append(digest)
            self._dispatch()

    def poll(self) -> None:
        """Take in what the workers finished, which may evict, drop what was discarded, and keep the workers busy."""
        while True:
            try:
                loaded = self._done.get_nowait()
            except queue.Empty:
                break
            self._in_flight.remove(loaded.digest)
            self._take_in(loaded)
        for digest in [d for d in self._discarded if d not in self._pins and d not in self._in_flight]:
            self._drop(digest)
        while self._parked and self._make_room(self._parked[0][2]):
            self._insert(*self._parked.popleft())
        self._dispatch()

    def state(self, digest: str) -> HostState:
        if digest in self._ready:
            return HostState.READY
        if digest in self._failed:
            return HostState.FAILED
        waiting = digest in self._in_flight or digest in self._queued
        if waiting or any(digest == parked for parked, _, _ in self._parked):
            return HostState.READING
        return HostState.ABSENT

    def get(self, digest: str) -> Image | None:
        """The image when it is ready, which also makes it the most recently used; None otherwise."""
        entry = self._ready.get(digest)
        if entry is None:
            return None
        entry.seen = True
        self._ready.move_to_end(digest)
        return entry.image

    def failure(self, digest: str) -> Exception | None:
        """Why the last load of a FAILED digest failed."""
        return self._failed.get(digest)

    def forget_failure(self, digest: str) -> None:
        """Make a FAILED digest ABSENT again."""
        if self._failed.pop(digest, None) is not None:
            self._discarded.discard(digest)

    def discard(self, digest: str) -> None:
        """Nobody will get this image again: it goes in the first `poll` in which it is neither pinned nor in a worker's
        hands. A later `request` takes this back.
        """
        if self.state(digest) is not HostState.ABSENT:
            self._discarded.add(digest)

    def pin(self, digest: str) -> None:
        """Keep an image that is being read or ready until `unpin`; counted."""
        state = self.state(digest)
        assert state in (HostState.READING, HostState.READY), f"pin of {digest}, which is {state}"
        self._pins[digest] = self._pins.get(digest, 0) + 1

    def unpin(self, digest: str) -> None:
        """Undo one `pin`; for a FAILED digest before `forget_failure`."""
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]

    def snapshot(self) -> HostCacheSnapshot:
        reading = [*self._queued, *self._in_flight, *(digest for digest, _, _ in self._parked)]
        return HostCacheSnapshot(
            budget_bytes=self._budget_bytes,
            used_bytes=self._used_bytes,
            pinned_bytes=sum(entry.size_bytes for digest, entry in self._ready.items() if digest in self._pins),
            num_loads=self._num_loads,
            num_evictions=self._num_evictions,
            states={digest: self.state(digest) for digest in (*reading, *self._ready, *self._failed)},
        )

    def close(self) -> None:
        """Wait for the loads that run, and drop everything."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._done = queue.SimpleQueue()
        for held in (
            self._queued,
            self._parked,
            self._ready,
            self._in_flight,
            self._failed,
            self._pins,
            self._discarded,
        ):
            held.clear()
        self._used_bytes = 0

    def check(self) -> None:
        """Raises AssertionError on a broken invariant."""
        reading = [*self._queued, *self._in_flight, *(digest for digest, _, _ in self._parked)]
        everywhere = [*reading, *self._ready, *self._failed]
        assert len(everywhere) == len(set(everywhere)), everywhere
        assert self._used_bytes == sum(entry.size_bytes for entry in self._ready.values())
        assert self._used_bytes <= self._budget_bytes
        assert len(self._in_flight) + len(self._parked) <= self._num_threads
        assert all(count > 0 for count in self._pins.values())
        assert self._pins.keys() | self._discarded <= set(everywhere)
        idle = not self._in_flight and not self._parked
        assert not (idle and self._queued), "queued loads that nothing will start"

    def _take_in(self, loaded: _Loaded[Image]) -> None:
        if isinstance(loaded.result, Exception):
            self._failed[loaded.digest] = loaded.result
            return
        size_bytes = self._size_of(loaded.result)
        if size_bytes > self._budget_bytes:
            self._failed[loaded.digest] = ImageTooLarge(
                f"adapter takes {size_bytes} bytes of host memory; the host cache has {self._budget_bytes}"
            )
            return
        self._parked.append((loaded.digest, loaded.result, size_bytes))

    def _drop(self, digest: str) -> None:
        """Forget a digest that no worker has in its hands, wherever it is."""
        self._discarded.remove(digest)
        self._failed.pop(digest, None)
        if digest in self._queued:
            self._queued.remove(digest)
        self._parked = deque(parked for parked in self._parked if parked[0] != digest)
        entry = self._ready.pop(digest, None)
        if entry is not None:
            self._used_bytes -= entry.size_bytes

    def _insert(self, digest: str, image: Image, size_bytes: int) -> None:
        self._ready[digest] = _Ready(image=image, size_bytes=size_bytes)
        self._used_bytes += size_bytes
        self._num_loads += 1

    def _make_room(self, size_bytes: int) -> bool:
        """Evict until `size_bytes` fit; evicts nothing and says False when pins leave too little.

        Images that nobody has got yet go last: they were read for someone who is about to ask.
        """
        idle = [digest for digest in self._ready if digest not in self._pins]
        idle_bytes = sum(self._ready[digest].size_bytes for digest in idle)
        if self._used_bytes - idle_bytes + size_bytes > self._budget_bytes:
            return False
        idle.sort(key=lambda digest: not self._ready[digest].seen)
        for digest in idle:
            if self._used_bytes + size_bytes <= self._budget_bytes:
                break
            self._used_bytes -= self._ready.pop(digest).size_bytes
            self._num_evictions += 1
        return True

    def _dispatch(self) -> None:
        while self._queued and not self._parked and len(self._in_flight) < self._num_threads:
            digest = self._queued.popleft()
            self._in_flight.add(digest)
            self._workers.submit(self._run, digest)

    def _run(self, digest: str) -> None:
        """In a worker thread."""
        try:
            result = self._load(digest)
        except Exception as error:  # whatever goes wrong fails this adapter's requests, nothing else
            self._done.put(_Loaded(digest=digest, result=error))
        else:
            self._done.put(_Loaded(digest=digest, result=result))
        if self._on_load_end is not None:
            self._on_load_end()
