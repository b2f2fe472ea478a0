"""What an engine's streams and queries wait on, and how its messages find them. The same for a process and a thread."""

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Literal

from lorasrv.engine.messages import Cancel, GetStatus, Message, StatusReply, Step, Submit, ToEngine
from lorasrv.errors import EngineUnavailable, GenerationExists, LorasrvError, error_from_reason
from lorasrv.types import EngineRequest, EngineStatus, FinishReason, PositionLogprobs, TokenDelta

EngineState = Literal["starting", "ready", "unavailable"]


class Mailbox:
    """What has come for one request and is not read yet: one delta's worth, however far the reader lags."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._finish: FinishReason | None = None
        self._error: LorasrvError | None = None
        self._filled = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._finish is not None or self._error is not None

    def put(self, delta: TokenDelta) -> None:
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        self._prompt_logprobs.extend(delta.prompt_logprobs)
        self._finish = delta.finish
        if delta.failure is not None:
            self._error = error_from_reason(delta.failure.reason, delta.failure.message)
        self._filled.set()

    def fail(self, error: LorasrvError) -> None:
        if not self.ended:
            self._error = error
            self._filled.set()

    async def take(self) -> TokenDelta:
        """All that has come; tokens that came before a failure are given before it is raised."""
        await self._filled.wait()
        if self._error is not None and not self._token_ids:
            raise self._error
        taken = TokenDelta(
            request_id=self._request_id,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
            finish=self._finish,
        )
        for given in (self._token_ids, self._logprobs, self._prompt_logprobs):
            given.clear()
        if self._error is None:
            self._filled.clear()
        return taken


class RoutingEngine(ABC):
    """Deltas to their streams, replies to their queries, and the state. Owned by one event loop."""

    def __init__(self) -> None:
        self._state: EngineState = "starting"
        self._callbacks: list[Callable[[EngineState], None]] = []
        self._running: set[str] = set()
        self._mailboxes: dict[str, Mailbox] = {}
        self._queries: dict[int, asyncio.Future[EngineStatus]] = {}
        self._serial = itertools.count()

    @property
    def state(self) -> EngineState:
        return self._state

    def on_state_change(self, callback: Callable[[EngineState], None]) -> None:
        self._callbacks.append(callback)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        self._require_ready()
        if request.request_id in self._running:
            raise GenerationExists(f"generation {request.request_id!r} is running")
        # The engine knows the request by an id used once: deltas of a cancelled request may still be on their way
        # when its id is used again.
        engine_id = f"{request.request_id}#{next(self._serial)}"
        mailbox = self._mailboxes[engine_id] = Mailbox(request.request_id)
        self._running.add(request.request_id)
        try:
            self._send(Submit(replace(request, request_id=engine_id)))
            finish = None
            while finish is None:
                delta = await mailbox.take()
                finish = delta.finish
                yield delta
        finally:
            self._running.remove(request.request_id)
            del self._mailboxes[engine_id]
            if not mailbox.ended:
                self._send(Cancel(engine_id))

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
        assert len(self._running) == len(self._mailboxes), (self._running, self._mailboxes.keys())
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
        for reply in self._queries.values():
            if not reply.done():
                reply.set_exception(EngineUnavailable(why))

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise EngineUnavailable(f"the engine is {self._state}")
