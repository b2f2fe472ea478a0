"""What the registry tells and is asked, as messages and back: nothing is decided here."""

from collections.abc import Callable, Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from lorasrv.engine.defaults import read_defaults
from lorasrv.errors import InvalidRequest
from lorasrv.server.convert import TIERS, failure_text, sampling_message, timestamp
from lorasrv.types import AdapterResidency, Tier
from lorasrv.v1 import adapter_pb2
from lorasrv_adapters import records
from lorasrv_adapters.downloads import FileChunk
from lorasrv_adapters.manifest import ManifestFile
from lorasrv_adapters.reference import adapter_name, tag_name, upload_name, version_name

# Where a version's weights are on this replica, and how it was used.
VersionUse = Callable[[str, str, str], tuple[AdapterResidency | None, records.VersionUse | None]]

UPLOAD_STATES = {
    records.UploadState.RECEIVING: adapter_pb2.UPLOAD_STATE_RECEIVING,
    records.UploadState.VALIDATING: adapter_pb2.UPLOAD_STATE_VALIDATING,
    records.UploadState.PUBLISHED: adapter_pb2.UPLOAD_STATE_PUBLISHED,
    records.UploadState.FAILED: adapter_pb2.UPLOAD_STATE_FAILED,
    records.UploadState.CANCELLED: adapter_pb2.UPLOAD_STATE_CANCELLED,
}

VERSION_STATES = {
    records.VersionState.READY: adapter_pb2.VERSION_STATE_READY,
    records.VersionState.INCOMPATIBLE: adapter_pb2.VERSION_STATE_INCOMPATIBLE,
    records.VersionState.QUARANTINED: adapter_pb2.VERSION_STATE_QUARANTINED,
}


WARM_TIERS = {
    adapter_pb2.TIER_UNSPECIFIED: Tier.DEVICE,
    adapter_pb2.TIER_HOST: Tier.HOST,
    adapter_pb2.TIER_DEVICE: Tier.DEVICE,
}


def warm_tier(tier: adapter_pb2.Tier) -> Tier:
    """Raises InvalidRequest for a tier that is no memory."""
    if tier not in WARM_TIERS:
        raise InvalidRequest("tier", f"{tier} is not TIER_HOST or TIER_DEVICE")
    return WARM_TIERS[tier]


def upload_files(files: Iterable[adapter_pb2.UploadFile]) -> tuple[records.UploadFile, ...]:
    return tuple(records.UploadFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files)


def adapter_filter(request: adapter_pb2.ListAdaptersRequest) -> records.AdapterFilter:
    return records.AdapterFilter(
        name_prefix=request.name_prefix, labels=dict(request.labels), show_deleted=request.show_deleted
    )


def upload(found: records.Upload, use: VersionUse) -> adapter_pb2.Upload:
    return adapter_pb2.Upload(
        name=upload_name(found.tenant, found.upload_id),
        adapter=adapter_name(found.tenant, found.adapter_id),
        state=UPLOAD_STATES[found.state],
        files=[
            adapter_pb2.UploadFile(
                name=file.name, size_bytes=file.size_bytes, sha256=file.sha256, committed_bytes=file.committed_bytes
            )
            for file in found.files
        ],
        errors=[adapter_pb2.UploadError(reason=error.reason, message=str(error)) for error in found.errors],
        version=None if found.version is None else version(found.tenant, found.adapter_id, found.version, use),
        create_time=timestamp(found.create_time),
        expire_time=timestamp(found.expire_time),
    )


def adapter(found: records.Adapter, use: VersionUse) -> adapter_pb2.Adapter:
    return adapter_pb2.Adapter(
        name=adapter_name(found.tenant, found.adapter_id),
        adapter_id=found.adapter_id,
        tags=found.tags,
        versions=[version(found.tenant, found.adapter_id, each, use) for each in found.versions],
        create_time=timestamp(found.create_time),
        update_time=timestamp(found.update_time),
        labels=found.labels,
        annotations=found.annotations,
        etag=found.etag,
        pinned=found.pinned,
        delete_time=_timestamp(found.delete_time),
        expire_time=_timestamp(found.expire_time),
    )


def version(tenant: str, adapter_id: str, found: records.Version, use: VersionUse) -> adapter_pb2.Version:
    residency, used = use(tenant, adapter_id, found.digest)
    return adapter_pb2.Version(
        name=version_name(tenant, adapter_id, found.digest),
        digest=found.digest,
        min_rank=found.rank_min,
        max_rank=found.rank_max,
        target_modules=found.target_modules,
        size_bytes=found.size_bytes,
        base_fingerprint=found.fingerprint,
        create_time=timestamp(found.create_time),
        tier=TIERS[Tier.DISK if residency is None else residency.tier],
        failure="" if residency is None else failure_text(residency),
        defaults=None if found.serving is None else version_defaults(found.serving),
        state=VERSION_STATES[found.state],
        hits=0 if used is None else used.hits,
        last_use_time=None if used is None else timestamp(used.last_use_time),
    )


def version_defaults(serving: str) -> adapter_pb2.VersionDefaults:
    defaults = read_defaults(serving)
    return adapter_pb2.VersionDefaults(
        sampling=sampling_message(defaults.sampling), system_prompt=defaults.system_prompt
    )


def tag(tenant: str, adapter_id: str, found: records.Tag) -> adapter_pb2.Tag:
    return adapter_pb2.Tag(
        name=tag_name(tenant, adapter_id, found.tag),
        tag=found.tag,
        versions=[adapter_pb2.WeightedVersion(digest=found.digest, weight=found.weight)],
    )


def manifest(found: adapter_pb2.Version, files: Iterable[ManifestFile]) -> adapter_pb2.VersionManifest:
    listed = [adapter_pb2.VersionFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files]
    return adapter_pb2.VersionManifest(version=found, files=listed)


def chunk(found: FileChunk) -> adapter_pb2.DownloadVersionResponse:
    return adapter_pb2.DownloadVersionResponse(
        chunk=adapter_pb2.FileChunk(file=found.file, offset_bytes=found.offset_bytes, data=found.data)
    )


def _timestamp(unix_s: float | None) -> Timestamp | None:
    return None if unix_s is None else timestamp(unix_s)
