"""The serving process's life: ready, drained on a first signal, ended on a second."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from fake_engine import FakeEngine, server_config
from keyed import KeyRing
from lorasrv.client import AsyncClient
from lorasrv.client.errors import Unauthenticated
from lorasrv.errors import UnsupportedModel
from lorasrv.keys import Role
from lorasrv.server.serve import serve_until_signal
from lorasrv.types import EngineInfo
from lorasrv.v1 import generation_pb2, generation_pb2_grpc
from running_server import reason_of, subprocess_env

ASKED = generation_pb2.GenerateRequest(adapter=[generation_pb2.AdapterRef(name="base")], text="hello")


class Serving:
    """`serve_until_signal` as a task, and one stream held by the engine's gate."""

    def __init__(self, data_dir: Path, grace_s: float, **settings: str) -> None:
        self.engine = FakeEngine()
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = replace(server_config(data_dir, grace_s=grace_s), **settings)
        self.task = asyncio.create_task(
            serve_until_signal(config, self._address.set_result, lambda config: self.engine)
        )

    async def address(self) -> str:
        return await self._address

    async def held_stream(self) -> Any:
        self.engine.gate.clear()
        channel = grpc.aio.insecure_channel(await self._address)
        call = generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(ASKED)
        while not self.engine.running:
            await asyncio.sleep(0.005)
        return call


async def ends_unavailable(stream: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stream:
            pass
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")


def test_a_server_may_have_more_connections_than_the_shell_allows() -> None:
    program = "import resource; from lorasrv.server.serve import allow_connections; "
    program += "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4000)); allow_connections(); "
    program += "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    assert subprocess.check_output([sys.executable, "-c", program], env=subprocess_env(), text=True) == "4000 4000\n"


async def test_a_signal_lets_streams_finish(tmp_path: Path) -> None:
    serving = Serving(tmp_path, grace_s=30)
    stream = await serving.held_stream()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert not serving.task.done()
    serving.engine.gate.set()
    events = [event.WhichOneof("event") async for event in stream]
    assert events[-1] == "finished"
    await serving.task


@pytest.mark.parametrize(("grace_s", "num_signals"), [(0.05, 1), (30.0, 2)])
async def test_streams_end_with_unavailable_when_time_is_up(tmp_path: Path, grace_s: float, num_signals: int) -> None:
    serving = Serving(tmp_path, grace_s=grace_s)
    stream = await serving.held_stream()
    for _ in range(num_signals):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.02)
    await ends_unavailable(stream)
    await asyncio.wait_for(serving.task, 10)
    assert serving.engine.state == "unavailable"
    assert not serving.engine.running


async def test_a_signal_before_ready_ends_it(tmp_path: Path) -> None:
    class SlowEngine(FakeEngine):
        async def start(self) -> EngineInfo:
            self.starting = True
            await asyncio.sleep(60)
            raise AssertionError("not reached")

    engine = SlowEngine()
    ready: list[str] = []
    task = asyncio.create_task(serve_until_signal(server_config(tmp_path), ready.append, lambda config: engine))
    while not hasattr(engine, "starting"):
        await asyncio.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 10)
    assert (ready, engine.state) == ([], "unavailable")


async def test_sighup_reads_the_keys_again(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    serving = Serving(tmp_path / "data", grace_s=0, api_keys=str(ring.path))
    async with AsyncClient(await serving.address(), api_key=ring.add("acme", [Role.GENERATE])) as client:
        with pytest.raises(Unauthenticated):
            await client.generate("x", adapter="base")
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0)
        assert (await client.generate("x", adapter="base")).text == "x"
    os.kill(os.getpid(), signal.SIGTERM)
    await serving.task


async def test_an_engine_that_does_not_start_is_the_error(tmp_path: Path) -> None:
    class BrokenEngine(FakeEngine):
        async def start(self) -> EngineInfo:
            raise UnsupportedModel("no such family")

    engine = BrokenEngine()
    with pytest.raises(UnsupportedModel, match="no such family"):
        await serve_until_signal(server_config(tmp_path), lambda address: None, lambda config: engine)
    assert engine.state == "unavailable"
    # The data directory is free again.
    other = Serving(tmp_path, grace_s=0)
    stream = await other.held_stream()
    os.kill(os.getpid(), signal.SIGTERM)
    await ends_unavailable(stream)
    await other.task
