"""A real server at its limits: a flood, a storm of cold adapters, a pool too small. Neighbours notice nothing."""

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from adapter_folders import write_adapter
from keyed import TENANT_ROLES, KeyRing, bearer
from lorasrv.client import Client
from lorasrv.client.errors import DETAILS_KEY, ClientError, ResourceExhausted
from lorasrv.client.messages import generate_request
from lorasrv.demo.local_server import LocalServer
from lorasrv.v1 import generation_pb2, generation_pb2_grpc
from test_end_to_end import SAMPLES, assert_nothing_held

# 96 pages of 16 tokens; what the largest sample adapter takes is 15 of them.
POOL = ("--pool-mib", "3")
ASKED: dict[str, Any] = {"temperature": 9, "ignore_eos": True, "seed": 5}
MAX_WAITING = 8


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    return KeyRing(tmp_path_factory.mktemp("keys") / "keys.toml")


@pytest.fixture(scope="module")
def keys(ring: KeyRing) -> dict[str, str]:
    return {tenant: ring.add(tenant, TENANT_ROLES) for tenant in ("flood", "modest")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ring: KeyRing, keys: dict[str, str]) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    options = (*POOL, "--max-running", "8", "--max-waiting", str(MAX_WAITING), "--api-keys", str(ring.path))
    with LocalServer(SAMPLES / "base", folder / "data", folder / "log", options) as server:
        yield server


@pytest.fixture
def flood(server: LocalServer, keys: dict[str, str]) -> Iterator[Client]:
    with Client(server.url, api_key=keys["flood"]) as client:
        yield client


@pytest.fixture
def modest(server: LocalServer, keys: dict[str, str]) -> Iterator[Client]:
    with Client(server.url, api_key=keys["modest"]) as client:
        yield client


def tokens(
    client: Client,
    adapter: str = "base",
    max_tokens: int = 60,
    prompt: str = "neighbour>",
    begun: Barrier | None = None,
) -> list[int]:
    """Passes `begun` when the first tokens are there."""
    found: list[int] = []
    for event in client.stream(prompt, adapter=adapter, max_tokens=max_tokens, **ASKED):
        if isinstance(event, generation_pb2.Delta):
            if begun is not None and not found:
                begun.wait(60)
            found += event.token_ids
    return found


def hint_s(server: LocalServer, key: str) -> float | None:
    """When to try again, as a refused call is told; None where it was served."""
    with grpc.insecure_channel(server.url) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        asked = generate_request("neighbour>", adapter="base", max_tokens=100, **ASKED)
        call = stub.Generate.future(asked, metadata=bearer(key))
        if call.exception() is None:
            return None
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        packed = next(value for name, value in call.trailing_metadata() if name == DETAILS_KEY)
        hint = error_details_pb2.RetryInfo()
        details = status_pb2.Status.FromString(packed).details
        assert any(detail.Unpack(hint) for detail in details), "no hint when to try again"
        return hint.retry_delay.ToTimedelta().total_seconds()


def refusals(calls: list["Future[list[int]]"]) -> list[ClientError]:
    errors = [error for call in calls if (error := call.exception(300)) is not None]
    assert all(isinstance(error, ClientError) for error in errors), errors
    return [error for error in errors if isinstance(error, ClientError)]


@pytest.mark.row(52)
def test_a_flood_is_its_own_tenants_alone(
    server: LocalServer, keys: dict[str, str], flood: Client, modest: Client
) -> None:
    alone = tokens(modest)
    with ThreadPoolExecutor(48) as workers:
        calls = [workers.submit(tokens, flood, max_tokens=100) for _ in range(30)]
        hints = [workers.submit(hint_s, server, keys["flood"]) for _ in range(10)]
        while flood.status().waiting_requests < MAX_WAITING and not all(call.done() for call in calls):
            pass
        assert [tokens(modest) for _ in range(3)] == [alone] * 3
        errors = refusals(calls)
    assert errors and len(errors) < 30, "some are refused, and some served"
    assert {error.reason for error in errors} == {"QUEUE_FULL"}
    assert all(isinstance(error, ResourceExhausted) for error in errors)
    told = [hint for call in hints if (hint := call.result(300)) is not None]
    assert told and all(hint > 0 for hint in told)
    served = {tuple(call.result()) for call in calls if not call.exception()}
    assert served == {tuple(tokens(flood, max_tokens=100))}
    assert_nothing_held(flood, 30.0)


