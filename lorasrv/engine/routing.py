"""What an engine's streams and queries wait on, and how its messages find them. The same for a process and a thread."""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Literal

from lorasrv.engine.merging import MergingDelta
from lorasrv.engine.messages import Cancel, CancelWarm, GetStatus, Message, StatusReply, Step, Submit, ToEngine
from lorasrv.errors import EngineUnavailable, GenerationExists, LorasrvError, error_from_reason
from lorasrv.types import EngineRequest, EngineStatus, Tier, TokenDelta, Warm, Warmed

EngineState = Literal["starting", "ready", "unavailable"]


class Mailbox:
    """What has come for one request and is not read yet: one delta for each sample, however far the reader lags.

    So it holds at most what the request may produce.
    """

    def __init__(self, num_samples: int) -> None:
        self._open = set(range(num_samples))
        self._waiting: dict[int, MergingDelta] = {}
        self._error: LorasrvError | None = None
        self._filled = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return not self._open or self._error is not None

    def put(self, delta: TokenDelta) -> None:
        if delta.failure is not None:
            self._error = error_from_reason(delta.failure.reason, delta.failure.message)
            delta = delta._replace(failure=None)
        self._filled.set()
        if delta.sample not in self._open:
            return  # on its way when the sample was closed
        if delta.finish is not None:
            self._open.remove(delta.sample)
        if (waiting := self._waiting.get(delta.sample)) is not None:
            waiting.add(delta)
        elif delta.token_ids or delta.prompt_logprobs or delta.finish is not None or delta.queue_position is not None:
            self._waiting[delta.sample] = MergingDelta(delta)

    def fail(self, error: LorasrvError) -> None:
        if not self.ended:
            self._error = error
            self._filled.set()

    def close(self, index: int) -> bool:
        """Nothing of this sample is wanted any more; whether more might have come."""
        was_open = index in self._open
        self._open.discard(index)
        self._waiting.pop(index, None)
        self._filled.set()
        return was_open

    async def take(self) -> TokenDelta | None:
        """All that has come for one sample; None at the end. What came before a failure comes before it is raised."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if not self._open:
                return None
            self._filled.clear()
            await self._filled.wait()
        return self._waiting.pop(next(iter(self._waiting))).delta()


class RoutingEngine(ABC):
    """Deltas to their streams, replies to their queries, and the state. Owned by one event loop."""

    def __init__(self) -> None:
        self._state: EngineState = "starting"
        self._callbacks: list[Callable[[EngineState], None]] = []
        self._engine_ids: dict[str, str] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._queries: dict[int, asyncio.Future[EngineStatus]] = {}
        self._warms: dict[int, asyncio.Future[Tier]] = {}
        self._serial = itertools.count()

    @property
    def state(self) -> EngineState:
        return self._state

    def on_state_change(self, callback: Callable[[EngineState], None]) -> None:
        self._callbacks.append(callback)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        self._require_ready()
        if request.request_id in self._engine_ids:
            raise GenerationExists(f"generation {request.request_id!r} is running")
        # The engine knows the request by an id used once: deltas of a cancelled request may still be on their way
        # when its id is used again.
        engine_id = f"{request.request_id}#{next(self._serial)}"
        mailbox = self._mailboxes[engine_id] = Mailbox(request.n)
        self._engine_ids[request.request_id] = engine_id
        try:
            self._send(Submit(replace(request, request_id=engine_id)))
            while (delta := await mailbox.take()) is not None:
                yield delta._replace(request_id=request.request_id)
        finally:
            del self._engine_ids[request.request_id]
            del self._mailboxes[engine_id]
            if not mailbox.ended:
                self._send(Cancel(engine_id))

    def cancel(self, request_id: str, index: int) -> None:
        engine_id = self._engine_ids.get(request_id)
        if engine_id is None:
            return
        if self._mailboxes[engine_id].close(index):
            self._send(Cancel(engine_id, index))

    async def warm(self, digest: str, tier: Tier, deadline_s: float) -> Tier:
        self._require_ready()
        warm_id = next(self._serial)
        reply = self._warms[warm_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Warm(warm_id=warm_id, digest=digest, tier=tier, deadline_s=deadline_s))
            return await reply
        finally:
            del self._warms[warm_id]
            if reply.cancelled():
                self._send(CancelWarm(warm_id))

    async def status(self) -> EngineStatus:
        self._require_ready()
        query_id = next(self._serial)
        reply = self._queries[query_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(GetStatus(query_id))
            return await reply
        finally:
            del self._queries[query_id]

    def check(self) -> None:
        """Raises AssertionError on a broken invariant."""
        assert set(self._engine_ids.values()) == self._mailboxes.keys(), "a stream without its mailbox"
        if self._state != "ready":
            assert all(mailbox.ended for mailbox in self._mailboxes.values()), (
                "a stream waits for an engine that is gone"
            )

    @abstractmethod
    def _send(self, message: ToEngine) -> None: ...

    def _receive(self, message: Message) -> None:
        match message:
            case Step(deltas):
                for delta in deltas:
                    if (mailbox := self._mailboxes.get(delta.request_id)) is not None:
                        mailbox.put(delta)
            case StatusReply(query_id, status):
                if (reply := self._queries.get(query_id)) is not None and not reply.done():
                    reply.set_result(status)
            case Warmed(warm_id=warm_id):
                if (waiting := self._warms.get(warm_id)) is not None and not waiting.done():
                    _settle(waiting, message)
            case _:
                return  # a heartbeat has done its work by arriving

    def _set_state(self, state: EngineState) -> None:
        if state == self._state:
            return
        self._state = state
        for callback in self._callbacks:
            callback(state)

    def _set_unavailable(self, why: str) -> None:
        """The engine is gone: everything that waits for it fails now."""
        self._set_state("unavailable")
        for mailbox in self._mailboxes.values():
            mailbox.fail(EngineUnavailable(why))
        for reply in (*self._queries.values(), *self._warms.values()):
            if not reply.done():
                reply.set_exception(EngineUnavailable(why))

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}")


def _settle(reply: "asyncio.Future[Tier]", warmed: Warmed) -> None:
    if warmed.failure is not None:
        reply.set_exception(error_from_reason(warmed.failure.reason, warmed.failure.message))
    else:
        assert warmed.tier is not None, "a warm has neither a tier nor a failure"
        reply.set_result(warmed.tier)
