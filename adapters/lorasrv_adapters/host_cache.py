"""The host tier's accounting: which adapters' page images are in host memory, within a byte budget. It knows bytes,
not pages, and has no threads: what reads and builds images is handed in, and told when to.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from itertools import chain
from typing import Generic, Protocol, TypeVar

from lorasrv_adapters.errors import ImageTooLarge

Image = TypeVar("Image")


class HostState(StrEnum):
    ABSENT = "absent"
    READING = "reading"
    READY = "ready"
    FAILED = "failed"


class ImageReader(Protocol[Image]):
    """What makes images, in two phases: an image takes the cache's memory only once there is room for it. A reader that
    builds what it measures at once has memory of its own for that.

    The cache's owner calls these, through the cache; they return at once and do not call the cache. What they come to
    is told to the cache later, by the owner: `HostCache.measured`, `HostCache.finished`.
    """

    @property
    def is_free(self) -> bool:
        """Whether another read may begin now."""
        ...

    def measure(self, digest: str) -> None:
        """Begin a read: `measured` is to follow, or `finished` with an error."""
        ...

    def build(self, digest: str) -> Image | None:
        """There is room for a measured image: `finished` is to follow, unless the image can be returned now."""
        ...

    def abandon(self, digest: str) -> None:
        """Nobody wants what was measured: nothing is to follow."""
        ...

    def free(self, image: Image) -> None:
        """The cache has let an image go."""
        ...


@dataclass(frozen=True, kw_only=True)
class HostCacheSnapshot:
    """What the cache holds at a moment; `states` has no absent digests. `used_bytes` counts images being built;
    `queued` are the READING ones whose reads have not begun, in the order in which they will."""

    budget_bytes: int
    used_bytes: int
    pinned_bytes: int
    num_loads: int
    num_evictions: int
    states: dict[str, HostState]
    queued: tuple[str, ...]


class _Phase(Enum):
    """Of a read; those that MEASURE or BUILD are in the reader's hands."""

    QUEUED = auto()
    MEASURE = auto()
    WAIT = auto()  # for room
    BUILD = auto()


@dataclass(kw_only=True)
class _Read:
    """`size_bytes` is known from WAIT on."""

    phase: _Phase = _Phase.QUEUED
    size_bytes: int = 0

    @property
    def is_droppable(self) -> bool:
        return self.phase in (_Phase.QUEUED, _Phase.WAIT)


@dataclass(kw_only=True)
class _Ready(Generic[Image]):
    image: Image
    size_bytes: int


