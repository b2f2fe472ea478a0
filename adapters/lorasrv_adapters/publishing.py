"""From announced files to a published version: receive, verify, validate, publish. See `registry` for the order."""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.blobs import BlobStore, file_sha256, storage_errors, sync_file
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import (
    ContentRefused,
    DigestMismatch,
    InvalidReference,
    InvalidUpload,
    UploadIncomplete,
    UploadNotFound,
    UploadNotReceiving,
    listing,
    quote,
)
from lorasrv_adapters.manifest import FILE_NAMES, FILE_SETS, SERVING_FILE, ManifestFile, make_manifest
from lorasrv_adapters.peft_format import AdapterSpec, SpecCheck, max_file_bytes, validate_folder
from lorasrv_adapters.pins import PinnedBlobs
from lorasrv_adapters.records import Upload, UploadFile, UploadState, Version
from lorasrv_adapters.reference import LATEST, check_adapter_id, check_digest, check_id
from lorasrv_adapters.staging import Staging
from lorasrv_adapters.uploads import UploadWork, UploadWriter

UPLOAD_TTL_S = 24 * 3600.0


class Publisher:
    """The upload half of the registry. Thread-safe: shares the registry's `lock` for catalogue, pins and blob names;
    receiving, hashing and validating run under the upload's own lock, which is always taken first.
    """

    def __init__(
        self,
        *,
        base: BaseShapes,
        max_rank: int,
        check: SpecCheck,
        clock: Callable[[], float],
        lock: threading.RLock,
        catalogue: Catalogue,
        blobs: BlobStore,
        pins: PinnedBlobs,
        staging: Staging,
    ) -> None:
        self._base = base
        self._max_rank = max_rank
        self._check = check
        self._clock = clock
        self._lock = lock
        self._catalogue = catalogue
        self._blobs = blobs
        self._pins = pins
        self._staging = staging
        self._work: dict[str, UploadWork] = {}

    def create(self, tenant: str, adapter_id: str, files: Sequence[UploadFile]) -> Upload:
        """Announce a new version's files; raises InvalidReference, InvalidUpload."""
        check_id(tenant, "tenant id")
        check_adapter_id(adapter_id)
        self._check_files(files)
        now = self._clock()
        upload = Upload(
            tenant=tenant,
            upload_id=secrets.token_hex(16),
            adapter_id=adapter_id,
            state=UploadState.RECEIVING,
            files=tuple(UploadFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in files),
            errors=(),
            version=None,
            create_time=now,
            expire_time=now + UPLOAD_TTL_S,
        )
        with self._lock:
            self._catalogue.insert_upload(upload)
        return upload

    def get(self, tenant: str, upload_id: str) -> Upload:
        """The upload with its committed offsets; raises UploadNotFound."""
        with self._lock, storage_errors():
            upload = self._catalogue.upload(tenant, upload_id)
            if upload is None:
                raise UploadNotFound(f"upload {quote(upload_id)} not found")
            work = self._work.get(upload_id)
            return _with_progress(upload, self._staging, validating=work is not None and work.validating)

    def open_writer(self, tenant: str, upload_id: str, file: str) -> UploadWriter:
        """Take over writing a file; an older writer of it gets UploadSuperseded.

        Raises UploadNotFound, InvalidUpload for a file that was not announced, UploadNotReceiving.
        """
        upload = self._require_receiving(tenant, upload_id)
        wanted = next((known for known in upload.files if known.name == file), None)
        if wanted is None:
            raise InvalidUpload(f"file {quote(file)} is not one of {listing(f.name for f in upload.files)}")
        work = self._work_of(upload_id)
        with work.lock:
            self._require_receiving(tenant, upload_id)
            return UploadWriter(upload_id, wanted, work, self._staging)

    def finish(self, tenant: str, upload_id: str) -> Upload:
        """Validate and publish, tagged `latest`; idempotent. Content that is there already is stored once.

        Raises ContentRefused with every reason (also when called again), UploadIncomplete, DigestMismatch (the
        file's offset is back at 0, the upload still receives), UploadNotFound, StorageFull.
        """
        upload = self.get(tenant, upload_id)
        if upload.state in (UploadState.RECEIVING, UploadState.VALIDATING):
            work = self._work_of(upload_id)
            with work.lock, storage_errors():
                upload = self.get(tenant, upload_id)
                if upload.state is UploadState.RECEIVING:
                    self._verify_and_publish(upload, work)
                    upload = self.get(tenant, upload_id)
        if upload.state is UploadState.FAILED:
            raise ContentRefused(upload.errors)
        return upload

    def _verify_and_publish(self, upload: Upload, work: UploadWork) -> None:
        work.validating = True
        try:
            self._verify_bytes(upload)
            try:
                folder = self._staging.folder(upload.upload_id)
                spec = validate_folder(folder, self._base, self._max_rank, self._check)
            except ContentRefused as error:
                with self._lock:
                    self._catalogue.fail_upload(upload.upload_id, error.errors)
                    self._end_work(upload.upload_id)
                return
            for file in upload.files:
                sync_file(self._staging.folder(upload.upload_id) / file.name)
            self._publish(upload, spec)
        finally:
            work.validating = False

    def _verify_bytes(self, upload: Upload) -> None:
        short = [file for file in upload.files if file.committed_bytes < file.size_bytes]
        if short:
            states = "; ".join(f"{file.name}: {file.committed_bytes} of {file.size_bytes}" for file in short)
            raise UploadIncomplete(f"bytes that have arrived: {states}")
        wrong: list[str] = []
        for file in upload.files:
            with self._staging.touch(upload.upload_id, file.name).open("rb") as staged:
                found = file_sha256(staged)
            if found != file.sha256:
                self._staging.reset(upload.upload_id, file.name)
                wrong.append(f"{file.name}: sha256 of what arrived is {found}, not {file.sha256}")
        if wrong:
            raise DigestMismatch("; ".join(wrong))

    def _publish(self, upload: Upload, spec: AdapterSpec) -> None:
        manifest = make_manifest(
            [ManifestFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in upload.files]
        )
        version = Version(
            digest=manifest.digest,
            rank_min=spec.rank_min,
            rank_max=spec.rank_max,
            target_modules=spec.target_modules,
            size_bytes=manifest.size_bytes,
            fingerprint=self._base.fingerprint,
            create_time=self._clock(),
            serving=spec.serving,
        )
        names = [manifest.digest, *(file.sha256 for file in upload.files)]
        with self._lock:
            try:
                for file in upload.files:
                    self._blobs.put_file(self._staging.folder(upload.upload_id) / file.name, file.sha256)
                self._blobs.put_bytes(manifest.to_bytes())
                self._catalogue.publish(upload, version, names, LATEST)
            except BaseException:
                self._pins.delete_unneeded(names)
                raise
            self._end_work(upload.upload_id)

    def reap(self) -> int:
        """Drop expired uploads that nothing is using, with their staged bytes; returns how many."""
        now = self._clock()
        with self._lock:
            expired = [upload.upload_id for upload in self._catalogue.uploads() if upload.expire_time <= now]
        return sum(self._reap_one(upload_id) for upload_id in expired)

    def _reap_one(self, upload_id: str) -> bool:
        work = self._work_of(upload_id)
        if not work.lock.acquire(blocking=False):
            return False
        try:
            with self._lock, storage_errors():
                self._catalogue.delete_upload(upload_id)
                self._end_work(upload_id)
            return True
        finally:
            work.lock.release()

    def _work_of(self, upload_id: str) -> UploadWork:
        with self._lock:
            return self._work.setdefault(upload_id, UploadWork())

    def _end_work(self, upload_id: str) -> None:
        """Under both locks, when an upload has ended: its writers stop, its staged bytes go."""
        self._staging.remove(upload_id)
        work = self._work.pop(upload_id, None)
        if work is not None:
            work.ended = True

    def _require_receiving(self, tenant: str, upload_id: str) -> Upload:
        upload = self.get(tenant, upload_id)
        if upload.state is not UploadState.RECEIVING:
            raise UploadNotReceiving(f"upload {upload_id} is {upload.state.value}")
        return upload

    def _check_files(self, files: Sequence[UploadFile]) -> None:
        if tuple(sorted(file.name for file in files)) not in FILE_SETS:
            raise InvalidUpload(
                f"files {listing(file.name for file in files) or 'none'}: an adapter is exactly {listing(FILE_NAMES)}, "
                f"and {SERVING_FILE} if it has defaults"
            )
        limits = max_file_bytes(self._base, self._max_rank)
        for file in files:
            if not 0 <= file.size_bytes <= limits[file.name]:
                raise InvalidUpload(
                    f"{file.name}: size {file.size_bytes} is not within 0 and {limits[file.name]} bytes"
                )
            try:
                check_digest(file.sha256)
            except InvalidReference as error:
                raise InvalidUpload(f"{file.name}: {error}") from None


def _with_progress(upload: Upload, staging: Staging, *, validating: bool) -> Upload:
    ended = upload.state in (UploadState.PUBLISHED, UploadState.FAILED)
    files = tuple(
        UploadFile(
            name=file.name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            committed_bytes=file.size_bytes if ended else staging.size(upload.upload_id, file.name),
        )
        for file in upload.files
    )
    return replace(upload, files=files, state=UploadState.VALIDATING if validating and not ended else upload.state)
