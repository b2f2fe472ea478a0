"""What operators do to a running server: watch it, drain it, scrape it."""

import asyncio
import contextlib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import FakeEngine, server_config
from lorasrv.client import Client
from lorasrv.errors import ConfigurationError, QueueFull
from lorasrv.server.info import MAX_WATCHERS
from lorasrv.server.metrics import CallCounter, Metrics
from lorasrv.server.server import Server
from lorasrv.v1 import generation_pb2_grpc, server_pb2, server_pb2_grpc
from running_server import Running, asked, refused, running_server, until

Code = grpc.StatusCode
SERVICES = ("", "lorasrv.v1.GenerationService", "lorasrv.v1.AdapterService", "lorasrv.v1.ServerService")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    config = replace(server_config(tmp_path / "data"), metrics_port=0)
    async with running_server(tmp_path / "data", config) as found:
        yield found


@pytest.fixture
def generation(running: Running) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(running.channel)


@pytest.fixture
def server(running: Running) -> Any:
    return server_pb2_grpc.ServerServiceStub(running.channel)


async def health(running: Running) -> list[bool]:
    stub: Any = health_pb2_grpc.HealthStub(running.channel)
    checks = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in SERVICES]
    return [check.status == health_pb2.HealthCheckResponse.SERVING for check in checks]


# Drain


async def test_draining_finishes_what_runs_and_admits_no_more(running: Running, generation: Any, server: Any) -> None:
    running.engine.gate.clear()
    calls = [generation.Generate(asked(text)) for text in ("one", "two")]
    await until(lambda: len(running.engine.running) == 2)
    for _ in range(2):
        assert (await server.Drain(server_pb2.DrainRequest())).remaining_generations == 2
    await refused(generation.Generate(asked()), Code.UNAVAILABLE, "DRAINING")
    status = await server.GetStatus(server_pb2.GetStatusRequest())
    assert (status.draining, status.open_generations) == (True, 2)
    running.engine.gate.set()
    assert [(await call).samples[0].text for call in calls] == ["one", "two"]
    assert (await server.Drain(server_pb2.DrainRequest())).remaining_generations == 0


async def test_draining_is_told_to_health_checks_and_an_engines_return_does_not_end_it(
    running: Running, server: Any
) -> None:
    assert await health(running) == [True] * 4
    assert not (await server.GetStatus(server_pb2.GetStatusRequest())).draining
    await server.Drain(server_pb2.DrainRequest())
    assert await health(running) == [False, False, True, True]
    for state in ("unavailable", "ready"):
        running.engine.set_state(state)
        await asyncio.sleep(0.02)
        assert await health(running) == [False, False, True, True]


# Status


async def test_a_watch_tells_the_status_again_and_again(running: Running, generation: Any, server: Any) -> None:
    request = server_pb2.WatchStatusRequest()
    request.interval.FromMilliseconds(100)
    watch = server.WatchStatus(request)
    first = await watch.read()
    assert (first.state, first.running_requests) == (server_pb2.ENGINE_STATE_READY, 0)
    running.engine.gate.clear()
    call = generation.Generate(asked())
    await until(lambda: bool(running.engine.running))
    while (await watch.read()).running_requests != 1:
        pass
    running.engine.set_state("unavailable")
    while (await watch.read()).state != server_pb2.ENGINE_STATE_UNAVAILABLE:
        pass
    watch.cancel()
    call.cancel()


