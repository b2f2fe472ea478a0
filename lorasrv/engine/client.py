"""The engine as the front process sees it: `Engine`, as a process (`ProcessEngine`) or a thread (`ThreadEngine`)."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from lorasrv.config import EngineConfig
from lorasrv.engine.channel import MalformedMessage
from lorasrv.engine.child import EngineChild, EngineLost
from lorasrv.engine.loop import Core, serve_loop
from lorasrv.engine.messages import Configure, FromEngine, Message, Ready, Shutdown, StartFailed, ToEngine
from lorasrv.engine.process import DEFAULT_FACTORY
from lorasrv.engine.routing import EngineState, RoutingEngine
from lorasrv.errors import EngineUnavailable, LorasrvError, error_from_reason
from lorasrv.types import EngineInfo, EngineRequest, EngineStatus, Tier, TokenDelta

_log = logging.getLogger(__name__)
_MAX_BACKOFF_S = 30.0


class Engine(Protocol):
    """All methods belong to one event loop."""

    @property
    def state(self) -> EngineState:
        """ "starting" until the first `start` returns; "unavailable" while the engine is down, and after `close`."""
        ...

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it can serve. Raises what start-up failed with, e.g. UnsupportedModel."""
        ...

    def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of the request's samples; each sample's last one has `finish`, and when all have ended it is over.

        Closing the generator early cancels the request. A reader that lags gets fewer, longer deltas: what waits for
        it is at most what the request may produce. Raises the request's failure, GenerationExists for a request id
        that is running, and EngineUnavailable when the engine is not ready or goes away.
        """
        ...

    def cancel(self, request_id: str, index: int) -> None:
        """End one sample of a running stream, which has no more deltas of it; one that has ended is no error."""
        ...

    async def warm(self, digest: str, tier: Tier, deadline_s: float) -> Tier:
        """Wait until an adapter version is in this tier, HOST or DEVICE, or above; returns where it is.

        It goes behind all queued requests, and takes pages that are free or idle. What it has brought stays until it
        is evicted. Raises the load's failure, ResourceExhausted when the pool can never hold it, QueueFull,
        DeadlineExceeded at `deadline_s` of `time.monotonic`, and EngineUnavailable.
        """
        ...

    async def status(self) -> EngineStatus:
        """Raises EngineUnavailable."""
        ...

    def on_state_change(self, callback: Callable[[EngineState], None]) -> None:
        """Call `callback` in the event loop with every new state from now on."""
        ...

    async def close(self) -> None:
        """End the engine and all that it holds. Running streams raise EngineUnavailable. Safe to call twice."""
        ...


class ThreadEngine(RoutingEngine):
    """An engine in a thread of this process, for tests and benchmarks. It owns the core, and does not restart it."""

    def __init__(self, core: Core, info: EngineInfo) -> None:
        super().__init__()
        self._core = core
        self._info = info
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def start(self) -> EngineInfo:
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, args=(loop,), name="lorasrv-engine", daemon=True)
        self._thread.start()
        self._set_state("ready")
        return self._info

    async def close(self) -> None:
        self._set_unavailable("the engine was closed")
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(Shutdown())
            await asyncio.to_thread(thread.join)

    def _send(self, message: ToEngine) -> None:
        self._inbox.put(message)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        def receive(timeout_s: float) -> Message | None:
            try:
                return self._inbox.get(block=timeout_s > 0, timeout=timeout_s)
            except queue.Empty:
                return None

        def send(message: FromEngine) -> None:
            loop.call_soon_threadsafe(self._receive, message)

        try:
            serve_loop(self._core, receive, send, time.monotonic)
        except Exception:
            _log.exception("the engine broke")
            loop.call_soon_threadsafe(self._set_unavailable, "the engine broke; its log says why")
        finally:
            self._core.close()


class ProcessEngine(RoutingEngine):
    """An engine in a process of its own, which is started again whenever it ends or falls silent."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        factory: str = DEFAULT_FACTORY,
        heartbeat_timeout_s: float = 10.0,
        first_backoff_s: float = 0.5,
    ) -> None:
        super().__init__()
        self._config = config
        self._factory = factory
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._first_backoff_s = first_backoff_s
        self._child: EngineChild | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine process, while there is one."""
        return None if self._child is None else self._child.pid

    async def start(self) -> EngineInfo:
        info = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return info

    async def close(self) -> None:
        self._set_unavailable("the engine was closed")
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        child, self._child = self._child, None
        if child is not None:
            await child.shutdown()

    def _send(self, message: ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)

    async def _launch(self) -> EngineInfo:
        """A process that is ready, or an exception and no process."""
        self._child = child = await EngineChild.spawn(self._factory)
        try:
            child.send(Configure(self._config))
            # Loading a large model takes as long as it takes; the process's end is noticed.
            message = await child.receive(None, time.monotonic)
            match message:
                case Ready(info):
                    self._set_state("ready")
                    return info
                case StartFailed(failure):
                    raise error_from_reason(failure.reason, failure.message)
                case _:
                    raise MalformedMessage(f"the first message of the engine is {type(message).__name__}")
        except BaseException as error:
            self._child = None
            await child.close()
            if isinstance(error, EngineLost | MalformedMessage):
                raise EngineUnavailable(f"{error} while starting") from error
            raise

    async def _supervise(self) -> None:
        backoff_s = self._first_backoff_s
        while True:
            ready_s = time.monotonic()
            await self._serve_child()
            # An engine that served for long is no crash loop.
            if time.monotonic() - ready_s > _MAX_BACKOFF_S:
                backoff_s = self._first_backoff_s
            while self._state != "ready":
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
                try:
                    await self._launch()
                except (LorasrvError, OSError) as error:
                    _log.error("the engine does not start: %s", error)

    async def _serve_child(self) -> None:
        """Route messages until the child is lost."""
        assert self._child is not None
        try:
            while True:
                self._receive(await self._child.receive(self._heartbeat_timeout_s, time.monotonic))
        except (EngineLost, MalformedMessage) as error:
            _log.error("%s; starting it again", error)
            self._set_unavailable(str(error))
        child, self._child = self._child, None
        await child.close()
