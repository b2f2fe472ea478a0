"""Uploads: announced, received, finished, cancelled and reaped; `publishing` makes versions of them."""

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from lorasrv_adapters.blobs import BlobStore, file_sha256, storage_errors
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import (
    AdapterExists,
    ContentRefused,
    InvalidReference,
    InvalidUpload,
    QuotaExceeded,
    UploadNotFound,
    UploadNotReceiving,
    listing,
    quote,
)
from lorasrv_adapters.imports import announced, open_source
from lorasrv_adapters.limits import RegistryLimits
from lorasrv_adapters.manifest import FILE_NAMES, FILE_SETS, SERVING_FILE
from lorasrv_adapters.publishing import Publisher
from lorasrv_adapters.records import Upload, UploadFile, UploadState
from lorasrv_adapters.reference import check_adapter_id, check_digest, check_id
from lorasrv_adapters.replays import Replays
from lorasrv_adapters.staging import Staging
from lorasrv_adapters.tenant_bytes import TenantBytes
from lorasrv_adapters.upload_catalogue import UploadCatalogue
from lorasrv_adapters.upload_writer import UploadWork, UploadWriter

_IMPORT_CHUNK_BYTES = 1 << 20


class Uploads:
    """The upload half of the registry. Thread-safe: shares the registry's `lock` for catalogue, pins and blob names;
    receiving, hashing and validating run under the upload's own lock, which is always taken first.
    """

    def __init__(
        self,
        *,
        limits: RegistryLimits,
        clock: Callable[[], float],
        lock: threading.RLock,
        catalogue: Catalogue,
        uploads: UploadCatalogue,
        replays: Replays,
        blobs: BlobStore,
        staging: Staging,
        tenant_bytes: TenantBytes,
        publisher: Publisher,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = lock
        self._catalogue = catalogue
        self._uploads = uploads
        self._replays = replays
        self._blobs = blobs
        self._staging = staging
        self._tenant_bytes = tenant_bytes
        self._publisher = publisher
        self._work: dict[str, UploadWork] = {}

    def create(
        self,
        tenant: str,
        adapter_id: str,
        files: Sequence[UploadFile],
        *,
        create_only: bool = False,
        request_id: str | None = None,
    ) -> Upload:
        """Announce a new version's files by name, size and sha256. What this tenant stores already is not sent again.

        The same `request_id` gives the same upload, as it is now. Raises InvalidReference, InvalidUpload,
        QuotaExceeded, RequestIdReused, and AdapterExists when `create_only` is set and the name is taken.
        """
        plain = tuple(UploadFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in files)
        call = ("create_upload", adapter_id, plain, create_only)
        return self._create(tenant, adapter_id, plain, create_only, request_id, call)

    def import_folder(
        self, tenant: str, adapter_id: str, source: str, *, create_only: bool = False, request_id: str | None = None
    ) -> Upload:
        """Publish a folder below the tenant's import folder, as if it were uploaded; the same `request_id` goes on.

        Raises ImportRefused, and what `create`, the writer and `finish` raise.
        """
        call = ("import", adapter_id, source, create_only)
        if request_id is not None:
            with self._lock:
                known = self._replays.find(tenant, request_id, call)
            if known is not None and self.get(tenant, known).state is not UploadState.RECEIVING:
                return self.finish(tenant, known)
        with (
            open_source(self._limits.import_root, tenant, source, self._publisher.max_file_bytes) as files,
            storage_errors(),
        ):
            upload = self._create(tenant, adapter_id, announced(files), create_only, request_id, call)
            try:
                for name, file in files.items():
                    writer = self.open_writer(tenant, upload.upload_id, name)
                    file.seek(writer.offset)
                    while data := file.read(_IMPORT_CHUNK_BYTES):
                        writer.write(writer.offset, data)
                return self.finish(tenant, upload.upload_id)
            except BaseException:
                if request_id is None and self.get(tenant, upload.upload_id).state is UploadState.RECEIVING:
                    # Nobody can go on with it.
                    self.cancel(tenant, upload.upload_id)
                raise

    def _create(
        self,
        tenant: str,
        adapter_id: str,
        files: tuple[UploadFile, ...],
        create_only: bool,
        request_id: str | None,
        call: tuple[object, ...],
    ) -> Upload:
        check_id(tenant, "tenant id")
        check_adapter_id(adapter_id)
        self._check_files(files)
        with self._lock:
            upload_id = self._replays.once(
                tenant,
                request_id,
                call,
                lambda: self._insert(tenant, adapter_id, files, create_only),
                save=str,
                load=str,
            )
        self._take_owned(tenant, upload_id)
        return self.get(tenant, upload_id)

    def _insert(self, tenant: str, adapter_id: str, files: tuple[UploadFile, ...], create_only: bool) -> str:
        if create_only:
            self._require_new(tenant, adapter_id)
        if self._uploads.num_receiving(tenant) >= self._limits.open_uploads:
            raise QuotaExceeded(f"{self._limits.open_uploads} uploads are under way, which is the limit")
        to_send = [file for file in files if not self._catalogue.owns_blob(tenant, file.sha256)]
        self._tenant_bytes.check_room(tenant, sum(file.size_bytes for file in to_send))
        now = self._clock()
        upload = Upload(
            tenant=tenant,
            upload_id=secrets.token_hex(16),
            adapter_id=adapter_id,
            state=UploadState.RECEIVING,
            files=files,
            errors=(),
            version=None,
            create_time=now,
            expire_time=now + self._limits.upload_ttl_s,
            create_only=create_only,
        )
        self._uploads.insert(upload)
        return upload.upload_id

    def _take_owned(self, tenant: str, upload_id: str) -> None:
        """Stage the files whose bytes the tenant has, if they are in order."""
        work = self._work_of(upload_id)
        with work.lock, storage_errors():
            upload = self.get(tenant, upload_id)
            if upload.state is not UploadState.RECEIVING:
                return
            for file in upload.files:
                if file.committed_bytes == 0 and self._share(tenant, upload_id, file):
                    path = self._staging.path(upload_id, file.name)
                    with path.open("rb") as staged:
                        in_order = file_sha256(staged) == file.sha256 and staged.tell() == file.size_bytes
                    if not in_order:
                        self._staging.reset(upload_id, file.name)

    def _share(self, tenant: str, upload_id: str, file: UploadFile) -> bool:
        with self._lock:
            if not self._catalogue.owns_blob(tenant, file.sha256) or not self._blobs.has(file.sha256):
                return False
            try:
                self._staging.share(upload_id, file.name, self._blobs.path(file.sha256))
            except OSError:
                # A file system without hard links: the bytes are sent once more.
                return False
            return True

    def get(self, tenant: str, upload_id: str) -> Upload:
        """The upload with its committed offsets; raises UploadNotFound."""
        with self._lock, storage_errors():
            upload = self._uploads.find(tenant, upload_id)
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
            return UploadWriter(tenant, upload_id, wanted, work, self._staging, self._tenant_bytes)

    def finish(self, tenant: str, upload_id: str) -> Upload:
        """Validate and publish, tagged `latest`; idempotent. Content that is there already is stored once.

        Raises ContentRefused with every reason (also when called again), UploadIncomplete, DigestMismatch (the
        file's offset is back at 0, the upload still receives), UploadNotFound, UploadNotReceiving once cancelled,
        AdapterExists, StorageFull.
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
        if upload.state is UploadState.CANCELLED:
            raise UploadNotReceiving(f"upload {upload_id} is cancelled")
        return upload

    def cancel(self, tenant: str, upload_id: str) -> Upload:
        """End an upload and drop what has arrived; idempotent.

        Raises UploadNotFound, UploadNotReceiving once it is validating, published or failed.
        """
        upload = self.get(tenant, upload_id)
        if upload.state is UploadState.CANCELLED:
            return upload
        self._require_receiving(tenant, upload_id)
        work = self._work_of(upload_id)
        with work.lock, self._lock, storage_errors():
            if self.get(tenant, upload_id).state is not UploadState.CANCELLED:
                self._require_receiving(tenant, upload_id)
                self._uploads.cancel(upload_id)
                self._end_work(upload_id)
        return self.get(tenant, upload_id)

    def _verify_and_publish(self, upload: Upload, work: UploadWork) -> None:
        work.validating = True
        try:
            spec = self._publisher.verify(upload)
            with self._lock:
                if upload.create_only:
                    self._require_new(upload.tenant, upload.adapter_id)
                self._publisher.publish(upload, spec)
                self._end_work(upload.upload_id)
        except ContentRefused as error:
            with self._lock:
                self._uploads.fail(upload.upload_id, error.errors)
                self._end_work(upload.upload_id)
        finally:
            work.validating = False

    def reap(self) -> int:
        """Drop expired uploads that nothing is using, with their staged bytes; returns how many."""
        now = self._clock()
        with self._lock:
            expired = self._uploads.expired(now)
        return sum(self._reap_one(upload_id) for upload_id in expired)

    def _reap_one(self, upload_id: str) -> bool:
        work = self._work_of(upload_id)
        if not work.lock.acquire(blocking=False):
            return False
        try:
            with self._lock, storage_errors():
                self._replays.forget(upload_id)
                self._uploads.delete(upload_id)
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
        self._tenant_bytes.drop_upload(upload_id)
        work = self._work.pop(upload_id, None)
        if work is not None:
            work.ended = True

    def _require_new(self, tenant: str, adapter_id: str) -> None:
        found = self._catalogue.adapter(tenant, adapter_id)
        if found is not None:
            how = "exists" if found.delete_time is None else "is deleted, but can still be undeleted"
            raise AdapterExists(f"adapter {quote(adapter_id)} {how}")

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
        for file in files:
            limit = self._publisher.max_file_bytes[file.name]
            if not 0 <= file.size_bytes <= limit:
                raise InvalidUpload(f"{file.name}: size {file.size_bytes} is not within 0 and {limit} bytes")
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
