"""Adapter folders on the server's own disk, opened without leaving the folder that the tenant may import from."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from lorasrv_adapters.blobs import file_sha256
from lorasrv_adapters.errors import ImportRefused, InvalidUpload, quote
from lorasrv_adapters.manifest import FILE_NAMES, SERVING_FILE
from lorasrv_adapters.records import UploadFile

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# A pipe without a writer would hold up its opening.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


@contextmanager
def open_source(
    root: Path | None, tenant: str, source: str, max_bytes: dict[str, int]
) -> Iterator[dict[str, BinaryIO]]:
    """The files of the adapter folder `source`, relative to the tenant's folder in `root`, by name.

    Every step is opened from the one before, and none through a link: what lies elsewhere is out of reach, whatever
    changes meanwhile. Raises ImportRefused for anything but a plain path below that folder, InvalidUpload when no
    adapter is there or a file is over its limit.
    """
    refusal = ImportRefused(f"source {quote(source)} is not a folder below this tenant's import folder")
    parts = source.split("/")
    if root is None:
        raise ImportRefused("this server imports nothing: it has no import root")
    if "\0" in source or ":" in source or any(part in ("", ".", "..") for part in parts):
        raise refusal
    with ExitStack() as opened:
        try:
            folder = _opened(opened, str(root), os.O_RDONLY | os.O_DIRECTORY)
            for part in (tenant, *parts):
                folder = _opened(opened, part, _FOLDER_FLAGS, folder)
            files = {name: _open_file(opened, name, folder) for name in _names(folder)}
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise InvalidUpload(f"source {quote(source)}: no adapter is there") from None
            raise refusal from None
        for name, file in files.items():
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes[name]:
                raise InvalidUpload(f"{name}: size {size} is over the limit of {max_bytes[name]} bytes")
        yield files


def announced(files: dict[str, BinaryIO]) -> tuple[UploadFile, ...]:
    """What a client would announce of these files."""
    return tuple(
        UploadFile(name=name, sha256=file_sha256(file), size_bytes=file.tell()) for name, file in files.items()
    )


def _names(folder: int) -> tuple[str, ...]:
    return (*FILE_NAMES, SERVING_FILE) if SERVING_FILE in os.listdir(folder) else FILE_NAMES


def _opened(opened: ExitStack, name: str, flags: int, folder: int | None = None) -> int:
    descriptor = os.open(name, flags, dir_fd=folder)
    opened.callback(os.close, descriptor)
    return descriptor


def _open_file(opened: ExitStack, name: str, folder: int) -> BinaryIO:
    file = opened.enter_context(os.fdopen(os.open(name, _FILE_FLAGS, dir_fd=folder), "rb"))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise OSError(errno.ELOOP, "not a regular file")
    return file
