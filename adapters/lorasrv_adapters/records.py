"""What the registry tells: frozen values without paths, safe to hand to other threads. Times are Unix seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lorasrv_adapters.errors import ContentError


class UploadState(StrEnum):
    RECEIVING = "receiving"
    VALIDATING = "validating"
    PUBLISHED = "published"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class UploadFile:
    """A file to be uploaded; `committed_bytes` is where its next byte goes."""

    name: str
    size_bytes: int
    sha256: str
    committed_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Version:
    """An immutable adapter version. `fingerprint` names the base model it was last validated against.

    `serving` is what its serving.json says, as JSON; None when it has none.
    """

    digest: str
    rank_min: int
    rank_max: int
    target_modules: tuple[str, ...]
    size_bytes: int
    fingerprint: str
    create_time: float
    serving: str | None = None


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An upload of one new version. `version` once published, `errors` once failed."""

    tenant: str
    upload_id: str
    adapter_id: str
    state: UploadState
    files: tuple[UploadFile, ...]
    errors: tuple[ContentError, ...]
    version: Version | None
    create_time: float
    expire_time: float


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter: tags by name, versions newest first."""

    tenant: str
    adapter_id: str
    tags: Mapping[str, str]
    versions: tuple[Version, ...]
    create_time: float
    update_time: float


@dataclass(frozen=True, kw_only=True)
class AdapterPage:
    """Adapters by id; `next_page_token` None at the end."""

    adapters: tuple[Adapter, ...]
    next_page_token: str | None


@dataclass(frozen=True, kw_only=True)
class ResolvedVersion:
    """The version a reference means right now."""

    tenant: str
    adapter_id: str
    digest: str
    rank_max: int
    serving: str | None = None
