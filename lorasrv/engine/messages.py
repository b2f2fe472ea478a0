"""The typed messages between the front process and the engine; `channel` gives them bytes."""

from dataclasses import dataclass

from lorasrv.config import EngineConfig
from lorasrv.errors import LorasrvError
from lorasrv.types import EngineInfo, EngineRequest, EngineStatus, Failure, TokenDelta, Warm, Warmed


@dataclass(frozen=True)
class Configure:
    """The first message to an engine process: build yourself."""

    config: EngineConfig


@dataclass(frozen=True)
class Submit:
    request: EngineRequest


@dataclass(frozen=True)
class Cancel:
    """No more deltas for this request, or for its sample number `index`, which has come to its end at a stop string;
    what is not running is ignored."""

    request_id: str
    index: int | None = None


@dataclass(frozen=True)
class CancelWarm:
    """Nobody waits for this `Warm` any more; one that has ended is ignored."""

    warm_id: int


@dataclass(frozen=True)
class GetStatus:
    query_id: int


@dataclass(frozen=True)
class Shutdown:
    """Finish the running step, free everything, exit."""


@dataclass(frozen=True)
class Ready:
    info: EngineInfo


@dataclass(frozen=True)
class StartFailed:
    failure: Failure


@dataclass(frozen=True)
class Step:
    """All that one step gave to all requests."""

    deltas: tuple[TokenDelta, ...]


@dataclass(frozen=True)
class StatusReply:
    query_id: int
    status: EngineStatus


@dataclass(frozen=True)
class Heartbeat:
    """The engine's loop turns; `steps` since it started."""

    steps: int


ToEngine = Configure | Submit | Cancel | Warm | CancelWarm | GetStatus | Shutdown
FromEngine = Ready | StartFailed | Step | Warmed | StatusReply | Heartbeat
Message = ToEngine | FromEngine


def failure_of(error: LorasrvError) -> Failure:
    """`error` for its way through a process; a message may quote a file name that is not Unicode."""
    return Failure(reason=error.reason, message=str(error).encode("utf-8", "replace").decode())
