"""`lorasrv serve`: the life of the serving process, from the READY line to the last signal."""

import asyncio
import json
import logging
import resource
import signal
from collections.abc import Callable

from lorasrv.config import EngineConfig
from lorasrv.engine.client import Engine, ProcessEngine
from lorasrv.server.server import Server, ServerConfig

MAX_FILES = 1 << 16

log = logging.getLogger(__name__)


def serve(config: ServerConfig, announce: Callable[[str], None] = print, *, as_json: bool = False) -> None:
    """Serve until SIGTERM or SIGINT. `announce` gets the one READY line. Raises LorasrvError and AdapterError."""

    def ready(address: str) -> None:
        line = {"event": "ready", "address": address}
        announce(json.dumps(line) if as_json else f"READY {address}")

    def make_engine(engine: EngineConfig) -> Engine:
        return ProcessEngine(engine, heartbeat_timeout_s=config.heartbeat_timeout_s)

    allow_connections()
    asyncio.run(serve_until_signal(config, ready, make_engine))


def allow_connections() -> None:
    """Raise the limit on open files as far as this process may, within reason: each connection is one, and the usual
    1024 are for programs that call select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


async def serve_until_signal(
    config: ServerConfig, ready: Callable[[str], None], make_engine: Callable[[EngineConfig], Engine]
) -> None:
    """The first signal drains within `config.grace_s`; a second one ends the streams at once, a third the process.

    SIGHUP reads the key file again, where there is one.
    """
    signals = _Signals()
    server = Server(config, make_engine)
    if config.api_keys is not None:
        signals.on_hangup(server.reload_keys)
    try:
        starting = asyncio.create_task(server.start())
        stopping = asyncio.create_task(signals.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            log.info("told to stop before the server was ready")
            starting.cancel()
            await asyncio.wait({starting})
            return
        ready(starting.result())
        await stopping
        log.info("draining for up to %g s", config.grace_s)
    finally:
        await _stop(server, config.grace_s, signals)


async def _stop(server: Server, grace_s: float, signals: "_Signals") -> None:
    """Drain, unless a further signal comes."""
    hurry = asyncio.create_task(signals.wait())
    draining = asyncio.create_task(server.drain(grace_s))
    await asyncio.wait({hurry, draining}, return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    hurry.cancel()
    signals.restore()
    await server.close()


class _Signals:
    """SIGTERM and SIGINT as things to wait for, one after the other. Owned by the running event loop."""

    def __init__(self) -> None:
        self._arrived: asyncio.Queue[int] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._arrived.put_nowait, number)

    def on_hangup(self, callback: Callable[[], None]) -> None:
        self._loop.add_signal_handler(signal.SIGHUP, callback)

    async def wait(self) -> None:
        await self._arrived.get()

    def restore(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.remove_signal_handler(number)
