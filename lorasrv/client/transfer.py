"""Adapter folders on their way to a server and back: uploads that survive breaks, downloads that are checked."""

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lorasrv.client.errors import Aborted, ClientError, DataLoss, DeadlineExceeded, OutOfRange, Unavailable
from lorasrv.client.messages import ADAPTER_FILES, DEFAULTS_FILE, committed_bytes, upload_files, write_requests
from lorasrv.v1 import adapter_pb2

Progress = Callable[[int, int], None]
Call = Callable[[Any, Any], Any]

_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 2.0
# What may be over when it is tried again: the server is away, another writer has the file, bytes were given back, the
# link carries less than all in the time of one call.
_PASSING = (Unavailable, Aborted, OutOfRange, DeadlineExceeded)


def default_id(folder: Path) -> str:
    """The folder's own name; a link has the name that was given to it, whatever it points at."""
    return Path(os.path.abspath(folder)).name


def push_folder(
    adapters: Any,
    call: Call,
    folder: Path,
    request: adapter_pb2.CreateUploadRequest,
    progress: Progress | None,
    resume_s: float,
) -> adapter_pb2.Version:
    """Upload and publish a folder as `request` says. Breaks are taken up again while bytes arrive at least every
    `resume_s`; a push that was killed goes on where it was when the same folder is pushed again.
    """
    request.files.extend(upload_files(folder))
    upload = _begin(adapters, call, request)
    patience = _Patience(resume_s)
    total = sum(file.size_bytes for file in upload.files)
    get = adapter_pb2.GetUploadRequest(name=upload.name)
    while upload.state == adapter_pb2.UPLOAD_STATE_RECEIVING and (sent := committed_bytes(upload)) < total:
        try:
            upload = call(adapters.WriteUpload, _reported(write_requests(folder, upload), sent, total, progress))
        except ClientError as error:
            if not isinstance(error, _PASSING) and error.reason != "UPLOAD_NOT_RECEIVING":
                raise
            patience.wait(error)
            upload = patience.retry(lambda: call(adapters.GetUpload, get))
        patience.see(committed_bytes(upload))
    if progress is not None:
        progress(total, total)
    finish = adapter_pb2.FinishUploadRequest(name=upload.name)
    return patience.retry(lambda: call(adapters.FinishUpload, finish)).version


def _begin(adapters: Any, call: Call, request: adapter_pb2.CreateUploadRequest) -> adapter_pb2.Upload:
    """The upload that an earlier push of the same files left unfinished, or a new one."""
    wanted = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()[:32]
    for repeat in itertools.count():
        request.request_id = f"push-{wanted}-{repeat}"
        upload = call(adapters.CreateUpload, request)
        if upload.state in (adapter_pb2.UPLOAD_STATE_RECEIVING, adapter_pb2.UPLOAD_STATE_VALIDATING):
            return upload
    raise AssertionError("endless")


class _Patience:
    """Waits a little longer each time, and no longer than `limit_s` from the first error after the last progress."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._seen = 0
        self._pause_s = _FIRST_PAUSE_S
        # Not the time of the last progress: a call that brought bytes for an hour may break once.
        self._failing_since: float | None = None

    def see(self, num_bytes: int) -> None:
        if num_bytes != self._seen:
            self._seen, self._pause_s, self._failing_since = num_bytes, _FIRST_PAUSE_S, None

    def wait(self, error: ClientError) -> None:
        """Raises `error` when there has been no progress for too long."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since + self._pause_s > self._limit_s:
            raise error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)

    def retry(self, run: Callable[[], Any]) -> Any:
        while True:
            try:
                return run()
            except Unavailable as error:
                self.wait(error)


def _reported(
    requests: Iterator[adapter_pb2.WriteUploadRequest], sent: int, total: int, progress: Progress | None
) -> Iterator[adapter_pb2.WriteUploadRequest]:
    for request in requests:
        yield request
        sent += len(request.data)
        if progress is not None:
            progress(sent, total)


def differing_files(folder: Path, wanted: Iterable[adapter_pb2.VersionFile]) -> list[str]:
    """The names of files that a PEFT folder and a version do not have alike; none where it is that very version.

    Raises FileNotFoundError for a folder that is no adapter.
    """
    here = {file.name: file.sha256 for file in upload_files(folder)}
    there = {file.name: file.sha256 for file in wanted}
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def receive_folder(
    responses: Iterable[adapter_pb2.DownloadVersionResponse], folder: Path, progress: Progress | None
) -> adapter_pb2.Version:
    """Write a version's files into `folder`, all or none of them; raises FileExistsError, DataLoss."""
    responses = iter(responses)
    manifest = next(responses).manifest
    for wanted in manifest.files:
        if wanted.name not in (*ADAPTER_FILES, DEFAULTS_FILE):
            raise DataLoss(f"the server sends a file {wanted.name!r}, which no adapter has")
        if (folder / wanted.name).exists():
            raise FileExistsError(f"{folder / wanted.name} exists")
    folder.mkdir(parents=True, exist_ok=True)
    partial = {wanted.name: folder / f"{wanted.name}.part" for wanted in manifest.files}
    try:
        total, sent = sum(wanted.size_bytes for wanted in manifest.files), 0
        for path in partial.values():
            path.write_bytes(b"")
        for response in responses:
            with partial[response.chunk.file].open("ab") as file:
                file.write(response.chunk.data)
            sent += len(response.chunk.data)
            if progress is not None:
                progress(sent, total)
        for wanted in manifest.files:
            with partial[wanted.name].open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
                    raise DataLoss(f"{wanted.name}: what arrived is not what the server announced")
        for name, path in partial.items():
            path.rename(folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return manifest.version
