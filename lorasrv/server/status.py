"""Errors as gRPC statuses: one table for both error trees, and the google.rpc details that go with them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lorasrv import errors
from lorasrv.errors import InvalidRequest, LorasrvError
from lorasrv_adapters import errors as adapter_errors
from lorasrv_adapters.errors import AdapterError, ContentError, ContentRefused, OffsetMismatch

DOMAIN = "lorasrv"
MASKED_MESSAGE = "internal error; the server's log has the details"
MAX_REASONS = 20
# The stack refuses trailers of more than 16 KiB; half of what is used here is the text that stands in both places.
MAX_STATUS_BYTES = 4096
MAX_MESSAGE_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a caller gets: the code, and when to try again where that may help."""

    code: grpc.StatusCode
    retry_s: int | None = None


def _is(code: grpc.StatusCode, retry_s: int | None = None) -> Outcome:
    return Outcome(code=code, retry_s=retry_s)


OUTCOMES: Mapping[type[LorasrvError] | type[AdapterError], Outcome] = {
    errors.LorasrvError: _is(grpc.StatusCode.INTERNAL),
    errors.InvalidRequest: _is(grpc.StatusCode.INVALID_ARGUMENT),
    errors.UnknownMethod: _is(grpc.StatusCode.UNIMPLEMENTED),
    errors.Unauthenticated: _is(grpc.StatusCode.UNAUTHENTICATED),
    errors.PermissionDenied: _is(grpc.StatusCode.PERMISSION_DENIED),
    errors.UnsupportedModel: _is(grpc.StatusCode.FAILED_PRECONDITION),
    errors.ConfigurationError: _is(grpc.StatusCode.FAILED_PRECONDITION),
    errors.GenerationExists: _is(grpc.StatusCode.ALREADY_EXISTS),
    errors.ResourceExhausted: _is(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_s=1),
    errors.QueueFull: _is(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_s=1),
    errors.DeadlineExceeded: _is(grpc.StatusCode.DEADLINE_EXCEEDED),
    errors.Draining: _is(grpc.StatusCode.UNAVAILABLE, retry_s=1),
    errors.SlowReader: _is(grpc.StatusCode.RESOURCE_EXHAUSTED),
    errors.AdapterLoadFailed: _is(grpc.StatusCode.UNAVAILABLE, retry_s=1),
    errors.AdapterCorrupt: _is(grpc.StatusCode.DATA_LOSS),
    errors.EngineUnavailable: _is(grpc.StatusCode.UNAVAILABLE, retry_s=1),
    errors.InternalError: _is(grpc.StatusCode.INTERNAL),
    adapter_errors.AdapterError: _is(grpc.StatusCode.INTERNAL),
    adapter_errors.ContentError: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.MalformedFile: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.InvalidAdapter: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.RankTooLarge: _is(grpc.StatusCode.FAILED_PRECONDITION),
    adapter_errors.BaseMismatch: _is(grpc.StatusCode.FAILED_PRECONDITION),
    adapter_errors.AdapterTooLarge: _is(grpc.StatusCode.FAILED_PRECONDITION),
    adapter_errors.UnsupportedFeature: _is(grpc.StatusCode.FAILED_PRECONDITION),
    # Stands for its reasons: see `outcome_of`.
    adapter_errors.ContentRefused: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.InvalidReference: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.InvalidPage: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.AdapterNotFound: _is(grpc.StatusCode.NOT_FOUND),
    adapter_errors.InvalidField: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.RequestIdReused: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.AdapterExists: _is(grpc.StatusCode.ALREADY_EXISTS),
    adapter_errors.StaleEtag: _is(grpc.StatusCode.ABORTED),
    adapter_errors.VersionTagged: _is(grpc.StatusCode.FAILED_PRECONDITION),
    adapter_errors.AdapterPinned: _is(grpc.StatusCode.FAILED_PRECONDITION),
    adapter_errors.VersionQuarantined: _is(grpc.StatusCode.DATA_LOSS),
    adapter_errors.QuotaExceeded: _is(grpc.StatusCode.RESOURCE_EXHAUSTED),
    adapter_errors.ImportRefused: _is(grpc.StatusCode.PERMISSION_DENIED),
    adapter_errors.UploadNotFound: _is(grpc.StatusCode.NOT_FOUND),
    adapter_errors.InvalidUpload: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.OffsetMismatch: _is(grpc.StatusCode.OUT_OF_RANGE),
    adapter_errors.UploadIncomplete: _is(grpc.StatusCode.FAILED_PRECONDITION),
    adapter_errors.DigestMismatch: _is(grpc.StatusCode.INVALID_ARGUMENT),
    adapter_errors.UploadNotReceiving: _is(grpc.StatusCode.FAILED_PRECONDITION),
    adapter_errors.UploadSuperseded: _is(grpc.StatusCode.ABORTED),
    adapter_errors.CorruptBlob: _is(grpc.StatusCode.DATA_LOSS),
    adapter_errors.StorageFull: _is(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_s=60),
    adapter_errors.RegistryUnavailable: _is(grpc.StatusCode.UNAVAILABLE, retry_s=1),
    adapter_errors.ImageTooLarge: _is(grpc.StatusCode.RESOURCE_EXHAUSTED),
}


