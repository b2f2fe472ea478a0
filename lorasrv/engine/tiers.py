"""Moves adapters between the tiers: disk to host beside the engine's steps, host to device at a step's start."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lorasrv.engine.image_readers import ImageSource
from lorasrv.errors import AdapterCorrupt, AdapterLoadFailed, LorasrvError, ResourceExhausted
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.types import Tier
from lorasrv_adapters.errors import AdapterError, CorruptBlob, ImageTooLarge
from lorasrv_adapters.host_cache import HostCache, HostState

if TYPE_CHECKING:
    # The core's own tests and the simulator run without torch.
    from lorasrv.memory.packing import PackedAdapter
    from lorasrv.memory.storage import AdapterCopy, PageStorage

log = logging.getLogger(__name__)

_COPY_POLL_S = 0.0005
_MAX_FAILURES = 256

_TIERS = {HostState.READING: Tier.READING, HostState.READY: Tier.HOST, HostState.FAILED: Tier.FAILED}


@dataclass(frozen=True, kw_only=True)
class TierChanges:
    """Since the last poll: why wanted adapters could not be read, by digest, which have come to host memory, and which
    have arrived on the device; and whose reads are under way, and whether each is slow."""

    failed: Mapping[str, LorasrvError]
    read: tuple[str, ...]
    loaded: tuple[str, ...]
    reading: Mapping[str, bool] = field(default_factory=dict[str, bool])


class AdapterTiers(Protocol):
    """What the engine's core needs of the tiers above and below the device."""

    def want(self, digests: Sequence[str]) -> None:
        """What queued requests wait for, most urgent first: read these adapters to host memory, where they are not, and
        keep them there until they are no longer named. Never blocks.
        """
        ...

    def num_pages(self, digest: str) -> int | None:
        """Pages of the adapter's image in host memory; None while it is not there.

        What a step is told here stays true to its end: images come and go in `poll` alone.
        """
        ...

    def poll(self) -> TierChanges:
        """Take in the reads and copies that have ended, at a step's start. Wanting a digest that failed tries again."""
        ...

    def load(self, digest: str, pages: list[int], *, wait_for_steps: bool) -> ResidentAdapter:
        """Begin to copy an image from host memory to these pages of the device; a later `poll` says that it is there,
        unless it is within `bytes_at_once`: then it is there now.

        With `wait_for_steps`, steps that are submitted by now may still use the pages: the copy begins behind them.
        """
        ...

    def bytes_at_once(self) -> int:
        """A `load` of so many bytes now is over when it returns; none where copies run beside the steps."""
        ...

    def discard(self, digest: str) -> None:
        """No request uses this adapter and none is to come: `poll` drops its image. A later `want` takes this back."""
        ...

    def host_tiers(self) -> dict[str, Tier]:
        """Digests above the disk tier, device excluded. Not to be asked within a step."""
        ...

    def failures(self) -> Mapping[str, LorasrvError]:
        """Why adapters could not be read: the last attempt on each, of some that were not wanted again."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when there is something to `poll`, or after `timeout_s`."""
        ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class Tiers:
    """Host cache and page storage joined. Owned by the engine's thread; `source` reads beside it."""

    def __init__(
        self,
        storage: "PageStorage",
        source: "ImageSource[PackedAdapter]",
        budget_bytes: int,
        copy_bytes_per_step: int,
    ) -> None:
        """A step copies as many pages as begin within `copy_bytes_per_step`."""
        self._storage = storage
        self._source = source
        self._host: HostCache[PackedAdapter] = HostCache(budget_bytes, source)
        self._copy_bytes_per_step = copy_bytes_per_step
        self._copy_bytes_left = 0
        self._wanted: set[str] = set()
        self._copies: dict[str, AdapterCopy] = {}  # oldest first; their images are pinned
        self._failures: dict[str, LorasrvError] = {}  # the last ones, oldest first

    def want(self, digests: Sequence[str]) -> None:
        for digest in self._wanted.difference(digests):
            self._host.unpin(digest)
            self._host.cancel(digest)
        for digest in digests:
            if digest not in self._wanted:
                self._failures.pop(digest, None)
                self._host.request(digest)
                self._host.pin(digest)
        self._wanted = set(digests)
        self._host.prefer(digests)

    def num_pages(self, digest: str) -> int | None:
        image = self._host.get(digest)
        return None if image is None else image.num_pages

    def poll(self) -> TierChanges:
        self._take_in()
        failures: dict[str, LorasrvError] = {}
        read: list[str] = []
        for digest in self._host.take_ended():
            error = self._host.failure(digest)
            if error is None:
                if self._host.state(digest) is HostState.READY:
                    read.append(digest)
                continue
            self._remember(digest, _describe(digest, error))
            if digest in self._wanted:
                failures[digest] = self._failures[digest]
                self._wanted.remove(digest)
                self._host.unpin(digest)
            self._host.forget_failure(digest)
        self._copy_bytes_left = self._copy_bytes_per_step
        self._advance_copies()
        loaded = tuple(digest for digest, copy in self._copies.items() if copy.ended)
        for digest in loaded:
            self._end_copy(digest)
        return TierChanges(failed=failures, read=tuple(read), loaded=loaded, reading=self._source.reading)

    def load(self, digest: str, pages: list[int], *, wait_for_steps: bool) -> ResidentAdapter:
        image = self._host.get(digest)
        assert image is not None, f"{digest} is not in host memory"
        at_once = image.nbytes <= self.bytes_at_once()
        self._host.pin(digest)
        copy = self._copies[digest] = self._storage.begin_adapter(image, pages, wait_for_steps=wait_for_steps)
        self._advance_copies()
        if at_once:
            self._end_copy(digest)
        return ResidentAdapter(digest=digest, pages=tuple(pages), directory=copy.directory, max_rank=image.max_rank)

    def bytes_at_once(self) -> int:
        if self._storage.beside_steps or not all(copy.issued for copy in self._copies.values()):
            return 0
        return max(0, self._copy_bytes_left)

    def discard(self, digest: str) -> None:
        self._failures.pop(digest, None)
        self._host.discard(digest)

    def host_tiers(self) -> dict[str, Tier]:
        self._take_in()
        snapshot = self._host.snapshot()
        states = {digest: _TIERS[state] for digest, state in snapshot.states.items()}
        return states | dict.fromkeys(snapshot.queued, Tier.QUEUED)

    def failures(self) -> Mapping[str, LorasrvError]:
        return self._failures

    def wait(self, timeout_s: float) -> None:
        if any(not copy.issued or copy.ended for copy in self._copies.values()):
            return
        self._source.wait(min(timeout_s, _COPY_POLL_S) if self._copies else timeout_s)

    def check(self) -> None:
        self._host.check()
        self._source.check()

    def close(self) -> None:
        self._host.close()
        self._source.close()

    def _take_in(self) -> None:
        self._source.deliver(self._host)
        self._host.poll()

    def _advance_copies(self) -> None:
        """Issue what is left of this step's bytes, of the oldest copy first."""
        for copy in self._copies.values():
            if self._copy_bytes_left <= 0:
                return
            if not copy.issued:
                self._copy_bytes_left -= self._storage.advance(copy, self._copy_bytes_left)

    def _end_copy(self, digest: str) -> None:
        assert self._copies.pop(digest).ended, f"{digest} is still being copied"
        self._host.unpin(digest)

    def _remember(self, digest: str, error: LorasrvError) -> None:
        self._failures.pop(digest, None)
        self._failures[digest] = error
        if len(self._failures) > _MAX_FAILURES:
            del self._failures[next(iter(self._failures))]


def unfelt_copy_bytes(*, beside_steps: bool) -> int:
    """What a step may copy unnoticed: a fraction of a millisecond of the bus to a GPU, or of the engine's thread."""
    return (16 << 20) if beside_steps else (4 << 20)


def _describe(digest: str, error: Exception) -> LorasrvError:
    """What clients may read: our packages' errors carry safe texts, any other is logged and masked."""
    if isinstance(error, CorruptBlob):
        return AdapterCorrupt(f"version {digest}: {error}")
    if isinstance(error, ImageTooLarge):
        return ResourceExhausted(f"version {digest}: {error}")
    if isinstance(error, AdapterError | AdapterLoadFailed):
        return AdapterLoadFailed(f"version {digest}: {error}")
    log.error("version %s could not be read", digest, exc_info=error)
    return AdapterLoadFailed(f"version {digest} could not be read")
