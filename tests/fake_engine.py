"""An engine without a model: it answers with the prompt, a token a step, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from lorasrv.config import EngineConfig, ModelConfig
from lorasrv.engine.client import EngineState
from lorasrv.errors import EngineUnavailable
from lorasrv.server.server import ServerConfig
from lorasrv.types import (
    AdapterResidency,
    EngineInfo,
    EngineRequest,
    EngineStatus,
    FinishReason,
    PoolStats,
    Tier,
    TokenDelta,
)

EOS = 257
BASE_MODEL = Path(__file__).parent.parent / "adapters" / "samples" / "base"
INFO = EngineInfo(
    device="cpu",
    dtype="float32",
    vocab_size=260,
    context_tokens=64,
    block_tokens=16,
    page_bytes=1024,
    num_pages=10,
)


def echo(request: EngineRequest) -> Iterator[TokenDelta | Exception]:
    """The prompt behind its first token, then the end of sequence; shorter when max_tokens is.

    Sample i leaves out the first i tokens. The samples take turns.
    """
    answers = [list(_answer(request, index)) for index in range(request.n)]
    for turn in zip_longest(*answers):
        yield from (delta for delta in turn if delta is not None)


def _answer(request: EngineRequest, index: int) -> Iterator[TokenDelta]:
    delta = TokenDelta(request_id=request.request_id, sample=index)
    tokens = (*request.token_ids[1 + index :], EOS)[: request.max_tokens]
    for number, token in enumerate(tokens, start=1):
        at_end = FinishReason.EOS if token == EOS else FinishReason.LENGTH
        yield delta._replace(token_ids=(token,), finish=at_end if number == len(tokens) else None)


class FakeEngine:
    """An `Engine`. While `gate` is clear, streams wait behind their first delta; while `warm_gate` is, warms do.

    Warms raise `warm_error` if there is one, and have brought `warm_digests` to the device.
    """

    def __init__(self) -> None:
        self.script: Callable[[EngineRequest], Iterable[TokenDelta | Exception]] = echo
        self.requests: list[EngineRequest] = []
        self.ended_early: list[str] = []
        self.cancelled: list[tuple[str, int]] = []
        self.running: set[str] = set()
        self.warming: list[tuple[str, Tier, float]] = []
        self.warm_digests: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.warm_gate = asyncio.Event()
        self.warm_gate.set()
        self.warm_error: Exception | None = None
        self._state: EngineState = "starting"
        self._listeners: list[Callable[[EngineState], None]] = []
        self._closed = asyncio.Event()

    @property
    def state(self) -> EngineState:
        return self._state

    def set_state(self, state: EngineState) -> None:
        self._state = state
        for listener in self._listeners:
            listener(state)

    def on_state_change(self, callback: Callable[[EngineState], None]) -> None:
        self._listeners.append(callback)

    async def start(self) -> EngineInfo:
        self.set_state("ready")
        return INFO

    async def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        running = set(range(request.n))
        try:
            for turn, delta in enumerate(self.script(request)):
                if turn:
                    await self._pass(self.gate)
                await asyncio.sleep(0)
                if isinstance(delta, Exception):
                    raise delta
                if (request.request_id, delta.sample) in self.cancelled:
                    continue
                if delta.finish is not None:
                    running.remove(delta.sample)
                yield delta
        finally:
            self.running.remove(request.request_id)
            if running:
                self.ended_early.append(request.request_id)

    def cancel(self, request_id: str, index: int) -> None:
        self.cancelled.append((request_id, index))

    async def warm(self, digest: str, tier: Tier, deadline_s: float) -> Tier:
        if self._state != "ready":
            raise EngineUnavailable("the engine is not ready")
        self.warming.append((digest, tier, deadline_s))
        try:
            await self._pass(self.warm_gate)
            if self.warm_error is not None:
                raise self.warm_error
            self.warm_digests.add(digest)
            return tier
        finally:
            self.warming.remove((digest, tier, deadline_s))

    async def status(self) -> EngineStatus:
        if self._state != "ready":
            raise EngineUnavailable("the engine is not ready")
        digests = {request.adapter.digest for request in self.requests if request.adapter is not None}
        digests |= self.warm_digests
        return EngineStatus(
            pool=PoolStats(num_pages=10, free=10 - len(digests), sequences=0, prefix=0, adapters=len(digests)),
            running=len(self.running),
            waiting=0,
            pins=len(self.running),
            adapters=tuple(
                AdapterResidency(digest=digest, tier=Tier.DEVICE, num_pages=1, pins=0) for digest in sorted(digests)
            ),
        )

    async def close(self) -> None:
        self.set_state("unavailable")
        self._closed.set()

    async def _pass(self, gate: asyncio.Event) -> None:
        waits = [asyncio.create_task(gate.wait()), asyncio.create_task(self._closed.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._closed.is_set():
            raise EngineUnavailable("the engine was closed")


def server_config(data_dir: Path, listen: str = "127.0.0.1:0", grace_s: float = 0.2, **settings: float) -> ServerConfig:
    return ServerConfig(
        engine=EngineConfig(model=ModelConfig(path=str(BASE_MODEL))),
        data_dir=str(data_dir),
        listen=listen,
        grace_s=grace_s,
        **settings,
    )
