"""The error tree of adapters. Each class has a stable `reason`; the server maps classes to gRPC codes, in one table.

Texts name the offending value and the limit and are safe to show to any client: never a server path, a traceback
or another tenant's data. Values from outside pass through `quote`, which escapes what is not plain ASCII.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

_MAX_QUOTED_CHARS = 120
_MAX_LISTED = 64


class AdapterError(Exception):
    """Root of every error raised for adapter content, references and the registry."""

    reason: ClassVar[str] = "ADAPTER"


class ContentError(AdapterError):
    """One reason why the content of an adapter is refused; validation collects all of them in `ContentRefused`."""

    reason = "ADAPTER_CONTENT"


class MalformedFile(ContentError):
    """A file that is not what its name says: broken header, broken JSON, a pickle."""

    reason = "MALFORMED_FILE"


class InvalidAdapter(ContentError):
    """Well-formed files that make no sense: impossible ranks, half a pair, NaN, paths in the configuration."""

    reason = "INVALID_ADAPTER"


class RankTooLarge(ContentError):
    """A rank above the server's maximum."""

    reason = "RANK_TOO_LARGE"


class BaseMismatch(ContentError):
    """Shapes, layers or a fingerprint that are not those of the base model served here."""

    reason = "BASE_MISMATCH"


class AdapterTooLarge(ContentError):
    """More than this server's pool can hold of one adapter."""

    reason = "ADAPTER_TOO_LARGE"


class UnsupportedFeature(ContentError):
    """Something that is not served exactly, so not at all; lists every offending name."""

    reason = "UNSUPPORTED_FEATURE"


class ContentRefused(AdapterError):
    """The content of an adapter was refused; `errors` holds every reason, at least one."""

    reason = "CONTENT_REFUSED"

    def __init__(self, errors: Sequence[ContentError]) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors: tuple[ContentError, ...] = tuple(errors)


class InvalidReference(AdapterError):
    """A name, an id or a reference that is not well-formed."""

    reason = "INVALID_REFERENCE"


class InvalidField(AdapterError):
    """A request's field that can never be accepted: a label, a weight, a request id."""

    reason = "INVALID_FIELD"


class RequestIdReused(AdapterError):
    """The request id was used for another request."""

    reason = "REQUEST_ID_REUSED"


class InvalidPage(AdapterError):
    """A page size or page token that this registry did not give out."""

    reason = "INVALID_PAGE"


class AdapterNotFound(AdapterError):
    """No such adapter, tag or version in this tenant."""

    reason = "ADAPTER_NOT_FOUND"


class AdapterExists(AdapterError):
    """The name is taken, and the call asked for a new one; or an adapter to be undeleted was not deleted."""

    reason = "ADAPTER_EXISTS"


class StaleEtag(AdapterError):
    """The adapter has changed since the caller read it."""

    reason = "STALE_ETAG"


class VersionTagged(AdapterError):
    """A version that a tag points at is not deleted."""

    reason = "VERSION_TAGGED"


class AdapterPinned(AdapterError):
    """An adapter that is pinned is not deleted."""

    reason = "ADAPTER_PINNED"


class VersionQuarantined(AdapterError):
    """The version's stored bytes are damaged; publishing the same content again repairs them."""

    reason = "VERSION_QUARANTINED"


class QuotaExceeded(AdapterError):
    """More than the tenant may have."""

    reason = "QUOTA_EXCEEDED"


class ImportRefused(AdapterError):
    """A source outside what may be imported."""

    reason = "IMPORT_REFUSED"


class UploadNotFound(AdapterError):
    """No such upload in this tenant: never made, or expired."""

    reason = "UPLOAD_NOT_FOUND"


class InvalidUpload(AdapterError):
    """A list of files, a size or a write that can never become an adapter."""

    reason = "INVALID_UPLOAD"


class OffsetMismatch(AdapterError):
    """A write somewhere else than at the end of what has arrived; `current` is where the next byte goes."""

    reason = "OFFSET_MISMATCH"

    def __init__(self, message: str, *, current: int) -> None:
        super().__init__(message)
        self.current = current


class UploadIncomplete(AdapterError):
    """Finished before all bytes have arrived."""

    reason = "UPLOAD_INCOMPLETE"


class DigestMismatch(AdapterError):
    """The bytes that arrived are not those announced; the file's offset returned to 0."""

    reason = "DIGEST_MISMATCH"


class UploadNotReceiving(AdapterError):
    """The upload is being validated or has ended."""

    reason = "UPLOAD_NOT_RECEIVING"


class UploadSuperseded(AdapterError):
    """A newer writer of the same file took over."""

    reason = "UPLOAD_SUPERSEDED"


class CorruptBlob(AdapterError):
    """Stored bytes are missing or no longer match their digest; publishing the same content again repairs them."""

    reason = "CORRUPT_BLOB"


class StorageFull(AdapterError):
    """The disk that holds the registry is full."""

    reason = "STORAGE_FULL"


class RegistryUnavailable(AdapterError):
    """The catalogue is locked, damaged, of another version, or its disk fails."""

    reason = "REGISTRY_UNAVAILABLE"


class ImageTooLarge(AdapterError):
    """An adapter's page image exceeds the whole host cache."""

    reason = "IMAGE_TOO_LARGE"


def content_error(reason: str, message: str) -> ContentError:
    """Rebuild a stored reason of a refusal."""
    for kind in ContentError.__subclasses__():
        if kind.reason == reason:
            return kind(message)
    return ContentError(message)


def quote(value: object) -> str:
    """A value from outside as short printable ASCII."""
    text = ascii(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]}..."


def listing(names: Iterable[str]) -> str:
    """Names as one text; past 64 of them the rest is counted."""
    names = list(names)
    shown = ", ".join(
        name if name.isascii() and name.isprintable() and len(name) <= 120 else quote(name)
        for name in names[:_MAX_LISTED]
    )
    return shown if len(names) <= _MAX_LISTED else f"{shown} and {len(names) - _MAX_LISTED} more"
