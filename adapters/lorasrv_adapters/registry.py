"""The registry: uploads in, published versions out. One data directory, one process, any number of threads.

A version is published in this order: the bytes are staged, hashed, validated against the base model and synced;
then, under the registry's lock, renamed into the blob store and made visible by one catalogue transaction. Being
killed between any two of these leaves the old state and an upload that can be resumed, or the whole new version;
files that nothing names are swept at the next start.
"""

import base64
import binascii
import fcntl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.blobs import BlobStore, make_folder, storage_errors
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import (
    AdapterNotFound,
    BaseMismatch,
    InvalidPage,
    InvalidReference,
    RegistryUnavailable,
    quote,
)
from lorasrv_adapters.peft_format import DEFAULT_MAX_RANK, SpecCheck, accept_all
from lorasrv_adapters.pins import PinnedBlobs
from lorasrv_adapters.publishing import Publisher
from lorasrv_adapters.records import Adapter, AdapterPage, ResolvedVersion, Upload, UploadFile, UploadState, Version
from lorasrv_adapters.reference import (
    BASE_ID,
    AdapterReference,
    BaseReference,
    TagReference,
    check_adapter_id,
    parse_reference,
)
from lorasrv_adapters.staging import Staging
from lorasrv_adapters.uploads import UploadWriter

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


class Registry:
    """The face of all that is stored. Thread-safe: `_lock` guards catalogue, pins and blob names, for milliseconds;
    hashing and validation run outside it, under the upload's own lock, which is always taken first.

    Another tenant's adapters and uploads look exactly like missing ones. Raises RegistryUnavailable when another
    process holds `data_dir` or the catalogue cannot be used, StorageFull when the disk is full. `check` is what the
    server asks of an adapter beyond what its base model asks.
    """

    def __init__(
        self,
        data_dir: Path,
        base: BaseShapes,
        max_rank: int = DEFAULT_MAX_RANK,
        *,
        check: SpecCheck = accept_all,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._base = base
        self._lock = threading.RLock()
        with ExitStack() as undo, storage_errors():
            make_folder(data_dir)
            undo.callback(_own_folder(data_dir).close)
            self.blob_root = data_dir / "blobs"
            self.blobs = BlobStore(self.blob_root)
            self._staging = Staging(data_dir / "staging")
            self._catalogue = Catalogue(data_dir / "catalogue.sqlite3")
            undo.callback(self._catalogue.close)
            self._pins = PinnedBlobs(self.blobs, self._catalogue)
            self._publisher = Publisher(
                base=base,
                max_rank=max_rank,
                check=check,
                clock=clock,
                lock=self._lock,
                catalogue=self._catalogue,
                blobs=self.blobs,
                pins=self._pins,
                staging=self._staging,
            )
            self._sweep()
            self._open = undo.pop_all()

    def close(self) -> None:
        """Ends use of the data directory; no call may be in progress."""
        self._open.close()

    def create_upload(self, tenant: str, adapter_id: str, files: Sequence[UploadFile]) -> Upload:
        """Announce a new version's files by name, size and sha256: see `Publisher.create`."""
        return self._publisher.create(tenant, adapter_id, files)

    def get_upload(self, tenant: str, upload_id: str) -> Upload:
        """The upload with its committed offsets: see `Publisher.get`."""
        return self._publisher.get(tenant, upload_id)

    def open_writer(self, tenant: str, upload_id: str, file: str) -> UploadWriter:
        """Take over writing a file from whoever writes it: see `Publisher.open_writer`."""
        return self._publisher.open_writer(tenant, upload_id, file)

    def finish_upload(self, tenant: str, upload_id: str) -> Upload:
        """Validate and publish, tagged `latest`; idempotent: see `Publisher.finish`."""
        return self._publisher.finish(tenant, upload_id)

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
        with self._lock, storage_errors():
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
            tenant=tenant,
            adapter_id=adapter.adapter_id,
            digest=version.digest,
            rank_max=version.rank_max,
            serving=version.serving,
        )

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
        with self._lock, storage_errors():
            self._pins.unpin(digest)

    @property
    def num_pins(self) -> int:
        with self._lock:
            return self._pins.num_pins

    def reap(self) -> int:
        """Drop expired uploads with their staged bytes; returns how many. Call it now and then."""
        return self._publisher.reap()

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
    refusal = InvalidPage(f"page_token {quote(token)} was not given out for this list")
    try:
        owner, _, last_id = base64.b64decode(token, altchars=b"-_", validate=True).decode("ascii").partition("/")
        check_adapter_id(last_id)
    except (binascii.Error, ValueError, InvalidReference):
        raise refusal from None
    if owner != tenant:
        raise refusal
    return last_id


def _own_folder(data_dir: Path) -> IO[bytes]:
    """Lock the data directory for this process; the lock ends with the process."""
    file = (data_dir / "owner.lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RegistryUnavailable("the registry's data directory is in use by another process") from None
    return file
