"""A real server over a real registry, with a fake engine, on a free port of this process's event loop."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from fake_engine import FakeEngine, server_config
from lorasrv.server.server import Server, ServerConfig
from lorasrv.v1 import adapter_pb2, generation_pb2, server_pb2

# Every method of ours, by its path.
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (generation_pb2, adapter_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass(frozen=True, kw_only=True)
class Running:
    server: Server
    engine: FakeEngine
    address: str
    channel: grpc.aio.Channel


@asynccontextmanager
async def running_server(
    data_dir: Path, config: ServerConfig | None = None, **settings: float
) -> AsyncIterator[Running]:
    engine = FakeEngine()
    server = Server(config or server_config(data_dir, **settings), lambda _: engine)
    address = await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            yield Running(server=server, engine=engine, address=address, channel=channel)
        finally:
            await server.close()


def subprocess_env() -> dict[str, str]:
    """An environment in which a Python child imports what this process does, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def reason_of(error: Any) -> str | None:
    """The reason in a failed call's ErrorInfo, which is of our domain; None when it has none."""
    status, info = rpc_status.from_call(error), error_details_pb2.ErrorInfo()
    if status is None:
        return None
    assert (status.code, status.message) == (error.code().value[0], error.details())
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.domain == "lorasrv"
    return info.reason


def asked(text: str | None = "hé>", adapter: str = "base", **sampling: Any) -> generation_pb2.GenerateRequest:
    """A request with this text as its prompt."""
    return generation_pb2.GenerateRequest(
        adapter=[generation_pb2.AdapterRef(name=adapter)],
        text=text,
        sampling=generation_pb2.SamplingParams(**sampling),
    )


async def refused(call: Any, code: grpc.StatusCode, reason: str, what: str = "") -> grpc.aio.AioRpcError:
    """The error of a call that has to fail so; `what` says which it was. One that is not refused may well wait."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(30):
            await call
    assert (caught.value.code(), reason_of(caught.value)) == (code, reason), f"{what}: {caught.value.details()}"
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
