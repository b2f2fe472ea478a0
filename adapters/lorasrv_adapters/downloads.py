"""A version's files, read back for whoever wants a copy: every byte is checked against its digest on the way."""

import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass

from lorasrv_adapters.blobs import BlobStore, storage_errors
from lorasrv_adapters.errors import CorruptBlob
from lorasrv_adapters.manifest import ManifestFile
from lorasrv_adapters.published import read_manifest
from lorasrv_adapters.records import Version

# Each is to pass within the stall time-out of a stream, also on a slow link.
CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class FileChunk:
    file: str
    offset_bytes: int
    data: bytes


class Download:
    """A pinned version; `close` lets it go. Used by one thread at a time.

    `files` and `read` raise CorruptBlob, after `quarantine` was called with the version's digest.
    """

    def __init__(
        self,
        version: Version,
        blobs: BlobStore,
        *,
        quarantine: Callable[[str], None],
        unpin: Callable[[str], None],
    ) -> None:
        self.version = version
        self._blobs = blobs
        self._quarantine = quarantine
        self._unpin = unpin
        self._chunks = self._read()

    def files(self) -> tuple[ManifestFile, ...]:
        try:
            with storage_errors():
                return read_manifest(self._blobs, self.version.digest).files
        except CorruptBlob:
            self._quarantine(self.version.digest)
            raise

    def read(self) -> FileChunk | None:
        """The next at most CHUNK_BYTES; None at the end. A file whose bytes are not right fails with its last chunk."""
        try:
            with storage_errors():
                return next(self._chunks, None)
        except CorruptBlob:
            self._quarantine(self.version.digest)
            raise

    def close(self) -> None:
        self._chunks.close()
        self._unpin(self.version.digest)

    def _read(self) -> Generator[FileChunk, None, None]:
        for wanted in self.files():
            seen, offset = hashlib.sha256(), 0
            with self._blobs.open(wanted.sha256) as blob:
                while data := blob.read(CHUNK_BYTES):
                    seen.update(data)
                    if offset + len(data) >= wanted.size_bytes and seen.hexdigest() != wanted.sha256:
                        break
                    yield FileChunk(file=wanted.name, offset_bytes=offset, data=data)
                    offset += len(data)
            if seen.hexdigest() != wanted.sha256:
                raise CorruptBlob(f"blob {wanted.sha256} no longer matches its digest")
