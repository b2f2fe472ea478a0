"""ServerService: what this server is, and what it is doing."""

import time
from typing import Any

import grpc

from lorasrv.engine.client import Engine
from lorasrv.errors import EngineUnavailable
from lorasrv.server import convert
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.v1 import server_pb2, server_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ServerService(server_pb2_grpc.ServerServiceServicer):
    """`info` is complete once the engine has started and does not change."""

    def __init__(self, info: server_pb2.ServerInfo, engine: Engine, desk: FrontDesk) -> None:
        self._info = info
        self._engine = engine
        self._desk = desk
        self._started_s = time.monotonic()

    async def GetServerInfo(self, request: server_pb2.GetServerInfoRequest, context: Context) -> server_pb2.ServerInfo:
        return self._info

    async def GetStatus(self, request: server_pb2.GetStatusRequest, context: Context) -> server_pb2.ServerStatus:
        try:
            status = await self._engine.status()
        except EngineUnavailable:
            status = None
        uptime_s = time.monotonic() - self._started_s
        return convert.server_status(self._engine.state, status, self._desk.adapter_id, uptime_s)
