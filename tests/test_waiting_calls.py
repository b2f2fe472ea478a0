"""Calls that wait, over real gRPC: deadlines, cancellation and classes reach the engine, positions come back."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fake_engine import echo
from lorasrv.client import AsyncClient, Client
from lorasrv.errors import DeadlineExceeded
from lorasrv.types import EngineRequest, Priority, TokenDelta
from lorasrv.v1 import generation_pb2, generation_pb2_grpc
from running_server import Running, asked, refused, running_server, until

Code = grpc.StatusCode


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        yield found


@pytest.fixture
def generation(running: Running) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(running.channel)


async def test_the_engine_is_told_the_deadline_on_the_clock_that_it_shares(running: Running, generation: Any) -> None:
    before_s = time.monotonic()
    await generation.Generate(asked(), timeout=1000)
    after_s = time.monotonic()
    await generation.Generate(asked())
    first, second = running.engine.requests
    # The wire has the time that was left in whole units of at most a few digits.
    assert first.deadline_s is not None and before_s + 990 < first.deadline_s < after_s + 1010
    assert second.deadline_s is None


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.row(50)
async def test_a_deadline_ends_the_work_and_a_neighbour_goes_on(running: Running, generation: Any, method: str) -> None:
    running.engine.gate.clear()
    neighbour = generation.Generate(asked("neighbour"))
    await until(lambda: len(running.engine.running) == 1)
    call = getattr(generation, method)(asked(), timeout=2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if method == "Generate" else drained(call))
    assert caught.value.code() is Code.DEADLINE_EXCEEDED
    await until(lambda: len(running.engine.ended_early) == 1)
    running.engine.gate.set()
    assert (await neighbour).samples[0].text == "neighbour"
    await until(lambda: not running.engine.running)
    assert len(running.engine.ended_early) == 1


async def test_an_engine_that_finds_the_deadline_passed_says_so(running: Running, generation: Any) -> None:
    running.engine.script = lambda request: [DeadlineExceeded("the call's deadline has passed")]
    await refused(generation.Generate(asked()), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


async def test_a_unary_call_that_is_cancelled_ends_its_work(running: Running, generation: Any) -> None:
    running.engine.gate.clear()
    call = generation.Generate(asked())
    await until(lambda: bool(running.engine.running))
    call.cancel()
    await until(lambda: not running.engine.running)
    assert len(running.engine.ended_early) == 1


@pytest.mark.parametrize(
    ("given", "priority"),
    [
        (generation_pb2.PRIORITY_UNSPECIFIED, Priority.NORMAL),
        (generation_pb2.PRIORITY_NORMAL, Priority.NORMAL),
        (generation_pb2.PRIORITY_BATCH, Priority.BATCH),
    ],
)
async def test_class_and_session_reach_the_engine(
    running: Running, generation: Any, given: generation_pb2.Priority, priority: Priority
) -> None:
    request = asked()
    request.priority, request.session_key = given, "talk-7"
    await generation.Generate(request)
    await generation.Generate(asked())
    first, second = running.engine.requests
    assert (first.priority, first.session_key) == (priority, "talk-7")
    assert (second.priority, second.session_key) == (Priority.NORMAL, None)


def behind_two(request: EngineRequest) -> Iterator[TokenDelta | Exception]:
    for position in (1, 0):
        yield TokenDelta(request_id=request.request_id, queue_position=position)
    yield from echo(request)


async def test_a_stream_tells_where_it_stands_and_a_unary_call_does_not_mind(running: Running, generation: Any) -> None:
    running.engine.script = behind_two
    events = [event async for event in generation.GenerateStream(asked())]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[:3] == ["started", "queued", "queued"]
    assert kinds.count("queued") == 2
    assert [event.queued.position for event in events[1:3]] == [1, 0]
    assert "".join(event.delta.text for event in events) == "hé>"
    assert (await generation.Generate(asked())).samples[0].text == "hé>"


async def test_the_clients_ask_for_a_class_and_see_where_they_stand(running: Running) -> None:
    running.engine.script = behind_two
    options: dict[str, Any] = {"adapter": "base", "priority": "batch", "session_key": "talk-7"}
    async with AsyncClient(running.address) as client:
        events = [event async for event in client.stream("hé>", **options)]

    def sync() -> list[object]:
        with Client(running.address) as client:
            return list(client.stream("hé>", **options))

    for found in (events, await asyncio.to_thread(sync)):
        queued = [event for event in found if isinstance(event, generation_pb2.Queued)]
        assert [event.position for event in queued] == [1, 0]
    assert [(each.priority, each.session_key) for each in running.engine.requests] == [(Priority.BATCH, "talk-7")] * 2


async def drained(call: Any) -> None:
    async for _ in call:
        pass
