"""How adapters are named: ids, resource names, and the one parser of references for every front end.

A reference is `NAME` (its tag `latest`), `NAME@TAG` or `NAME@sha256:HEX`, where HEX is a digest or a prefix of at
least 8 digits that only one version has. The name `base` is reserved for the base model.
"""

import re
from dataclasses import dataclass

from lorasrv_adapters.errors import InvalidReference, quote

BASE_ID = "base"
LATEST = "latest"
DIGEST_CHARS = 64
MIN_PREFIX_CHARS = 8
ID_PATTERN = r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?"

_ID = re.compile(ID_PATTERN)
_HEX = re.compile(r"[0-9a-f]+")
_DIGEST_MARK = "sha256:"


@dataclass(frozen=True, kw_only=True)
class BaseReference:
    """The base model itself, without any adapter."""


@dataclass(frozen=True, kw_only=True)
class TagReference:
    """The version that a tag of an adapter points at."""

    adapter_id: str
    tag: str = LATEST

    def __str__(self) -> str:
        return f"{self.adapter_id}@{self.tag}"


@dataclass(frozen=True, kw_only=True)
class DigestReference:
    """One version of an adapter, by its digest or a unique prefix of it."""

    adapter_id: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.adapter_id}@{_DIGEST_MARK}{self.prefix}"


AdapterReference = TagReference | DigestReference


def check_id(value: str, what: str) -> str:
    """`value` if it is an id; raises InvalidReference naming `what` it should have been."""
    if not _ID.fullmatch(value):
        raise InvalidReference(f"{what} {quote(value)} does not match {ID_PATTERN}")
    return value


def check_adapter_id(value: str) -> str:
    """`value` if it may name an adapter: an id other than `base`."""
    if check_id(value, "adapter id") == BASE_ID:
        raise InvalidReference(f"adapter id {BASE_ID!r} is reserved for the base model")
    return value


def check_digest(value: str) -> str:
    """`value` if it is a sha256 in 64 lower-case hex digits."""
    if len(value) != DIGEST_CHARS or not _HEX.fullmatch(value):
        raise InvalidReference(f"sha256 {quote(value)} is not {DIGEST_CHARS} lower-case hex digits")
    return value


def parse_reference(text: str) -> BaseReference | AdapterReference:
    """Parse `base`, `NAME`, `NAME@TAG` or `NAME@sha256:HEX`; raises InvalidReference."""
    if not text:
        raise InvalidReference(f"adapter reference is empty; the base model is named {BASE_ID!r}")
    name, at, version = text.partition("@")
    if name == BASE_ID and not at:
        return BaseReference()
    adapter_id = check_adapter_id(name)
    if not at:
        return TagReference(adapter_id=adapter_id)
    if not version.startswith(_DIGEST_MARK):
        return TagReference(adapter_id=adapter_id, tag=check_id(version, "tag"))
    prefix = version.removeprefix(_DIGEST_MARK)
    if not MIN_PREFIX_CHARS <= len(prefix) <= DIGEST_CHARS or not _HEX.fullmatch(prefix):
        raise InvalidReference(
            f"version {quote(version)} is not sha256: and {MIN_PREFIX_CHARS} to {DIGEST_CHARS} lower-case hex digits"
        )
    return DigestReference(adapter_id=adapter_id, prefix=prefix)


def tenant_name(tenant: str) -> str:
    return f"tenants/{tenant}"


def adapter_name(tenant: str, adapter_id: str) -> str:
    return f"tenants/{tenant}/adapters/{adapter_id}"


def version_name(tenant: str, adapter_id: str, digest: str) -> str:
    return f"tenants/{tenant}/adapters/{adapter_id}/versions/{digest}"


def tag_name(tenant: str, adapter_id: str, tag: str) -> str:
    return f"tenants/{tenant}/adapters/{adapter_id}/tags/{tag}"


def upload_name(tenant: str, upload_id: str) -> str:
    return f"tenants/{tenant}/uploads/{upload_id}"


def parse_tenant_name(name: str) -> str:
    """The tenant of `tenants/{tenant}`."""
    (tenant,) = _split_name(name, "tenants")
    return tenant


def parse_adapter_name(name: str) -> tuple[str, str]:
    """(tenant, adapter id) of `tenants/{tenant}/adapters/{adapter}`."""
    tenant, adapter_id = _split_name(name, "tenants", "adapters")
    return tenant, check_adapter_id(adapter_id)


def parse_version_name(name: str) -> tuple[str, str, str]:
    """(tenant, adapter id, digest) of `tenants/{tenant}/adapters/{adapter}/versions/{digest}`."""
    adapter, mark, digest = name.rpartition("/versions/")
    tenant, adapter_id = parse_adapter_name(adapter if mark else name)
    return tenant, adapter_id, check_digest(digest)


def parse_tag_name(name: str) -> tuple[str, str, str]:
    """(tenant, adapter id, tag) of `tenants/{tenant}/adapters/{adapter}/tags/{tag}`."""
    tenant, adapter_id, tag = _split_name(name, "tenants", "adapters", "tags")
    return tenant, check_adapter_id(adapter_id), tag


def parse_upload_name(name: str) -> tuple[str, str]:
    """(tenant, upload id) of `tenants/{tenant}/uploads/{upload}`."""
    tenant, upload_id = _split_name(name, "tenants", "uploads")
    return tenant, upload_id


def _split_name(name: str, *collections: str) -> list[str]:
    parts = name.split("/")
    if tuple(parts[0::2]) != collections or len(parts) != 2 * len(collections):
        pattern = "/".join(f"{collection}/{{{collection[:-1]}}}" for collection in collections)
        raise InvalidReference(f"resource name {quote(name)} is not {pattern}")
    return [check_id(part, f"{collection[:-1]} id") for part, collection in zip(parts[1::2], collections, strict=True)]
