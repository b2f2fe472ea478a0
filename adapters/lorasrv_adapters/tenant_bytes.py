"""How many bytes each tenant stores, against its quota, while they arrive."""

import threading

from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import QuotaExceeded


class TenantBytes:
    """Counts a tenant's versions, those of deleted adapters included, and the bytes its uploads have staged.

    Thread-safe: takes the registry's `lock`. `limit` None bounds nothing.
    """

    def __init__(self, catalogue: Catalogue, lock: threading.RLock, limit: int | None) -> None:
        self._catalogue = catalogue
        self._lock = lock
        self._limit = limit
        self._staged: dict[tuple[str, str], tuple[str, int]] = {}

    def used(self, tenant: str) -> int:
        with self._lock:
            staged = sum(num_bytes for owner, num_bytes in self._staged.values() if owner == tenant)
            return self._catalogue.stored_bytes(tenant) + staged

    def check_room(self, tenant: str, num_bytes: int) -> None:
        """Raises QuotaExceeded when so many more do not fit."""
        if self._limit is None:
            return
        used = self.used(tenant)
        if used + num_bytes > self._limit:
            raise QuotaExceeded(f"{num_bytes} bytes on top of {used} are over the quota of {self._limit}")

    def add(self, tenant: str, upload_id: str, file: str, num_bytes: int, *, force: bool = False) -> None:
        """Count bytes about to be staged; raises QuotaExceeded and counts none. `force` counts what is there."""
        with self._lock:
            if not force:
                self.check_room(tenant, num_bytes)
            self._staged[upload_id, file] = (tenant, self._of(upload_id, file) + num_bytes)

    def take_back(self, upload_id: str, file: str, num_bytes: int) -> None:
        """Bytes that could not be staged after all."""
        with self._lock:
            tenant, _ = self._staged[upload_id, file]
            self._staged[upload_id, file] = (tenant, self._of(upload_id, file) - num_bytes)

    def drop(self, upload_id: str, file: str) -> None:
        """The file has no staged bytes any more."""
        with self._lock:
            self._staged.pop((upload_id, file), None)

    def drop_upload(self, upload_id: str) -> None:
        with self._lock:
            for key in [key for key in self._staged if key[0] == upload_id]:
                del self._staged[key]

    def staged(self) -> dict[tuple[str, str], int]:
        """Bytes by upload and file."""
        with self._lock:
            return {key: num_bytes for key, (_, num_bytes) in self._staged.items() if num_bytes}

    def _of(self, upload_id: str, file: str) -> int:
        return self._staged.get((upload_id, file), ("", 0))[1]
