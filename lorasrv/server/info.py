"""ServerService: what this server is, and what it is doing."""

import time
from typing import Any

import grpc

from lorasrv.engine.client import Engine
from lorasrv.errors import EngineUnavailable
from lorasrv.keys import Role
from lorasrv.server import convert
from lorasrv.server.access import current_caller
from lorasrv.server.seen import SeenVersions
from lorasrv.types import EngineStatus
from lorasrv.v1 import server_pb2, server_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """`info` is complete once the engine has started and does not change.

    The status lists those versions that the caller's tenant has asked for here; an admin sees all.
    """

    def __init__(self, info: server_pb2.ServerInfo, engine: Engine, seen: SeenVersions) -> None:
        self._info = info
        self._engine = engine
        self._seen = seen
        self._started_s = time.monotonic()

    async def GetServerInfo(self, request: server_pb2.GetServerInfoRequest, context: Context) -> server_pb2.ServerInfo:
        return self._info

    async def GetStatus(self, request: server_pb2.GetStatusRequest, context: Context) -> server_pb2.ServerStatus:
        try:
            status = await self._engine.status()
        except EngineUnavailable:
            status = None
        uptime_s = time.monotonic() - self._started_s
        return convert.server_status(self._engine.state, status, self._names(status), uptime_s)

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
