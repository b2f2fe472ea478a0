"""What a call can fail with: one class per gRPC code, under one root, with the server's reason and message."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import grpc
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """A call failed. `reason` is the server's stable reason; None when the failure is not from a lorasrv server."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, reason: str | None = None, metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}


class Cancelled(ClientError):
    code = grpc.StatusCode.CANCELLED


class InvalidArgument(ClientError):
    code = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceeded(ClientError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFound(ClientError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ClientError):
    code = grpc.StatusCode.ALREADY_EXISTS


class PermissionDenied(ClientError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(ClientError):
    code = grpc.StatusCode.UNAUTHENTICATED


class ResourceExhausted(ClientError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(ClientError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(ClientError):
    code = grpc.StatusCode.ABORTED


class OutOfRange(ClientError):
    code = grpc.StatusCode.OUT_OF_RANGE


class Unimplemented(ClientError):
    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(ClientError):
    code = grpc.StatusCode.INTERNAL


class Unavailable(ClientError):
    code = grpc.StatusCode.UNAVAILABLE


class DataLoss(ClientError):
    code = grpc.StatusCode.DATA_LOSS


@contextmanager
def translated() -> Iterator[None]:
    """grpc's errors as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_call(error) from None


def error_from_call(error: grpc.RpcError) -> ClientError:
    """The error of a failed call; works for sync and async calls."""
    code, details = error.code(), error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
    kind = next((kind for kind in ClientError.__subclasses__() if kind.code is code), ClientError)
    info = _error_info(error)
    if info is None:
        return kind(details or code.name)
    return kind(details, reason=info.reason, metadata=dict(info.metadata))


def _error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo | None:
    trailers: Any = error.trailing_metadata() or ()  # pyright: ignore[reportAttributeAccessIssue]
    packed: bytes | None = next((value for key, value in trailers if key == DETAILS_KEY), None)
    if packed is None:
        return None
    info = error_details_pb2.ErrorInfo()
    status = status_pb2.Status.FromString(packed)
    return next((info for detail in status.details if detail.Unpack(info)), None)