class HostCache(Generic[Image]):
    """Owned by one thread.

    A digest that is requested is READING, then READY or FAILED; requests in between change nothing. A failure stays,
    for its requests to see, until `forget_failure`; the next `request` then reads again. Images go in `poll` alone:
    what was ready before another call is ready after it. Ready images that are not pinned go, least recently got first,
    when a new one needs room, and discarded ones in any case. While pins leave no room, measured images wait (still
    READING) and no further read begins: the cache never holds more than its budget.
    """

    def __init__(self, budget_bytes: int, reader: ImageReader[Image]) -> None:
        self._budget_bytes = budget_bytes
        self._reader = reader
        self._reads: dict[str, _Read] = {}  # most urgent first
        # Of those: the ones that wait for room, and the ones that nobody waits for any more.
        self._measured: set[str] = set()
        self._unwanted: dict[str, None] = {}
        self._ended: list[str] = []
        self._ready: dict[str, _Ready[Image]] = {}
        # The ready ones that somebody has got, least recently first, and those that nobody has, in order of arrival.
        self._got: OrderedDict[str, None] = OrderedDict()
        self._new: dict[str, None] = {}
        self._failed: dict[str, Exception] = {}
        self._pins: dict[str, int] = {}
        self._discarded: set[str] = set()
        self._used_bytes = 0
        self._ready_bytes = 0
        self._num_loads = 0
        self._num_evictions = 0

    def request(self, digest: str) -> None:
        """Have an image read, unless it is ready, being read or has failed; never blocks."""
        self._discarded.discard(digest)
        if self.state(digest) is HostState.ABSENT:
            self._reads[digest] = _Read()
            self._begin_reads()
        else:
            self._unwanted.pop(digest, None)

    def cancel(self, digest: str) -> None:
        """Nobody waits for a read any more: the next `poll` drops it, unless it is in the reader's hands by then or
        requested again."""
        if digest in self._reads:
            self._unwanted[digest] = None

    def prefer(self, digests: Sequence[str]) -> None:
        """Reads that have not begun begin in this order, all others behind them."""
        first = {digest: self._reads[digest] for digest in digests if digest in self._reads}
        self._reads = first | self._reads

    def measured(self, digest: str, size_bytes: int) -> None:
        """The reader knows how large an image will be."""
        read = self._reads[digest]
        assert read.phase is _Phase.MEASURE, (digest, read)
        if size_bytes > self._budget_bytes:
            self._reader.abandon(digest)
            message = f"adapter takes {size_bytes} bytes of host memory; the host cache has {self._budget_bytes}"
            self.finished(digest, ImageTooLarge(message))
        else:
            read.phase, read.size_bytes = _Phase.WAIT, size_bytes
            self._measured.add(digest)

    def finished(self, digest: str, result: Image | Exception) -> None:
        """The reader has built an image, or has given up."""
        read = self._take_read(digest)
        assert read is not None, f"{digest} is not being read"
        self._ended.append(digest)
        if isinstance(result, Exception):
            if read.phase is _Phase.BUILD:
                self._used_bytes -= read.size_bytes
            self._failed[digest] = result
        else:
            assert read.phase is _Phase.BUILD, (digest, read)
            self._ready[digest] = _Ready(image=result, size_bytes=read.size_bytes)
            self._new[digest] = None
            self._ready_bytes += read.size_bytes
            self._num_loads += 1
        self._begin_reads()

    def poll(self) -> None:
        """Drop what nobody wants, give measured images room, which may evict, and keep the reader busy."""
        for digest in [d for d in self._discarded if d not in self._pins and not self._is_in_hands(d)]:
            self._discarded.remove(digest)
            self._drop(digest)
        for digest in [d for d in self._unwanted if d not in self._pins]:
            if self._reads[digest].is_droppable:
                self._discarded.discard(digest)
                self._drop(digest)
        if self._measured:
            for digest in [d for d in self._reads if d in self._measured]:
                if not self._make_room(self._reads[digest].size_bytes):
                    break
                self._build(digest)
        self._begin_reads()

    def take_ended(self) -> tuple[str, ...]:
        """The digests whose reads have ended since the last call, in whatever way, in order."""
        ended, self._ended = tuple(self._ended), []
        return ended

    def state(self, digest: str) -> HostState:
        if digest in self._ready:
            return HostState.READY
        if digest in self._failed:
            return HostState.FAILED
        return HostState.READING if digest in self._reads else HostState.ABSENT

    def get(self, digest: str) -> Image | None:
        """The image when it is ready, which also makes it the most recently used; None otherwise."""
        entry = self._ready.get(digest)
        if entry is None:
            return None
        if digest in self._new:
            del self._new[digest]
            self._got[digest] = None
        else:
            self._got.move_to_end(digest)
        return entry.image

    def failure(self, digest: str) -> Exception | None:
        """Why the last load of a FAILED digest failed."""
        return self._failed.get(digest)

    def forget_failure(self, digest: str) -> None:
        """Make a FAILED digest ABSENT again."""
        if self._failed.pop(digest, None) is not None:
            self._discarded.discard(digest)

    def discard(self, digest: str) -> None:
        """Nobody will get this image again: it goes in the first `poll` in which it is neither pinned nor in the
        reader's hands. A later `request` takes this back.
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
        return HostCacheSnapshot(
            budget_bytes=self._budget_bytes,
            used_bytes=self._used_bytes,
            pinned_bytes=sum(entry.size_bytes for digest, entry in self._ready.items() if digest in self._pins),
            num_loads=self._num_loads,
            num_evictions=self._num_evictions,
            states={digest: self.state(digest) for digest in (*self._reads, *self._ready, *self._failed)},
            queued=tuple(digest for digest, read in self._reads.items() if read.phase is _Phase.QUEUED),
        )

    def close(self) -> None:
        """Let everything go; the reader is told of nothing but images that are free, and tells nothing any more."""
        for entry in self._ready.values():
            self._reader.free(entry.image)
        for held in (self._reads, self._measured, self._unwanted, self._ended, self._ready, self._got, self._new):
            held.clear()
        for held in (self._failed, self._pins, self._discarded):
            held.clear()
        self._used_bytes = self._ready_bytes = 0

    def check(self) -> None:
        """Raises AssertionError on a broken invariant."""
        everywhere = [*self._reads, *self._ready, *self._failed]
        assert len(everywhere) == len(set(everywhere)), everywhere
        building = [read.size_bytes for read in self._reads.values() if read.phase is _Phase.BUILD]
        assert self._used_bytes == sum(entry.size_bytes for entry in self._ready.values()) + sum(building)
        assert self._ready_bytes == sum(entry.size_bytes for entry in self._ready.values())
        assert self._used_bytes <= self._budget_bytes
        assert self._measured == {digest for digest, read in self._reads.items() if read.phase is _Phase.WAIT}
        assert self._unwanted.keys() <= self._reads.keys()
        assert sorted([*self._got, *self._new]) == sorted(self._ready)
        assert all(count > 0 for count in self._pins.values())
        assert self._pins.keys() | self._discarded <= set(everywhere)
        phases = {read.phase for read in self._reads.values()}
        assert phases != {_Phase.QUEUED} or not self._reader.is_free, "queued reads that nothing will begin"

    def _is_in_hands(self, digest: str) -> bool:
        return digest in self._reads and not self._reads[digest].is_droppable

    def _drop(self, digest: str) -> None:
        """Forget a digest that the reader does not have in its hands, wherever it is."""
        self._failed.pop(digest, None)
        read = self._take_read(digest)
        if read is not None and read.phase is _Phase.WAIT:
            self._reader.abandon(digest)
        if digest in self._ready:
            self._let_go(digest)

    def _take_read(self, digest: str) -> _Read | None:
        self._measured.discard(digest)
        self._unwanted.pop(digest, None)
        return self._reads.pop(digest, None)

    def _let_go(self, digest: str) -> None:
        entry = self._ready.pop(digest)
        self._got.pop(digest, None)
        self._new.pop(digest, None)
        self._ready_bytes -= entry.size_bytes
        self._used_bytes -= entry.size_bytes
        self._reader.free(entry.image)

    def _build(self, digest: str) -> None:
        read = self._reads[digest]
        read.phase = _Phase.BUILD
        self._measured.remove(digest)
        self._used_bytes += read.size_bytes
        image = self._reader.build(digest)
        if image is not None:
            self.finished(digest, image)

    def _make_room(self, size_bytes: int) -> bool:
        """Evict until `size_bytes` fit; evicts nothing and says False when pins leave too little.

        Images that nobody has got yet go last: they were read for someone who is about to ask.
        """
        pinned_bytes = sum(self._ready[digest].size_bytes for digest in self._pins if digest in self._ready)
        if self._used_bytes - (self._ready_bytes - pinned_bytes) + size_bytes > self._budget_bytes:
            return False
        excess_bytes = self._used_bytes + size_bytes - self._budget_bytes
        victims: list[str] = []
        for digest in chain(self._got, self._new):
            if excess_bytes <= 0:
                break
            if digest not in self._pins:
                victims.append(digest)
                excess_bytes -= self._ready[digest].size_bytes
        for digest in victims:
            self._let_go(digest)
        self._num_evictions += len(victims)
        return True

    def _begin_reads(self) -> None:
        """Not while an image waits for room: what comes behind it would wait too."""
        if self._measured:
            return
        for digest, read in self._reads.items():
            if not self._reader.is_free:
                return
            if read.phase is _Phase.QUEUED:
                read.phase = _Phase.MEASURE
                self._reader.measure(digest)
