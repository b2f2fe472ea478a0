"""The loop that both hosts of an engine run, a process of its own (`process`) and a thread (`client.ThreadEngine`)."""

from collections.abc import Callable
from typing import Protocol

from lorasrv.engine.messages import (
    Cancel,
    CancelWarm,
    FromEngine,
    GetStatus,
    Heartbeat,
    Message,
    Shutdown,
    StatusReply,
    Step,
    Submit,
    failure_of,
)
from lorasrv.errors import LorasrvError
from lorasrv.types import EngineRequest, EngineStatus, TokenDelta, Warm, Warmed

HEARTBEAT_S = 0.5


class Core(Protocol):
    """The engine itself. Owned by the thread that runs the loop."""

    def add(self, request: EngineRequest) -> None:
        """Queue a request. A LorasrvError refuses this request and no other."""
        ...

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or end one sample of it; what is not running is ignored."""
        ...

    def warm(self, warm: Warm) -> None:
        """Have an adapter brought to memory, behind all that is queued."""
        ...

    def cancel_warm(self, warm_id: int) -> None:
        """Nobody waits for it any more; one that has ended is no error."""
        ...

    def take_warmed(self) -> tuple[Warmed, ...]:
        """What has become of warms since the last call; nothing of cancelled ones."""
        ...

    def step(self) -> tuple[TokenDelta, ...]:
        """One step for all requests, or a short wait where all of them wait for a load. An exception is fatal."""
        ...

    def has_work(self) -> bool: ...

    def status(self) -> EngineStatus: ...

    def close(self) -> None: ...


def serve_loop(
    core: Core,
    receive: Callable[[float], Message | None],
    send: Callable[[FromEngine], None],
    clock: Callable[[], float],
) -> None:
    """Serve until Shutdown. `receive(timeout_s)` gives the next message, or None when none came in that time.

    An exception from the core ends the loop: its state is not known any more, so the host ends with it.
    """
    num_steps, beat_at_s = 0, clock()
    while True:
        failed: list[TokenDelta] = []
        message = receive(0.0 if core.has_work() else HEARTBEAT_S)
        while message is not None:
            if isinstance(message, Shutdown):
                return
            _apply(core, message, send, failed)
            message = receive(0.0)
        deltas: tuple[TokenDelta, ...] = ()
        if core.has_work():
            deltas = core.step()
            num_steps += 1
        if failed or deltas:
            send(Step((*failed, *deltas)))
        for warmed in core.take_warmed():
            send(warmed)
        if clock() >= beat_at_s:
            send(Heartbeat(num_steps))
            beat_at_s = clock() + HEARTBEAT_S


def _apply(core: Core, message: Message, send: Callable[[FromEngine], None], failed: list[TokenDelta]) -> None:
    match message:
        case Submit(request):
            try:
                core.add(request)
            except LorasrvError as error:
                failed.append(TokenDelta(request_id=request.request_id, failure=failure_of(error)))
        case Cancel(request_id, index):
            core.cancel(request_id, index)
        case Warm():
            core.warm(message)
        case CancelWarm(warm_id):
            core.cancel_warm(warm_id)
        case GetStatus(query_id):
            send(StatusReply(query_id, core.status()))
        case _:
            raise TypeError(f"{type(message).__name__} is no message to a running engine")
