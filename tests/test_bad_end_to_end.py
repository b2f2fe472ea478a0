"""A real engine among bad callers: a neighbour's tokens are what they are without them, and every page comes back."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapter_files import safetensors_bytes
from bad_content import arrays, config
from http2_frames import Connection, call_headers, call_message
from lorasrv.client import Client
from lorasrv.client.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from lorasrv.client.messages import generate_request
from lorasrv.demo.local_server import LocalServer
from lorasrv.v1 import server_pb2
from lorasrv.v1.generation_pb2 import Delta
from registry_calls import CONFIG, WEIGHTS, write_raw
from running_server import reason_of, subprocess_env
from test_end_to_end import SAMPLES, assert_nothing_held

# Any batch gives a stream the same bits.
OPTIONS = ("--pool-mib", "24", "--deterministic")
PROMPT = "neighbour>"
ASKED: dict[str, Any] = {"temperature": 9, "ignore_eos": True}
NEIGHBOUR: dict[str, Any] = {**ASKED, "adapter": "neighbour", "seed": 5, "max_tokens": 300}
LONG: dict[str, Any] = {**ASKED, "adapter": "upper", "max_tokens": 480}
STREAM = "/lorasrv.v1.GenerationService/GenerateStream"
# Reads the first events of a stream, says so, and reads on.
READER = """
import sys
from lorasrv.client import Client
for number, _ in enumerate(Client(sys.argv[1]).stream("banana>", **eval(sys.argv[2]))):
    if number == 2:
        print("reading", flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    with LocalServer(SAMPLES / "base", folder / "data", folder / "log", OPTIONS) as server:
        with Client(server.url) as client:
            for name, adapter_id in (("upper", "upper"), ("rot13", "neighbour")):
                client.push(SAMPLES / name, adapter_id)
        yield server


@pytest.fixture(scope="module")
def alone(server: LocalServer) -> list[int]:
    """What the neighbour gets when nobody else is there."""
    with Client(server.url) as client:
        return list(neighbour(client))


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client
        assert_nothing_held(client, 10.0)
        pool = client.status().pool
        owned = pool.free_pages + pool.sequence_pages + pool.adapter_pages + pool.prefix_pages
        assert (owned, pool.sequence_pages) == (pool.num_pages, 0)
        assert client.status().open_generations == 0


def neighbour(client: Client) -> Iterator[int]:
    """The tokens of a good stream, one by one: seconds of work."""
    for event in client.stream(PROMPT, **NEIGHBOUR):
        yield from getattr(event, "token_ids", ())


def until_running(client: Client, num_running: int) -> server_pb2.ServerStatus:
    deadline = time.monotonic() + 60
    while (status := client.status()).running_requests != num_running:
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
    return status


@pytest.mark.row(19)
def test_an_adapter_of_zeros_is_the_base_model(client: Client, tmp_path: Path) -> None:
    weights = safetensors_bytes(arrays(fill=0.0))
    client.push(write_raw(tmp_path / "zeros", {CONFIG: config(), WEIGHTS: weights}))
    asked: dict[str, Any] = {**ASKED, "seed": 7, "max_tokens": 30, "logprobs": 2}
    base, zeros = (client.generate(PROMPT, adapter=name, **asked) for name in ("base", "zeros"))
    assert (zeros.token_ids, zeros.logprobs) == (base.token_ids, base.logprobs)
    assert zeros.token_ids != client.generate(PROMPT, adapter="upper", **asked).token_ids


@pytest.mark.row(*range(37, 45), 46, 47)
def test_bad_calls_cost_a_neighbour_nothing(server: LocalServer, client: Client, alone: list[int]) -> None:
    running = neighbour(client)
    seen = [next(running)]
    mine = client.stream("banana>", generation_id="mine", **LONG)
    next(mine)
    bad: list[tuple[type[Exception], Callable[[], object]]] = [
        (InvalidArgument, lambda: client.generate("", adapter="upper")),
        (InvalidArgument, lambda: client.generate([], adapter="upper")),
        (InvalidArgument, lambda: client.generate("x", adapter="")),
        (InvalidArgument, lambda: client.generate([100_000], adapter="upper")),
        (InvalidArgument, lambda: client.generate("x" * 513, adapter="upper")),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", max_tokens=512)),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", max_tokens=0)),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", min_tokens=3, max_tokens=2)),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", temperature=float("nan"))),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", top_p=0)),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", n=2**31)),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", logprobs=2**31)),
        (InvalidArgument, lambda: client.generate("x", adapter="upper", stop=["x"] * 100_000)),
        (NotFound, lambda: client.generate("x", adapter="nope")),
        (NotFound, lambda: client.generate("x", adapter="upper@nope")),
        (NotFound, lambda: client.generate("x", adapter=f"upper@sha256:{'0' * 64}")),
        (AlreadyExists, lambda: client.generate("x", adapter="upper", generation_id="mine")),
        (ResourceExhausted, lambda: client.generate("x" * (5 << 20), adapter="upper")),
    ]
    with grpc.insecure_channel(server.url) as channel:
        for error, call in bad:
            with pytest.raises(error):
                call()
        for data in (b"\xff", b"\x12\x02\xff\xfe"):
            with pytest.raises(grpc.RpcError) as caught:
                next(channel.unary_stream(STREAM)(data))
            assert reason_of(caught.value) == "INVALID_REQUEST"
        with pytest.raises(grpc.RpcError) as caught:
            next(channel.unary_stream(STREAM)(b"", metadata=(("x-bomb", "x" * (64 << 10)),)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # pyright: ignore[reportAttributeAccessIssue]
    assert until_running(client, 2).waiting_requests == 0
    mine.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert seen + list(running) == alone


@pytest.mark.row(49)
def test_clients_that_vanish_leave_their_pages(server: LocalServer, client: Client, alone: list[int]) -> None:
    """One is killed, one resets its connection, one closes it, one hangs up on its call; each in midstream."""
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, server.url, repr(LONG)], env=subprocess_env(), stdout=subprocess.PIPE
    )
    assert reader.stdout is not None and reader.stdout.readline() == b"reading\n"
    running = neighbour(client)
    seen = [next(running)]
    message = generate_request("banana>", **LONG).SerializeToString()
    with Connection(server.url) as reset, Connection(server.url) as closed:
        for connection in (reset, closed):
            assert connection.send(call_headers(1, STREAM) + call_message(1, message))
        called = client.stream("banana>", **LONG)
        while not isinstance(next(called), Delta):
            pass
        until_running(client, 5)
        reset.reset()
    called.close()  # pyright: ignore[reportAttributeAccessIssue]
    reader.kill()
    reader.communicate()
    until_running(client, 1)
    assert seen + list(running) == alone