@pytest.mark.parametrize("num_adapters", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.row(53)
def test_a_storm_of_cold_adapters_queues_and_ends(tmp_path: Path, num_adapters: int) -> None:
    """All at once, through a pool that holds about ten of them, beside a stream that has its adapter."""
    max_waiting = num_adapters // 2
    options = ("--pool-mib", "1", "--max-waiting", str(max_waiting), "--max-running", "4")
    with LocalServer(SAMPLES / "base", tmp_path / "data", tmp_path / "log", options) as server:
        names = [f"cold-{number}" for number in range(num_adapters)]
        with Client(server.url) as client, ThreadPoolExecutor(min(num_adapters + 1, 600)) as workers:
            for number, name in enumerate(names):
                client.push(write_adapter(tmp_path / name, rank=1 + number % 7, seed=number), name)
            client.push(SAMPLES / "rot13", "hot")
            alone = tokens(client, "hot", 100)
            begun = Barrier(2)
            running = workers.submit(tokens, client, "hot", 100, begun=begun)
            begun.wait(60)
            calls = [workers.submit(tokens, client, name, 3) for name in names]
            assert running.result(600) == alone
            errors = refusals(calls)
            assert {error.reason for error in errors} <= {"QUEUE_FULL"}
            served = [(name, call.result()) for name, call in zip(names, calls, strict=True) if not call.exception()]
            assert len(served) >= max_waiting
            assert client.status().counters.adapter_evictions > len(served) // 2
            # Each alone gives what it gave in the storm.
            assert [(name, tokens(client, name, 3)) for name, _ in served[:40]] == served[:40]
            assert len({tuple(found) for _, found in served[:40]}) > 1, "adapters that make no difference tell nothing"
            assert_nothing_held(client, 30.0)


@pytest.mark.row(54)
def test_outputs_that_outgrow_the_pool_are_the_same(flood: Client, modest: Client) -> None:
    alone = [tokens(flood, max_tokens=400, prompt=f"{number}>") for number in range(6)]
    neighbour = tokens(modest)
    before = flood.status().counters.preemptions
    with ThreadPoolExecutor(7) as workers:
        calls = [workers.submit(tokens, flood, "base", 400, f"{number}>") for number in range(6)]
        beside = workers.submit(tokens, modest)
        assert [call.result(300) for call in calls] == alone
        assert beside.result(300) == neighbour
    assert flood.status().counters.preemptions > before, "six times 400 tokens fitted 96 pages"
    assert_nothing_held(flood, 30.0)


@pytest.mark.row(55)
def test_an_adapter_that_finds_everything_pinned_waits(flood: Client, modest: Client) -> None:
    flood.push(SAMPLES / "reverse")
    flood.push(SAMPLES / "stars")
    alone = tokens(flood, "reverse", 20)
    prompts = [chr(97 + number) * 440 for number in range(3)]
    expected = [tokens(modest, "base", 60, prompt) for prompt in prompts]
    # Out of the device, to make room for another.
    tokens(flood, "stars", 4)
    with ThreadPoolExecutor(4) as workers:
        # They hold 84 of the 96 pages from their first token on.
        begun = Barrier(len(prompts) + 1)
        long = [workers.submit(tokens, modest, "base", 60, prompt, begun) for prompt in prompts]
        begun.wait(60)
        cold = workers.submit(tokens, flood, "reverse", 20)
        assert cold.result(300) == alone
        assert [call.result(300) for call in long] == expected
    assert_nothing_held(flood, 30.0)


@pytest.mark.row(55)
def test_an_adapter_that_no_pool_of_this_size_could_hold_beside_its_request(tmp_path: Path) -> None:
    """It is refused once its size is known; a neighbour goes on."""
    with (
        LocalServer(SAMPLES / "base", tmp_path / "data", tmp_path / "log", ("--pool-mib", "1")) as server,
        Client(server.url) as client,
        ThreadPoolExecutor(1) as workers,
    ):
        client.push(SAMPLES / "reverse")
        alone = tokens(client, "base", 150)
        beside = workers.submit(tokens, client, "base", 150)
        with pytest.raises(ResourceExhausted) as refused:
            tokens(client, "reverse", 490)
        assert re.search(r"needs \d+ pages \(\d+ of them for its adapter\); the pool has 32", str(refused.value))
        assert beside.result(300) == alone
        assert len(tokens(client, "reverse", 20)) == 20
        assert_nothing_held(client, 30.0)
