"""ServerService: what this server is, and what it is doing."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import grpc

from lorasrv.engine.client import Engine
from lorasrv.errors import EngineUnavailable, InvalidRequest, ResourceExhausted
from lorasrv.keys import Role
from lorasrv.server import convert
from lorasrv.server.access import current_caller
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.server.seen import SeenVersions
from lorasrv.types import EngineStatus
from lorasrv.v1 import server_pb2, server_pb2_grpc

# Of all callers together; each costs an engine query per interval.
MAX_WATCHERS = 64
MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 60.0
DEFAULT_INTERVAL_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """`info` is complete once the engine has started and does not change. `drain` begins to drain the server.

    The status lists those versions that the caller's tenant has asked for here; an admin sees all.
    """

    def __init__(
        self,
        info: server_pb2.ServerInfo,
        engine: Engine,
        desk: FrontDesk,
        seen: SeenVersions,
        drain: Callable[[], Awaitable[None]],
    ) -> None:
        self._info = info
        self._engine = engine
        self._desk = desk
        self._seen = seen
        self._drain = drain
        self._started_s = time.monotonic()
        self._num_watchers = 0

    async def GetServerInfo(self, request: server_pb2.GetServerInfoRequest, context: Context) -> server_pb2.ServerInfo:
        return self._info

    async def GetStatus(self, request: server_pb2.GetStatusRequest, context: Context) -> server_pb2.ServerStatus:
        return await self._status()

    async def WatchStatus(
        self, request: server_pb2.WatchStatusRequest, context: Context
    ) -> AsyncGenerator[server_pb2.ServerStatus, None]:
        interval_s = request.interval.ToTimedelta().total_seconds() if request.HasField("interval") else None
        if interval_s is not None and not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
            raise InvalidRequest(
                "interval", f"{interval_s:g} s is not within [{MIN_INTERVAL_S:g}, {MAX_INTERVAL_S:g}] s"
            )
        if self._num_watchers == MAX_WATCHERS:
            raise ResourceExhausted(f"{MAX_WATCHERS} status streams are open, which is the limit")
        self._num_watchers += 1
        try:
            while True:
                yield await self._status()
                await asyncio.sleep(DEFAULT_INTERVAL_S if interval_s is None else interval_s)
        finally:
            self._num_watchers -= 1

    async def Drain(self, request: server_pb2.DrainRequest, context: Context) -> server_pb2.DrainResponse:
        await self._drain()
        return server_pb2.DrainResponse(remaining_generations=self._desk.num_running)

    async def _status(self) -> server_pb2.ServerStatus:
        try:
            status = await self._engine.status()
        except EngineUnavailable:
            status = None
        return convert.server_status(
            self._engine.state,
            status,
            self._names(status),
            uptime_s=time.monotonic() - self._started_s,
            draining=self._desk.draining,
            open_generations=self._desk.num_running,
        )

    def _names(self, status: EngineStatus | None) -> dict[str, str]:
        """By digest, what the caller may see of the versions in memory."""
        caller = current_caller()
        names: dict[str, str] = {}
        for adapter in () if status is None else status.adapters:
            name = self._seen.name(caller.tenant, adapter.digest)
            if name is None and Role.ADMIN in caller.roles:
                name = self._seen.any_name(adapter.digest) or ""
            if name is not None:
                names[adapter.digest] = name
        return names
