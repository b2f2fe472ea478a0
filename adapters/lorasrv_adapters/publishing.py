"""From the bytes of an upload to a published version: verify, validate, publish. See `registry` for the order."""

from collections.abc import Callable

from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.blobs import BlobStore, file_sha256, sync_file
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import DigestMismatch, UploadIncomplete
from lorasrv_adapters.manifest import ManifestFile, make_manifest
from lorasrv_adapters.peft_format import AdapterSpec, SpecCheck, max_file_bytes, validate_folder
from lorasrv_adapters.pins import PinnedBlobs
from lorasrv_adapters.records import Upload, Version
from lorasrv_adapters.reference import LATEST
from lorasrv_adapters.staging import Staging
from lorasrv_adapters.tenant_bytes import TenantBytes


class Publisher:
    """Used under the upload's lock. `max_file_bytes` is the most that each file of an adapter can have."""

    def __init__(
        self,
        *,
        base: BaseShapes,
        max_rank: int,
        check: SpecCheck,
        clock: Callable[[], float],
        catalogue: Catalogue,
        blobs: BlobStore,
        pins: PinnedBlobs,
        staging: Staging,
        tenant_bytes: TenantBytes,
    ) -> None:
        self.max_file_bytes = max_file_bytes(base, max_rank)
        self._base = base
        self._max_rank = max_rank
        self._check = check
        self._clock = clock
        self._catalogue = catalogue
        self._blobs = blobs
        self._pins = pins
        self._staging = staging
        self._tenant_bytes = tenant_bytes

    def verify(self, upload: Upload) -> AdapterSpec:
        """What has arrived, if it is whole and can be served; it is then safe on the disk.

        Raises UploadIncomplete, DigestMismatch after resetting the file, ContentRefused.
        """
        self._verify_bytes(upload)
        folder = self._staging.folder(upload.upload_id)
        spec = validate_folder(folder, self._base, self._max_rank, self._check)
        for file in upload.files:
            sync_file(folder / file.name)
        return spec

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
                self._tenant_bytes.drop(upload.upload_id, file.name)
                wrong.append(f"{file.name}: sha256 of what arrived is {found}, not {file.sha256}")
        if wrong:
            raise DigestMismatch("; ".join(wrong))

    def publish(self, upload: Upload, spec: AdapterSpec) -> None:
        """Make it a version, tagged `latest`, and end the upload. Under the registry's lock."""
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
        try:
            for file in upload.files:
                self._blobs.put_file(self._staging.folder(upload.upload_id) / file.name, file.sha256)
            self._blobs.put_bytes(manifest.to_bytes())
            self._catalogue.publish(upload, version, names, LATEST)
        except BaseException:
            self._pins.delete_unneeded(names)
            for file in upload.files:
                if not self._staging.size(upload.upload_id, file.name):
                    self._tenant_bytes.drop(upload.upload_id, file.name)
            raise