@pytest.mark.parametrize("interval_s", [0.0, 0.099, 60.1, -1.0, 1e11])
async def test_intervals_are_bounded(server: Any, interval_s: float) -> None:
    request = server_pb2.WatchStatusRequest()
    request.interval.seconds = int(interval_s)
    request.interval.nanos = round((interval_s - int(interval_s)) * 1e9)
    await refused(server.WatchStatus(request).read(), Code.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_bounded_number_watches(running: Running, server: Any, generation: Any) -> None:
    watches = [server.WatchStatus(server_pb2.WatchStatusRequest()) for _ in range(MAX_WATCHERS)]
    for watch in watches:
        await watch.read()
    error = await refused(
        server.WatchStatus(server_pb2.WatchStatusRequest()).read(), Code.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED"
    )
    assert str(MAX_WATCHERS) in str(error.details())
    await generation.Generate(asked())
    watches.pop().cancel()
    for _ in range(200):
        another = server.WatchStatus(server_pb2.WatchStatusRequest())
        with contextlib.suppress(grpc.aio.AioRpcError):
            await another.read()
            watches.append(another)
            break
        await asyncio.sleep(0.005)
    assert len(watches) == MAX_WATCHERS, "the place of one that ended stays taken"
    for watch in watches:
        watch.cancel()


async def test_the_client_watches_and_drains(running: Running) -> None:
    def session() -> None:
        with Client(running.address) as client:
            watch = client.watch_status(0.1)
            assert not next(watch).draining
            assert client.drain() == 0
            while not next(watch).draining:
                pass
            watch.close()  # pyright: ignore[reportAttributeAccessIssue]

    await asyncio.to_thread(session)


# Metrics


def scrape(running: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://{running.server.metrics_address}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scraped(running: Running, name: str, **labels: str) -> float | None:
    return (await asyncio.to_thread(scrape, running)).get((name, frozenset(labels.items())))


async def test_calls_are_counted_by_how_they_ended(running: Running, generation: Any, server: Any) -> None:
    async def count(method: str, code: str) -> float | None:
        return await scraped(running, "lorasrv_calls_total", method=f"GenerationService/{method}", code=code)

    await generation.Generate(asked())
    assert [event async for event in generation.GenerateStream(asked())]
    await refused(generation.Generate(asked("")), Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    running.engine.script = lambda request: [QueueFull("full")]
    await refused(generation.Generate(asked()), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert await count("Generate", "OK") == await count("GenerateStream", "OK") == 1
    assert await count("Generate", "INVALID_ARGUMENT") == await count("Generate", "RESOURCE_EXHAUSTED") == 1


async def test_cancelled_and_overdue_calls_are_told_apart(running: Running, generation: Any) -> None:
    running.engine.gate.clear()
    call = generation.GenerateStream(asked())
    await call.read()
    call.cancel()
    with pytest.raises(grpc.aio.AioRpcError):
        await generation.Generate(asked(), timeout=2)
    await until(lambda: len(running.engine.ended_early) == 2)
    method = "GenerationService/"
    assert await scraped(running, "lorasrv_calls_total", method=f"{method}GenerateStream", code="CANCELLED") == 1
    assert await scraped(running, "lorasrv_calls_total", method=f"{method}Generate", code="DEADLINE_EXCEEDED") == 1


async def test_tokens_are_timed_by_sample(running: Running, generation: Any) -> None:
    await generation.Generate(asked("abc", n=2))
    # Sample 0 says "abc" and the end, sample 1 "bc" and the end.
    assert await scraped(running, "lorasrv_time_to_first_token_seconds_count") == 2
    assert await scraped(running, "lorasrv_inter_token_latency_seconds_count") == 3 + 2
    assert await scraped(running, "lorasrv_generation_duration_seconds_count") == 2


async def test_the_engines_state_is_asked_for(running: Running, generation: Any) -> None:
    assert await scraped(running, "lorasrv_engine_ready") == 1
    assert await scraped(running, "lorasrv_pool_pages", owner="free") == 10
    assert await scraped(running, "lorasrv_adapters", tier="device") == 0
    assert await scraped(running, "lorasrv_waiting_sequences") == 0
    assert await scraped(running, "lorasrv_prompt_tokens_total", source="cached") == 0
    assert await scraped(running, "lorasrv_adapter_loads_total") == 0
    running.engine.set_state("unavailable")
    assert await scraped(running, "lorasrv_engine_ready") == 0
    assert await scraped(running, "lorasrv_pool_pages", owner="free") is None


async def test_labels_are_few_whatever_is_called(running: Running, generation: Any) -> None:
    for number in range(20):
        call = running.channel.unary_unary(f"/lorasrv.v1.GenerationService/Nope{number}")(b"")
        await refused(call, Code.UNIMPLEMENTED, "UNKNOWN_METHOD")
        await refused(generation.Generate(asked(adapter=f"a{number}")), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    found = await asyncio.to_thread(scrape, running)
    labels = {pair for _, pairs in found for pair in pairs}
    assert not [value for _, value in labels if value.startswith(("Nope", "a1"))]
    calls = [dict(pairs) for name, pairs in found if name == "lorasrv_calls_total"]
    assert {(labels["method"], labels["code"]) for labels in calls} == {
        ("other", "UNIMPLEMENTED"),
        ("GenerationService/Generate", "NOT_FOUND"),
    }


async def test_what_is_refused_under_any_name_is_counted_under_one(running: Running) -> None:
    async def refuse(request: Any, context: Any) -> None:
        raise AssertionError("refused")

    async def continuation(details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(refuse)

    metrics = Metrics(running.engine)
    for number in range(3):
        details = SimpleNamespace(method=f"/lorasrv.v1.Nope/Nope{number}")
        handler = await CallCounter(metrics).intercept_service(continuation, details)  # pyright: ignore[reportArgumentType]
        with pytest.raises(AssertionError, match="refused"):
            await handler.unary_unary(None, SimpleNamespace(code=lambda: Code.UNAUTHENTICATED))
    assert metrics.registry.get_sample_value("lorasrv_calls_total", {"method": "other", "code": "UNAUTHENTICATED"}) == 3


async def test_metrics_are_on_loopback_and_off_unless_asked_for(running: Running, tmp_path: Path) -> None:
    assert running.server.metrics_address is not None
    assert running.server.metrics_address.startswith("127.0.0.1:")
    async with running_server(tmp_path / "other") as quiet:
        assert quiet.server.metrics_address is None


async def test_a_taken_metrics_port_is_said_before_a_model_is_loaded(running: Running, tmp_path: Path) -> None:
    assert running.server.metrics_address is not None
    port = int(running.server.metrics_address.rpartition(":")[2])
    engine = FakeEngine()
    server = Server(replace(server_config(tmp_path / "other"), metrics_port=port), lambda config: engine)
    try:
        with pytest.raises(ConfigurationError, match=str(port)):
            await server.start()
        assert engine.state == "starting"
    finally:
        await server.close()
    with pytest.raises(ConfigurationError, match="65536"):
        replace(server_config(tmp_path / "third"), metrics_port=65536)


async def test_metrics_end_with_the_server(tmp_path: Path) -> None:
    config = replace(server_config(tmp_path / "data"), metrics_port=0)
    async with running_server(tmp_path / "data", config) as running:
        await scraped(running, "lorasrv_engine_ready")
    with pytest.raises(urllib.error.URLError):
        await scraped(running, "lorasrv_engine_ready")
