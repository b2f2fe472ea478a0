"""Where uploads arrive: one folder per upload, one growing file per name. A file's size is its committed offset."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorasrv_adapters.blobs import make_folder


class Staging:
    """Files below `root`. Names are checked by the registry; one writer per file, under the upload's lock."""

    def __init__(self, root: Path) -> None:
        self._root = root
        make_folder(root)

    def folder(self, upload_id: str) -> Path:
        return self._root / upload_id

    def path(self, upload_id: str, name: str) -> Path:
        return self._root / upload_id / name

    def size(self, upload_id: str, name: str) -> int:
        """Bytes that have arrived."""
        path = self.path(upload_id, name)
        return path.stat().st_size if path.is_file() else 0

    def own_bytes(self, upload_id: str, name: str) -> int:
        """Those of them that no blob shares."""
        path = self.path(upload_id, name)
        return path.stat().st_size if path.is_file() and path.stat().st_nlink == 1 else 0

    def append(self, upload_id: str, name: str, data: bytes) -> None:
        if not data:
            return
        self.folder(upload_id).mkdir(exist_ok=True)
        path = self.path(upload_id, name)
        offset = self.size(upload_id, name)
        try:
            with path.open("ab", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) or 0 :]
        except OSError:
            # A full disk may take half of a chunk: the offset goes back to where the caller believes it is.
            with path.open("ab") as file:
                file.truncate(offset)
            raise

    def share(self, upload_id: str, name: str, blob: Path) -> None:
        """All of the file at once: another name for a blob's bytes, which are never written to."""
        self.folder(upload_id).mkdir(exist_ok=True)
        os.link(blob, self.path(upload_id, name))

    def touch(self, upload_id: str, name: str) -> Path:
        """The file's path; an empty file that no byte was sent for is made."""
        self.folder(upload_id).mkdir(exist_ok=True)
        path = self.path(upload_id, name)
        path.touch()
        return path

    def reset(self, upload_id: str, name: str) -> None:
        """Back to offset 0."""
        self.path(upload_id, name).unlink(missing_ok=True)

    def remove(self, upload_id: str) -> None:
        if self.folder(upload_id).exists():
            shutil.rmtree(self.folder(upload_id))

    def upload_ids(self) -> Iterator[str]:
        for path in sorted(self._root.iterdir()):
            yield path.name
