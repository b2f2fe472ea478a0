"""Content-addressed files: `root/ab/abcdef…`, each named by the sha256 of its bytes.

A blob is complete or absent: it is written elsewhere on the same file system, synced, then renamed into place. It
never changes, so any number of processes may read. Writing and deleting belong to the registry alone.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorasrv_adapters.errors import CorruptBlob, RegistryUnavailable, StorageFull
from lorasrv_adapters.reference import check_digest

# Stays in a core's cache from the read to the digest.
_CHUNK_BYTES = 128 << 10
_PARTIAL_SUFFIX = ".partial"


class BlobStore:
    """Blobs below `root`, which is made when missing. Stateless: readers need no lock."""

    def __init__(self, root: Path) -> None:
        self._root = root
        make_folder(root)

    def path(self, digest: str) -> Path:
        """Where a blob lies, present or not; raises InvalidReference when `digest` is none."""
        return self._root / check_digest(digest)[:2] / digest

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def put_file(self, staged: Path, digest: str) -> None:
        """Move a file whose sha256 is known to be `digest` into the store; replaces a damaged blob."""
        target = self.path(digest)
        make_folder(target.parent)
        sync_file(staged)
        os.replace(staged, target)
        sync_folder(target.parent)

    def put_bytes(self, data: bytes) -> str:
        """Store `data`; returns its digest."""
        digest = hashlib.sha256(data).hexdigest()
        partial = self._root / f"{digest}{_PARTIAL_SUFFIX}"
        try:
            partial.write_bytes(data)
            self.put_file(partial, digest)
        finally:
            partial.unlink(missing_ok=True)
        return digest

    def open(self, digest: str) -> BinaryIO:
        """A blob's bytes, unverified; raises CorruptBlob when it is missing."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise CorruptBlob(f"blob {digest} is missing") from None

    def verify(self, digest: str, size_bytes: int | None = None) -> None:
        """Read all of a blob; raises CorruptBlob unless its bytes, and their number when given, are right."""
        with self.open(digest) as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if size_bytes is not None and found_bytes != size_bytes:
                raise CorruptBlob(f"blob {digest} has {found_bytes} bytes instead of {size_bytes}")
            if file_sha256(file) != digest:
                raise CorruptBlob(f"blob {digest} no longer matches its digest")

    def read_verified(self, digest: str, max_bytes: int) -> bytes:
        """A small blob's bytes, checked; raises CorruptBlob."""
        with self.open(digest) as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes or hashlib.sha256(data).hexdigest() != digest:
            raise CorruptBlob(f"blob {digest} no longer matches its digest")
        return data

    def delete(self, digest: str) -> None:
        """Remove a blob, if it is there."""
        self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """All blobs present."""
        for path in sorted(self._root.glob("??/*")):
            yield path.name

    def remove_partial(self) -> None:
        """Remove what a killed process left half written; only before anything else writes."""
        for path in self._root.glob(f"*{_PARTIAL_SUFFIX}"):
            path.unlink()


def file_sha256(file: BinaryIO) -> str:
    """The sha256 of an open file from its start, as hex."""
    file.seek(0)
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(chunk):  # type: ignore[attr-defined]
        digest.update(chunk[:count])
    return digest.hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder so that its name survives a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what the operating system says about a disk into StorageFull or RegistryUnavailable, without its paths."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("the registry's disk is full") from error
        name = errno.errorcode.get(error.errno or 0, type(error).__name__)
        raise RegistryUnavailable(f"the registry's disk fails: {name}") from error
