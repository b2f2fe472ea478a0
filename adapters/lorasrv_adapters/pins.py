"""Which versions running generations hold, and what becomes of the blobs of those that are deleted meanwhile."""

from collections import Counter
from collections.abc import Iterable

from lorasrv_adapters.blobs import BlobStore
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import AdapterNotFound


class PinnedBlobs:
    """Pins in memory: they end with the process. Used under the registry's lock.

    A blob goes when no version of any tenant has it and no pinned version that was deleted still needs it.
    """

    def __init__(self, blobs: BlobStore, catalogue: Catalogue) -> None:
        self._blobs = blobs
        self._catalogue = catalogue
        self._counts: Counter[str] = Counter()
        self._deleted: dict[str, frozenset[str]] = {}

    @property
    def num_pins(self) -> int:
        return self._counts.total()

    def pin(self, digest: str) -> None:
        """Raises AdapterNotFound when nothing names the version any more and no pin keeps it."""
        if digest not in self._counts and not self._catalogue.has_version(digest):
            raise AdapterNotFound(f"adapter version {digest} not found")
        self._counts[digest] += 1

    def unpin(self, digest: str) -> None:
        assert self._counts[digest] > 0, f"unpin of {digest}, which is not pinned"
        self._counts[digest] -= 1
        if not self._counts[digest]:
            del self._counts[digest]
            self.delete_unneeded(self._deleted.pop(digest, frozenset()))

    def release(self, digest: str, blobs: set[str]) -> None:
        """A version's row has gone: its blobs go too, now or with the last pin."""
        if digest in self._counts:
            self._deleted[digest] = frozenset(blobs)
        else:
            self.delete_unneeded(frozenset(blobs))

    def delete_unneeded(self, blobs: Iterable[str]) -> None:
        """Delete those of `blobs` that nothing needs."""
        kept = self.kept_blobs()
        for blob in blobs:
            if blob not in kept and not self._catalogue.has_blob(blob):
                self._blobs.delete(blob)

    def kept_blobs(self) -> set[str]:
        """Blobs kept only for pinned versions that were deleted."""
        return {blob for blobs in self._deleted.values() for blob in blobs}

    def check(self) -> None:
        """Raises AssertionError on a broken invariant."""
        assert all(count > 0 for count in self._counts.values())
        assert self._deleted.keys() <= self._counts.keys()
