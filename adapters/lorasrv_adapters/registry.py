"""The registry: uploads in, published versions out. One data directory, one process, any number of threads.

A version is published in this order: the bytes are staged, hashed, validated against the base model and synced;
then, under the registry's lock, renamed into the blob store and made visible by one catalogue transaction. Being
killed between any two of these leaves the old state and an upload that can be resumed, or the whole new version;
files that nothing names are swept at the next start.
"""

import base64
import binascii
import errno
import fcntl
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.blobs import BlobStore, file_sha256, make_folder, sync_file
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import (
    AdapterNotFound,
    BaseMismatch,
    ContentRefused,
    DigestMismatch,
    InvalidPage,
    InvalidReference,
    InvalidUpload,
    RegistryUnavailable,
    StorageFull,
    UploadIncomplete,
    UploadNotFound,
    UploadNotReceiving,
    listing,
    quote,
)
from lorasrv_adapters.manifest import FILE_NAMES, ManifestFile, make_manifest
from lorasrv_adapters.peft_format import DEFAULT_MAX_RANK, AdapterSpec, max_file_bytes, validate_folder
from lorasrv_adapters.pins import PinnedBlobs
from lorasrv_adapters.records import Adapter, AdapterPage, ResolvedVersion, Upload, UploadFile, UploadState, Version
from lorasrv_adapters.reference import (
    BASE_ID,
    LATEST,
    AdapterReference,
    BaseReference,
    TagReference,
    check_adapter_id,
    check_digest,
    check_id,
    parse_reference,
)
from lorasrv_adapters.staging import Staging
from lorasrv_adapters.uploads import UploadWriter, UploadWork

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
UPLOAD_TTL_S = 24 * 3600.0


