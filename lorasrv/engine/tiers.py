"""Moves adapters between the tiers: disk to host in worker threads, host to device at a step's start."""

from collections.abc import Mapping
from typing import Protocol

from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.types import Tier


class AdapterTiers(Protocol):
    """What the engine's core needs of the tiers above and below the device."""

    def fetch(self, digest: str) -> None:
        """Begin to read an adapter to host memory, unless it is there or on its way. Never blocks."""
        ...

    def num_pages(self, digest: str) -> int | None:
        """Pages of the adapter's image in host memory; None while it is not there."""
        ...

    def take_failures(self) -> Mapping[str, AdapterLoadFailed]:
        """Fetches that failed since the last call, by digest; a next fetch tries again."""
        ...

    def hold(self, digest: str | None) -> None:
        """Keep this one adapter's image in host memory from when it is there: the oldest waiting request's."""
        ...

    def load(self, digest: str, pages: list[int]) -> ResidentAdapter:
        """Copy an image from host memory to these pages of the device."""
        ...

    def host_tiers(self) -> dict[str, Tier]:
        """Digests above the disk tier, device excluded."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when a fetch has ended, or after `timeout_s`."""
        ...

    def check(self) -> None: ...

    def close(self) -> None: ...


