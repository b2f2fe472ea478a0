"""`lorasrv serve` with a pool of 32 pages: adapters warmed while a neighbour streams, and the commands for it."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_folders import write_adapter
from lorasrv.client import Client
from lorasrv.client.errors import ClientError, DataLoss, DeadlineExceeded, ResourceExhausted
from lorasrv.demo.local_server import LocalServer
from lorasrv.v1 import adapter_pb2
from lorasrv.v1.generation_pb2 import Delta
from test_end_to_end import assert_nothing_held, run_cli

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
OPTIONS = ("--pool-mib", "1", "--max-running", "1")
STREAM: dict[str, Any] = {"adapter": "upper", "temperature": 9, "seed": 5, "ignore_eos": True, "max_tokens": 150}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "data"


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[LocalServer]:
    with LocalServer(SAMPLES / "base", data_dir, data_dir.parent / "log", OPTIONS) as server:
        with Client(server.url) as client:
            for name in ("upper", "stars", "reverse", "rot13"):
                client.push(SAMPLES / name)
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client
        assert_nothing_held(client, 30.0)


@contextmanager
def innocent_neighbour(client: Client) -> Iterator[None]:
    """A stream that has begun before the block and ends behind it gives what it gives alone."""
    alone = client.generate("neighbour>", **STREAM).token_ids
    stream = client.stream("neighbour>", **STREAM)
    seen: list[int] = []
    while not seen:
        seen += getattr(next(stream), "token_ids", ())
    yield
    for event in stream:
        seen += getattr(event, "token_ids", ())
    assert seen == alone


def loads(client: Client) -> int:
    return client.status().counters.adapter_loads


def tier_of(client: Client, name: str) -> str:
    return adapter_pb2.Tier.Name(client.version(name).tier).removeprefix("TIER_").lower()


def test_a_request_finds_a_warm_adapter_on_the_device(client: Client) -> None:
    with innocent_neighbour(client):
        before = loads(client)
        assert client.warm("stars", "host").tier == adapter_pb2.TIER_HOST
        assert (loads(client), tier_of(client, "stars")) == (before, "host")
        assert client.warm("stars@latest").tier == adapter_pb2.TIER_DEVICE
        assert (loads(client), tier_of(client, "stars")) == (before + 1, "device")
        # More than is asked for is enough.
        assert client.warm("stars", "host").tier == adapter_pb2.TIER_DEVICE
    assert client.generate("banana>", adapter="stars", temperature=0).text
    assert loads(client) == before + 1
    version = client.version("stars")
    assert (version.hits, version.max_rank >= 1, version.size_bytes > 0) == (4, True, True)


def test_warms_of_one_adapter_are_one_load(server: LocalServer, client: Client) -> None:
    def warm(number: int) -> int:
        with Client(server.url) as own:
            return own.warm("rot13", "device" if number % 2 else "host").tier

    with innocent_neighbour(client):
        before = loads(client)
        with ThreadPoolExecutor(8) as threads:
            tiers = list(threads.map(warm, range(8)))
        assert loads(client) == before + 1
    assert set(tiers[1::2]) == {adapter_pb2.TIER_DEVICE}
    assert client.generate("banana>", adapter="rot13", temperature=0).text == "onanan"
    assert loads(client) == before + 1


def test_an_adapter_that_never_fits(client: Client, tmp_path: Path) -> None:
    client.push(write_adapter(tmp_path / "huge", rank=256))
    with innocent_neighbour(client):
        with pytest.raises(ResourceExhausted, match="the pool has 32") as refused:
            client.warm("huge")
        assert refused.value.reason == "RESOURCE_EXHAUSTED"
        # What the pool cannot hold, host memory can.
        assert client.warm("huge", "host").tier == adapter_pb2.TIER_HOST


def test_warming_waits_behind_the_queue_until_its_deadline(server: LocalServer, client: Client) -> None:
    """The queue's samples run one after the other, for longer than the deadline."""
    blocker = client.stream("x" * 200, **{**STREAM, "n": 32})
    while not isinstance(next(blocker), Delta):
        pass
    with pytest.raises(DeadlineExceeded):
        client.warm("reverse", timeout_s=0.3)
    done = run_cli(server, "adapters", "warm", "reverse", "--timeout", "0.2")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1), done.stderr
    assert client.status().waiting_requests > 0, "the machine was too fast for this test"
    blocker.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert client.warm("reverse").tier == adapter_pb2.TIER_DEVICE


def test_a_read_that_finds_damage_is_that_adapters_alone(client: Client, data_dir: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "bad", seed=3)
    version = client.push(folder)
    with innocent_neighbour(client):
        for reason in ("ADAPTER_CORRUPT", "CORRUPT_BLOB"):
            damage(data_dir, folder)
            with pytest.raises(DataLoss) as refused:
                client.warm("bad") if reason == "ADAPTER_CORRUPT" else client.verify("bad")
            assert refused.value.reason == reason
            with pytest.raises(DataLoss) as refused:
                client.warm("bad")
            assert refused.value.reason == "VERSION_QUARANTINED"
            assert client.push(folder).digest == version.digest
            assert client.verify("bad").version.state == adapter_pb2.VERSION_STATE_READY
        assert client.warm("upper").tier == adapter_pb2.TIER_DEVICE
    assert client.warm("bad").digest == version.digest


def damage(data_dir: Path, folder: Path) -> None:
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    blob = data_dir / "blobs" / digest[:2] / digest
    blob.write_bytes(bytes(len(blob.read_bytes())))


def test_the_commands(server: LocalServer, client: Client, data_dir: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        done = run_cli(server, "adapters", *map(str, arguments))
        return done.returncode, done.stdout, done.stderr

    upper, stars = (f"{name}@sha256:{client.version(name).digest}" for name in ("upper", "stars"))
    assert run("warm", "upper", "stars@latest") == (0, f"{upper}: device\n{stars}: device\n", "")
    code, out, _ = run("warm", stars, "--tier", "host", "--json")
    shown = json.loads(out)
    assert (code, shown["adapter_id"], shown["version"]["tier"]) == (0, "stars", "TIER_DEVICE")
    code, _, said = run("warm", "upper", "nobody", "stars")
    assert code == 3 and "ADAPTER_NOT_FOUND" in said
    assert run("warm", "base")[0] == 5
    assert run("warm")[0] == run("warm", "upper", "--tier", "disk")[0] == run("warm", "upper", "--timeout", "0")[0] == 2

    size = client.version("upper").size_bytes
    assert run("verify", "upper") == (0, f"{upper}: ready, {size} bytes as stored\n", "")
    assert run("verify", "upper@latest", "--folder", SAMPLES / "upper")[0] == 0
    assert json.loads(run("verify", "upper", "--json")[1])["ok"] is True
    code, out, said = run("verify", "upper", "--folder", SAMPLES / "stars")
    assert (code, out) == (5, "") and "adapter_model.safetensors" in said and upper in said
    assert run("verify", "upper", "--folder", tmp_path)[0] == 3
    assert run("verify", "nobody")[0] == 3
    client.push(write_adapter(tmp_path / "bad", seed=4))
    damage(data_dir, tmp_path / "bad")
    code, out, said = run("verify", "bad")
    assert (code, out) == (1, "") and "CORRUPT_BLOB" in said
    code, out, _ = run("show", "bad")
    assert code == 0 and "quarantined" in out
    with pytest.raises(ClientError):
        client.generate("x>", adapter="bad")
