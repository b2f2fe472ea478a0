"""The registry: uploads in, published versions out. One data directory, one process, any number of threads.

A version is published in this order: the bytes are staged, hashed, validated against the base model and synced;
then, under the registry's lock, renamed into the blob store and made visible by one catalogue transaction. Being
killed between any two of these leaves the old state and an upload that can be resumed, or the whole new version;
files that nothing names are swept at the next start.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from lorasrv_adapters.adapters import Adapters
from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.blobs import BlobStore, make_folder, storage_errors
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.data_dir import CATALOGUE_FILE, own_folder
from lorasrv_adapters.database import Database
from lorasrv_adapters.downloads import Download
from lorasrv_adapters.errors import (
    AdapterNotFound,
    BaseMismatch,
    CorruptBlob,
    InvalidReference,
    VersionQuarantined,
)
from lorasrv_adapters.limits import RegistryLimits
from lorasrv_adapters.manifest import Manifest
from lorasrv_adapters.page_tokens import PageTokens
from lorasrv_adapters.peft_format import DEFAULT_MAX_RANK, SpecCheck, accept_all
from lorasrv_adapters.pins import PinnedBlobs
from lorasrv_adapters.published import verify_version
from lorasrv_adapters.publishing import Publisher
from lorasrv_adapters.records import Adapter, ResolvedVersion, Version, VersionState, VersionUse
from lorasrv_adapters.reference import BASE_ID, AdapterReference, BaseReference, TagReference, parse_reference
from lorasrv_adapters.replays import Replays
from lorasrv_adapters.staging import Staging
from lorasrv_adapters.tenant_bytes import TenantBytes
from lorasrv_adapters.upload_catalogue import UploadCatalogue
from lorasrv_adapters.uploads import Uploads

_NO_LIMITS = RegistryLimits()


class Registry:
    """The face of all that is stored: `uploads` in, `adapters` to look at and change, and here what serving needs.

    Thread-safe: `_lock` guards catalogue, pins and blob names, for milliseconds; hashing and validation run outside
    it, under the upload's own lock, which is always taken first.

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
        limits: RegistryLimits = _NO_LIMITS,
        check: SpecCheck = accept_all,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._base = base
        self._clock = clock
        self._lock = threading.RLock()
        self._uses: dict[tuple[str, str, str], VersionUse] = {}
        with ExitStack() as undo, storage_errors():
            make_folder(data_dir)
            undo.callback(own_folder(data_dir).close)
            self.blob_root = data_dir / "blobs"
            self.blobs = BlobStore(self.blob_root)
            self._staging = Staging(data_dir / "staging")
            database = Database(data_dir / CATALOGUE_FILE)
            undo.callback(database.close)
            self._catalogue = Catalogue(database, base.fingerprint)
            self._uploads = UploadCatalogue(database, self._catalogue)
            self._replays = Replays(database, clock)
            self._pins = PinnedBlobs(self.blobs, self._catalogue)
            self._tenant_bytes = TenantBytes(self._catalogue, self._lock, limits.tenant_bytes)
            self.adapters = Adapters(
                limits=limits,
                clock=clock,
                lock=self._lock,
                catalogue=self._catalogue,
                pins=self._pins,
                replays=self._replays,
                tokens=PageTokens(database),
            )
            publisher = Publisher(
                base=base,
                max_rank=max_rank,
                check=check,
                clock=clock,
                catalogue=self._catalogue,
                blobs=self.blobs,
                pins=self._pins,
                staging=self._staging,
                tenant_bytes=self._tenant_bytes,
            )
            self.uploads = Uploads(
                limits=limits,
                clock=clock,
                lock=self._lock,
                catalogue=self._catalogue,
                uploads=self._uploads,
                replays=self._replays,
                blobs=self.blobs,
                staging=self._staging,
                tenant_bytes=self._tenant_bytes,
                publisher=publisher,
            )
            self._recover()
            self._open = undo.pop_all()

    def close(self) -> None:
        """Ends use of the data directory; no call may be in progress."""
        self._open.close()

    def resolve(self, tenant: str, reference: str | AdapterReference) -> ResolvedVersion:
        """The version that a reference means now; asks the catalogue only, never the disk.

        Raises InvalidReference (also for `base` and for a digest prefix of several versions), AdapterNotFound,
        BaseMismatch when the version was validated against another base model, VersionQuarantined.
        """
        parsed = parse_reference(reference) if isinstance(reference, str) else reference
        if isinstance(parsed, BaseReference):
            raise InvalidReference(f"{BASE_ID!r} is the base model, which is no adapter")
        adapter = self.adapters.get(tenant, parsed.adapter_id)
        version = _find_version(adapter, parsed)
        if version.state is VersionState.QUARANTINED:
            raise VersionQuarantined(f"adapter {parsed}: stored bytes are damaged; publish the same content again")
        if version.state is VersionState.INCOMPATIBLE:
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
            key = (tenant, resolved.adapter_id, resolved.digest)
            hits = self._uses[key].hits if key in self._uses else 0
            self._uses[key] = VersionUse(hits=hits + 1, last_use_time=self._clock())
        return resolved

    def use(self, tenant: str, adapter_id: str, digest: str) -> VersionUse | None:
        """How often a version was acquired by this name since the registry was opened."""
        with self._lock:
            return self._uses.get((tenant, adapter_id, digest))

    def quarantine(self, digest: str) -> None:
        """A version is said to be damaged: if its blobs are, refuse it until its content is published again."""
        with suppress(CorruptBlob):
            self._read_again(digest)

    def verify(self, tenant: str, adapter_id: str, digest: str) -> tuple[Version, Manifest]:
        """Read all bytes of a version again. Raises AdapterNotFound; CorruptBlob when they are not what its digest
        says, and then it is quarantined."""
        with self._lock:
            self.adapters.version(tenant, adapter_id, digest)
            self._pins.pin(digest)
        try:
            manifest = self._read_again(digest)
            return self.adapters.version(tenant, adapter_id, digest), manifest
        finally:
            self.unpin(digest)

    def download(self, tenant: str, adapter_id: str, digest: str) -> Download:
        """Pin a version to read its files; whoever asks closes it. Raises AdapterNotFound."""
        with self._lock:
            version = self.adapters.version(tenant, adapter_id, digest)
            self._pins.pin(digest)
        return Download(version, self.blobs, quarantine=self.quarantine, unpin=self.unpin)

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
        """Drop what has expired: uploads with their staged bytes, deleted adapters; returns how many."""
        with self._lock:
            self._replays.reap()
        num_reaped = self.uploads.reap() + self.adapters.reap()
        with self._lock:
            for key in [key for key in self._uses if self._catalogue.version(*key) is None]:
                del self._uses[key]
        return num_reaped

    def check(self) -> None:
        """Raises AssertionError on a broken invariant."""
        with self._lock:
            self._catalogue.check()
            present, kept = set(self.blobs.digests()), self._pins.kept_blobs()
            missing = self._catalogue.all_blobs(quarantined=False) - present
            extra = present - self._catalogue.all_blobs() - kept
            assert not missing and not extra, (missing, extra)
            receiving = {upload.upload_id for upload in self._uploads.receiving()}
            assert set(self._staging.upload_ids()) <= receiving
            for (upload_id, name), num_bytes in self._tenant_bytes.staged().items():
                assert num_bytes == self._staging.own_bytes(upload_id, name), (upload_id, name)
            self._pins.check()

    def _read_again(self, digest: str) -> Manifest:
        """Quarantines a version whose blobs are damaged, and raises CorruptBlob."""
        try:
            with storage_errors():
                return verify_version(self.blobs, digest)
        except CorruptBlob:
            with self._lock:
                self._catalogue.quarantine(digest)
            raise

    def _recover(self) -> None:
        """At start-up: remove what a killed process left that nothing names, and see what has gone missing."""
        receiving = {upload.upload_id: upload for upload in self._uploads.receiving()}
        for upload_id in self._staging.upload_ids():
            if upload_id not in receiving:
                self._staging.remove(upload_id)
        for upload in receiving.values():
            for file in upload.files:
                staged = self._staging.own_bytes(upload.upload_id, file.name)
                self._tenant_bytes.add(upload.tenant, upload.upload_id, file.name, staged, force=True)
        self.blobs.remove_partial()
        wanted = self._catalogue.all_blobs()
        present = set(self.blobs.digests())
        for digest in present - wanted:
            self.blobs.delete(digest)
        for blob in wanted - present:
            for digest in self._catalogue.versions_with(blob):
                self._catalogue.quarantine(digest)
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