def is_described(error: Exception) -> bool:
    """Whether the error is one of ours, so that its text is meant for the caller."""
    return type(error) in OUTCOMES


def outcome_of(error: LorasrvError | AdapterError) -> Outcome:
    """The error's row. Content refused for several reasons is a precondition only when every reason is one."""
    if isinstance(error, ContentRefused) and error.errors:
        outcomes = {OUTCOMES[type(reason)] for reason in error.errors}
        return outcomes.pop() if len(outcomes) == 1 else OUTCOMES[ContentRefused]
    return OUTCOMES[type(error)]


def describe(error: Exception) -> grpc.Status:
    """The status of a failed call. Errors that are not ours say nothing about themselves."""
    if not is_described(error):
        return _status(grpc.StatusCode.INTERNAL, MASKED_MESSAGE, [_error_info("INTERNAL", {})])
    assert isinstance(error, LorasrvError | AdapterError)
    outcome = outcome_of(error)
    details: list[Message] = [_error_info(_reason_of(error), _metadata_of(error))]
    if outcome.retry_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=outcome.retry_s)))
    violations = [(error.field, error)] if isinstance(error, InvalidRequest) and error.field else []
    if isinstance(error, ContentRefused):
        violations = [("", reason) for reason in error.errors]
    return _status(outcome.code, str(error), details, violations)


def _reason_of(error: LorasrvError | AdapterError) -> str:
    """Content refused for one kind of reason has that reason."""
    if isinstance(error, ContentRefused):
        reasons = {reason.reason for reason in error.errors}
        return reasons.pop() if len(reasons) == 1 else error.reason
    return error.reason


def _metadata_of(error: LorasrvError | AdapterError) -> dict[str, str]:
    if isinstance(error, OffsetMismatch):
        return {"current_offset": str(error.current)}
    if isinstance(error, ContentRefused):
        return {"num_reasons": str(len(error.errors))}
    return {}


def _error_info(reason: str, metadata: dict[str, str]) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(domain=DOMAIN, reason=reason, metadata=metadata)


def _status(
    code: grpc.StatusCode,
    message: str,
    details: Iterable[Message],
    violations: Iterable[tuple[str, LorasrvError | ContentError]] = (),
) -> grpc.Status:
    status = status_pb2.Status(code=code.value[0], message=_cut(message, MAX_MESSAGE_BYTES))
    for detail in details:
        status.details.append(_packed(detail))
    listed = _violations(code, list(violations)[:MAX_REASONS], MAX_STATUS_BYTES - status.ByteSize())
    if listed is not None:
        status.details.append(listed)
    return rpc_status.to_status(status)


def _violations(
    code: grpc.StatusCode, violations: list[tuple[str, LorasrvError | ContentError]], room_bytes: int
) -> AnyMessage | None:
    """As many violations as there is room for; None when there is none."""
    while violations:
        packed = _packed(_violation_list(code, violations))
        if packed.ByteSize() + 8 <= room_bytes:
            return packed
        violations = violations[:-1]
    return None


def _violation_list(code: grpc.StatusCode, violations: list[tuple[str, LorasrvError | ContentError]]) -> Message:
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return error_details_pb2.PreconditionFailure(
            violations=[
                error_details_pb2.PreconditionFailure.Violation(
                    type=error.reason, subject=field, description=_cut(str(error), MAX_MESSAGE_BYTES)
                )
                for field, error in violations
            ]
        )
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=field, reason=error.reason, description=_cut(str(error), MAX_MESSAGE_BYTES)
            )
            for field, error in violations
        ]
    )


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _cut(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")
    return text if len(encoded) <= max_bytes else encoded[: max_bytes - 3].decode("utf-8", "ignore") + "…"
