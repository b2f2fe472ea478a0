"""The standard health service, per service name: generation is served while the engine is ready and admits."""

import asyncio

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]

from lorasrv.engine.client import Engine, EngineState

ALWAYS_SERVING = ("lorasrv.v1.AdapterService", "lorasrv.v1.ServerService")
# "" is the server as a whole: a load balancer should not send it work that it cannot do.
FOLLOW_ENGINE = ("", "lorasrv.v1.GenerationService")


class Health:
    """Owned by the event loop. `servicer` is the one to register."""

    def __init__(self, engine: Engine) -> None:
        self.servicer = health_aio.HealthServicer()
        self._engine = engine
        self._states: asyncio.Queue[EngineState] = asyncio.Queue()
        self._follower: asyncio.Task[None] | None = None
        self._draining = False

    async def start(self) -> None:
        for service in ALWAYS_SERVING:
            await self.servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._publish(self._engine.state)
        self._engine.on_state_change(self._states.put_nowait)
        self._follower = asyncio.create_task(self._follow())

    async def drain(self) -> None:
        """Generation is NOT_SERVING for good, whatever the engine does."""
        self._draining = True
        await self._publish(self._engine.state)

    async def leave(self) -> None:
        """NOT_SERVING for good: the server is about to stop."""
        if self._follower is not None:
            self._follower.cancel()
            self._follower = None
        await self.servicer.enter_graceful_shutdown()

    async def _follow(self) -> None:
        while True:
            await self._publish(await self._states.get())

    async def _publish(self, state: EngineState) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        status = serving if state == "ready" and not self._draining else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in FOLLOW_ENGINE:
            await self.servicer.set(service, status)
