"""The error tree. Each class has a stable `reason`; `server/status.py` maps classes to gRPC codes, in one table."""

from typing import ClassVar


class LorasrvError(Exception):
    """Root of every error raised for input from a user, a file or the wire.

    The message names the offending value and the limit and is safe to show to any client: no server path, no
    traceback, nothing of another tenant.
    """

    reason: ClassVar[str] = "INTERNAL"


class InvalidRequest(LorasrvError):
    """A request that can never succeed as written."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class UnknownMethod(LorasrvError):
    """A call of a method that there is not."""

    reason = "UNKNOWN_METHOD"


class Unauthenticated(LorasrvError):
    """A call without a valid credential; the message is a fixed text."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(LorasrvError):
    """A valid credential without the role that the call asks for."""

    reason = "PERMISSION_DENIED"


class UnsupportedModel(LorasrvError):
    """A base model folder that is not served exactly: it is refused, never approximated."""

    reason = "UNSUPPORTED_MODEL"


class ConfigurationError(LorasrvError):
    """Settings the server cannot start with."""

    reason = "CONFIGURATION"


class GenerationExists(LorasrvError):
    """The generation id is running already."""

    reason = "GENERATION_EXISTS"


class ResourceExhausted(LorasrvError):
    """A bounded resource is full; trying again later may succeed."""

    reason = "RESOURCE_EXHAUSTED"


class QueueFull(ResourceExhausted):
    """The tenant has as many requests waiting as it may have."""

    reason = "QUEUE_FULL"


class DeadlineExceeded(LorasrvError):
    """The call's deadline has passed; what it had begun was aborted."""

    reason = "DEADLINE_EXCEEDED"


class Draining(LorasrvError):
    """The server admits nothing more; another replica may."""

    reason = "DRAINING"


class SlowReader(ResourceExhausted):
    """A stream's reader took nothing for the stall time-out while output waited for it."""

    reason = "SLOW_READER"


class AdapterLoadFailed(LorasrvError):
    """An adapter's weights could not be brought to the device; only its own requests fail."""

    reason = "ADAPTER_LOAD_FAILED"


class AdapterCorrupt(AdapterLoadFailed):
    """An adapter's stored bytes are missing or damaged."""

    reason = "ADAPTER_CORRUPT"


class EngineUnavailable(LorasrvError):
    """The engine is starting, restarting or gone."""

    reason = "ENGINE_UNAVAILABLE"


class InternalError(LorasrvError):
    """A defect on our side; the message is a fixed text."""

    reason = "INTERNAL"


def error_from_reason(reason: str, message: str) -> LorasrvError:
    """Rebuild an error that crossed a process as (reason, message); an unknown reason is internal."""
    for kind in _descendants(LorasrvError):
        if kind.reason == reason:
            return InvalidRequest("", message) if kind is InvalidRequest else kind(message)
    return InternalError(message)


def _descendants(kind: type[LorasrvError]) -> list[type[LorasrvError]]:
    return [found for child in kind.__subclasses__() for found in (child, *_descendants(child))]
