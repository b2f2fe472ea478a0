"""Moves adapters between the tiers: disk to host beside the engine's steps, host to device at a step's start."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_TIERS = {HostState.READING: Tier.READING, HostState.READY: Tier.HOST, HostState.FAILED: Tier.FAILED}


@dataclass(frozen=True, kw_only=True)
class TierChanges:
    """Since the last poll: why wanted adapters could not be read, by digest, and which have arrived on the device."""

    failed: Mapping[str, LorasrvError]
    loaded: tuple[str, ...]


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
        """Begin to copy an image from host memory to these pages of the device; a later `poll` says that it is there.

        With `wait_for_steps`, steps that are submitted by now may still use the pages: the copy begins behind them.
        """
        ...

    def discard(self, digest: str) -> None:
        """No request uses this adapter and none is to come: `poll` drops its image. A later `want` takes this back."""
        ...

    def host_tiers(self) -> dict[str, Tier]:
        """Digests above the disk tier, device excluded. Not to be asked within a step."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when there is something to `poll`, or after `timeout_s`."""
        ...

    def check(self) -> None: ...

    def close(self) -> None: ...


class Tiers:
    """Host cache and page storage joined. Owned by the engine's thread; `source` reads beside it."""

    def __init__(self, storage: "PageStorage", source: "ImageSource[PackedAdapter]", budget_bytes: int) -> None:
        self._storage = storage
        self._source = source
        self._host: HostCache[PackedAdapter] = HostCache(budget_bytes, source)
        self._has_copied = False
        self._wanted: set[str] = set()
        self._reading: set[str] = set()
        self._copying: dict[str, AdapterCopy] = {}

    def want(self, digests: Sequence[str]) -> None:
        for digest in self._wanted.difference(digests):
            self._host.unpin(digest)
            self._host.cancel(digest)
        for digest in digests:
            if digest not in self._wanted:
                self._host.request(digest)
                self._host.pin(digest)
                self._reading.add(digest)
        self._wanted = set(digests)
        self._host.prefer(digests)

    def num_pages(self, digest: str) -> int | None:
        image = self._host.get(digest)
        return None if image is None else image.num_pages

    def poll(self) -> TierChanges:
        self._take_in()
        failures: dict[str, LorasrvError] = {}
        for digest in [d for d in self._reading if self._host.state(d) is not HostState.READING]:
            self._reading.remove(digest)
            error = self._host.failure(digest)
            if error is None:
                continue
            if digest in self._wanted:
                failures[digest] = _describe(digest, error)
                self._wanted.remove(digest)
                self._host.unpin(digest)
            self._host.forget_failure(digest)
        loaded = tuple(digest for digest, copy in self._copying.items() if copy.ended)
        for digest in loaded:
            del self._copying[digest]
        return TierChanges(failed=failures, loaded=loaded)

    def load(self, digest: str, pages: list[int], *, wait_for_steps: bool) -> ResidentAdapter:
        image = self._host.get(digest)
        assert image is not None, f"{digest} is not in host memory"
        copy = self._copying[digest] = self._storage.write_adapter(image, pages, wait_for_steps=wait_for_steps)
        if copy.ended:
            self._has_copied = True
        return ResidentAdapter(digest=digest, pages=tuple(pages), directory=copy.directory, max_rank=image.max_rank)

    def discard(self, digest: str) -> None:
        self._host.discard(digest)

    def host_tiers(self) -> dict[str, Tier]:
        self._take_in()
        return {digest: _TIERS[state] for digest, state in self._host.snapshot().states.items()}

    def wait(self, timeout_s: float) -> None:
        self._source.wait(0.0 if self._has_copied else timeout_s)
        self._has_copied = False

    def check(self) -> None:
        self._host.check()
        self._source.check()

    def close(self) -> None:
        self._source.close()
        self._host.close()

    def _take_in(self) -> None:
        self._source.deliver(self._host)
        self._host.poll()


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
