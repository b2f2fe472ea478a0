"""What the registry tells: frozen values without paths, safe to hand to other threads. Times are Unix seconds."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Self

from lorasrv_adapters.errors import ContentError


class UploadState(StrEnum):
    RECEIVING = "receiving"
    VALIDATING = "validating"
    PUBLISHED = "published"
    FAILED = "failed"
    CANCELLED = "cancelled"


class VersionState(StrEnum):
    """INCOMPATIBLE: validated against another base model than this one. QUARANTINED: its stored bytes are damaged."""

    READY = "ready"
    INCOMPATIBLE = "incompatible"
    QUARANTINED = "quarantined"


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
    state: VersionState = VersionState.READY


@dataclass(frozen=True, kw_only=True)
class VersionUse:
    """How often a version was asked for since this process started, and when last."""

    hits: int
    last_use_time: float


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
    create_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter: tags by name, versions newest first. A deleted one has a `delete_time`, and goes at `expire_time`."""

    tenant: str
    adapter_id: str
    tags: Mapping[str, str]
    versions: tuple[Version, ...]
    create_time: float
    update_time: float
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    pinned: bool = False
    delete_time: float | None = None
    expire_time: float | None = None

    @property
    def etag(self) -> str:
        """Changes with everything that is kept of the adapter, and with nothing else."""
        durable = (
            *(self.tenant, self.adapter_id, self.pinned),
            *(self.create_time, self.update_time, self.delete_time, self.expire_time),
            *(sorted(each.items()) for each in (self.tags, self.labels, self.annotations)),
            [version.digest for version in self.versions],
        )
        return hashlib.sha256(json.dumps(durable).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        versions = tuple(
            Version(
                **{
                    **version,
                    "target_modules": tuple(version["target_modules"]),
                    "state": VersionState(version["state"]),
                }
            )
            for version in fields.pop("versions")
        )
        return cls(**fields, versions=versions)


@dataclass(frozen=True, kw_only=True)
class AdapterFilter:
    """Which adapters a list is of: those with all of `labels`."""

    name_prefix: str = ""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    show_deleted: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapterPage:
    """Adapters by id; `next_page_token` None at the end."""

    adapters: tuple[Adapter, ...]
    next_page_token: str | None


@dataclass(frozen=True, kw_only=True)
class VersionPage:
    """Versions, newest first; `next_page_token` None at the end."""

    versions: tuple[Version, ...]
    next_page_token: str | None


@dataclass(frozen=True, kw_only=True)
class Tag:
    """A pointer to a version. `weight` is carried for the day when a tag may point to several."""

    tag: str
    digest: str
    weight: int = 1


@dataclass(frozen=True, kw_only=True)
class TagPage:
    """Tags by name; `next_page_token` None at the end."""

    tags: tuple[Tag, ...]
    next_page_token: str | None


@dataclass(frozen=True, kw_only=True)
class ResolvedVersion:
    """The version a reference means right now."""

    tenant: str
    adapter_id: str
    digest: str
    rank_max: int
    serving: str | None = None