class Registry:
    """The face of all that is stored. Thread-safe: `_lock` guards catalogue, pins and blob names, for milliseconds;
    hashing and validation run outside it, under the upload's own lock, which is always taken first.

    Another tenant's adapters and uploads look exactly like missing ones. Raises RegistryUnavailable when another
    process holds `data_dir` or the catalogue cannot be used, StorageFull when the disk is full.
    """

    def __init__(
        self,
        data_dir: Path,
        base: BaseShapes,
        max_rank: int = DEFAULT_MAX_RANK,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._base = base
        self._max_rank = max_rank
        self._clock = clock
        self._lock = threading.RLock()
        self._work: dict[str, UploadWork] = {}
        with _storage_errors():
            make_folder(data_dir)
            self._owner = _own_folder(data_dir)
            self.blobs = BlobStore(data_dir / "blobs")
            self._staging = Staging(data_dir / "staging")
            self._catalogue = Catalogue(data_dir / "catalogue.sqlite3")
            self._pins = PinnedBlobs(self.blobs, self._catalogue)
            self._sweep()

    def close(self) -> None:
        """Ends use of the data directory; no call may be in progress."""
        self._catalogue.close()
        self._owner.close()

    # Uploads

    def create_upload(self, tenant: str, adapter_id: str, files: Sequence[UploadFile]) -> Upload:
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

    def get_upload(self, tenant: str, upload_id: str) -> Upload:
        """The upload with its committed offsets; raises UploadNotFound."""
        with self._lock, _storage_errors():
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
            return UploadWriter(upload_id, wanted, work, self._staging, _storage_errors)

    def finish_upload(self, tenant: str, upload_id: str) -> Upload:
        """Validate and publish, tagged `latest`; idempotent. Content that is there already is stored once.

        Raises ContentRefused with every reason (also when called again), UploadIncomplete, DigestMismatch (the
        file's offset is back at 0, the upload still receives), UploadNotFound, StorageFull.
        """
        self.get_upload(tenant, upload_id)
        work = self._work_of(upload_id)
        with work.lock, _storage_errors():
            upload = self.get_upload(tenant, upload_id)
            if upload.state is UploadState.FAILED:
                raise ContentRefused(upload.errors)
            if upload.state is UploadState.RECEIVING:
                self._verify_and_publish(upload, work)
            return self.get_upload(tenant, upload_id)

    def _verify_and_publish(self, upload: Upload, work: UploadWork) -> None:
        work.validating = True
        try:
            self._verify_bytes(upload)
            try:
                spec = validate_folder(self._staging.folder(upload.upload_id), self._base, self._max_rank)
            except ContentRefused as error:
                with self._lock:
                    self._catalogue.fail_upload(upload.upload_id, error.errors)
                    self._end_work(upload.upload_id)
                raise
            for file in upload.files:
                sync_file(self._staging.folder(upload.upload_id) / file.name)
            self._publish(upload, spec)
        finally:
            work.validating = False

    def _verify_bytes(self, upload: Upload) -> None:
        for file in upload.files:
            if file.committed_bytes < file.size_bytes:
                raise UploadIncomplete(f"{file.name}: {file.committed_bytes} of {file.size_bytes} bytes have arrived")
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
        )
        with self._lock:
            for file in upload.files:
                self.blobs.put_file(self._staging.folder(upload.upload_id) / file.name, file.sha256)
            self.blobs.put_bytes(manifest.to_bytes())
            self._catalogue.publish(upload, version, [manifest.digest, *(f.sha256 for f in upload.files)], LATEST)
            self._end_work(upload.upload_id)

    # Adapters

    def get_adapter(self, tenant: str, adapter_id: str) -> Adapter:
        """Raises AdapterNotFound."""
        with self._lock:
            adapter = self._catalogue.adapter(tenant, adapter_id)
        if adapter is None:
            raise AdapterNotFound(f"adapter {quote(adapter_id)} not found")
        return adapter

    def list_adapters(self, tenant: str, page_size: int = 0, page_token: str | None = None) -> AdapterPage:
        """Adapters by id; `page_size` 0 means 100, more than 1000 gives 1000. Raises InvalidPage."""
        if page_size < 0:
            raise InvalidPage(f"page_size {page_size} is negative")
        limit = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        after = _parse_page_token(tenant, page_token) if page_token else ""
        with self._lock:
            ids = self._catalogue.adapter_ids(tenant, after, limit + 1)
            adapters = tuple(self.get_adapter(tenant, adapter_id) for adapter_id in ids[:limit])
        return AdapterPage(
            adapters=adapters, next_page_token=_page_token(tenant, ids[limit - 1]) if len(ids) > limit else None
        )

    def delete_adapter(self, tenant: str, adapter_id: str) -> None:
        """Forget an adapter with all its versions; blobs that are pinned or shared stay. Raises AdapterNotFound."""
        with self._lock, _storage_errors():
            blobs = self._catalogue.blobs_of(tenant, adapter_id)
            if not blobs:
                raise AdapterNotFound(f"adapter {quote(adapter_id)} not found")
            self._catalogue.delete_adapter(tenant, adapter_id)
            for digest, names in blobs.items():
                self._pins.release(digest, names)

    def resolve(self, tenant: str, reference: str | AdapterReference) -> ResolvedVersion:
        """The version that a reference means now; asks the catalogue only, never the disk.

        Raises InvalidReference (also for `base` and for a digest prefix of several versions), AdapterNotFound,
        BaseMismatch when the version was validated against another base model.
        """
        parsed = parse_reference(reference) if isinstance(reference, str) else reference
        if isinstance(parsed, BaseReference):
            raise InvalidReference(f"{BASE_ID!r} is the base model, which is no adapter")
        adapter = self.get_adapter(tenant, parsed.adapter_id)
        version = _find_version(adapter, parsed)
        if version.fingerprint != self._base.fingerprint:
            raise BaseMismatch(
                f"adapter {parsed} was validated against base model {version.fingerprint}, not {self._base.fingerprint}"
            )
        return ResolvedVersion(
            tenant=tenant, adapter_id=adapter.adapter_id, digest=version.digest, rank_max=version.rank_max
        )

    # Pins

    def acquire(self, tenant: str, reference: str | AdapterReference) -> ResolvedVersion:
        """`resolve` and `pin` in one, so that no delete comes between."""
        with self._lock:
            resolved = self.resolve(tenant, reference)
            self._pins.pin(resolved.digest)
        return resolved

    def pin(self, digest: str) -> None:
        """Keep a version's blobs until `unpin`, even if it is deleted; counted. Raises AdapterNotFound."""
        with self._lock:
            self._pins.pin(digest)

    def unpin(self, digest: str) -> None:
        """Undo one `pin`; the last one of a deleted version removes its blobs."""
        with self._lock, _storage_errors():
            self._pins.unpin(digest)

    @property
    def num_pins(self) -> int:
        with self._lock:
            return self._pins.num_pins

    # Housekeeping

    def reap(self) -> int:
        """Drop expired uploads with their staged bytes; returns how many. Call it now and then."""
        now = self._clock()
        with self._lock:
            expired = [upload.upload_id for upload in self._catalogue.uploads() if upload.expire_time <= now]
        return sum(self._reap_one(upload_id) for upload_id in expired)

    def check(self) -> None:
        """Raises AssertionError on a broken invariant."""
        with self._lock:
            self._catalogue.check()
            wanted = self._catalogue.all_blobs() | self._pins.kept_blobs()
            present = set(self.blobs.digests())
            assert present == wanted, (present, wanted)
            receiving = {u.upload_id for u in self._catalogue.uploads() if u.state is UploadState.RECEIVING}
            assert set(self._staging.upload_ids()) <= receiving
            self._pins.check()

    def _reap_one(self, upload_id: str) -> bool:
        work = self._work_of(upload_id)
        if not work.lock.acquire(blocking=False):
            return False
        try:
            with self._lock, _storage_errors():
                self._catalogue.delete_upload(upload_id)
                self._end_work(upload_id)
            return True
        finally:
            work.lock.release()

    def _sweep(self) -> None:
        """At start-up: remove what a killed process left that nothing names."""
        receiving = {u.upload_id for u in self._catalogue.uploads() if u.state is UploadState.RECEIVING}
        for upload_id in self._staging.upload_ids():
            if upload_id not in receiving:
                self._staging.remove(upload_id)
        self.blobs.remove_partial()
        wanted = self._catalogue.all_blobs()
        for digest in self.blobs.digests():
            if digest not in wanted:
                self.blobs.delete(digest)
        self.reap()

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
        upload = self.get_upload(tenant, upload_id)
        if upload.state is not UploadState.RECEIVING:
            raise UploadNotReceiving(f"upload {upload_id} is {upload.state.value}")
        return upload

    def _check_files(self, files: Sequence[UploadFile]) -> None:
        if sorted(file.name for file in files) != sorted(FILE_NAMES):
            raise InvalidUpload(
                f"files {listing(file.name for file in files) or 'none'}: an adapter is exactly {listing(FILE_NAMES)}"
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


def _find_version(adapter: Adapter, reference: AdapterReference) -> Version:
    if isinstance(reference, TagReference):
        digest = adapter.tags.get(reference.tag)
        found = [version for version in adapter.versions if version.digest == digest]
    else:
        found = [version for version in adapter.versions if version.digest.startswith(reference.prefix)]
    if not found:
        raise AdapterNotFound(f"adapter version {reference} not found")
    if len(found) > 1:
        raise InvalidReference(f"{reference} is a prefix of {len(found)} versions; write more digits")
    return found[0]


def _page_token(tenant: str, last_id: str) -> str:
    return base64.urlsafe_b64encode(f"{tenant}/{last_id}".encode()).decode()


def _parse_page_token(tenant: str, token: str) -> str:
    """The id after which the page begins. A token only names a position, so a made-up one reveals nothing."""
    try:
        owner, _, last_id = base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii").partition("/")
        if owner == tenant:
            return check_adapter_id(last_id)
    except (binascii.Error, ValueError, InvalidReference):
        pass
    raise InvalidPage(f"page_token {quote(token)} was not given out for this list")


def _own_folder(data_dir: Path) -> IO[bytes]:
    """Lock the data directory for this process; the lock ends with the process."""
    file = (data_dir / "owner.lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RegistryUnavailable("the registry's data directory is in use by another process") from None
    return file


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("the registry's disk is full") from error
        raise RegistryUnavailable(
            f"the registry's disk fails: {errno.errorcode.get(error.errno or 0, 'OSError')}"
        ) from error
