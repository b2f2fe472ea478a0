"""A real server whose disk hangs or fails for one adapter: its own requests end, by name, and nobody else notices."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorasrv.client import Client
from lorasrv.client.errors import Unavailable
from lorasrv.demo.local_server import LocalServer
from lorasrv.v1 import adapter_pb2
from registry_calls import WEIGHTS
from test_end_to_end import SAMPLES, assert_nothing_held, run_cli

TIMEOUT_S = 5
OPTIONS = ("--pool-mib", "24", "--deterministic", "--read-timeout-s", str(TIMEOUT_S))
# Which adapter is struck, and which others are cold then.
STRUCK = {"hangs": ("upper", "reverse"), "fails": ("capital", "stars")}
ASKED: dict[str, Any] = {"temperature": 9, "ignore_eos": True, "seed": 5}
WAIT_S = 60.0


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "data"


@pytest.fixture(scope="module")
def server(data_dir: Path) -> Iterator[LocalServer]:
    with LocalServer(SAMPLES / "base", data_dir, data_dir.with_name("log"), OPTIONS) as server:
        with Client(server.url) as client:
            for name in ("rot13", *(name for names in STRUCK.values() for name in names)):
                client.push(SAMPLES / name)
        yield server


def blob_of(data_dir: Path, name: str) -> Path:
    digest = hashlib.sha256((SAMPLES / name / WEIGHTS).read_bytes()).hexdigest()
    return data_dir / "blobs" / digest[:2] / digest


def stream(client: Client, adapter: str, max_tokens: int) -> Iterator[int]:
    for event in client.stream("neighbour>", adapter=adapter, max_tokens=max_tokens, **ASKED):
        yield from getattr(event, "token_ids", ())


def until_tier(client: Client, name: str, tier: adapter_pb2.Tier) -> adapter_pb2.Version:
    deadline = time.monotonic() + WAIT_S
    while (version := client.version(name)).tier != tier:
        assert time.monotonic() < deadline, version
        time.sleep(0.02)
    return version


@pytest.mark.row(57)
@pytest.mark.parametrize("how", STRUCK)
def test_a_read_that_hangs_or_fails_is_its_own_requests_alone(server: LocalServer, data_dir: Path, how: str) -> None:
    name, cold = STRUCK[how]
    weights = blob_of(data_dir, name)
    with Client(server.url) as client, ThreadPoolExecutor(1) as workers:
        alone = list(stream(client, "rot13", 100))
        weights.unlink()
        os.mkfifo(weights) if how == "hangs" else weights.mkdir()
        running = stream(client, "rot13", 100)
        seen = [next(running)]
        refused = workers.submit(lambda: list(stream(client, name, 4)))
        if how == "hangs":
            until_tier(client, name, adapter_pb2.TIER_READING)
        assert len(list(stream(client, cold, 8))) == 8
        assert how == "fails" or not refused.done(), "a cold adapter waited for one whose read hangs"
        seen += running
        assert seen == alone
        error = refused.exception(WAIT_S)
        assert isinstance(error, Unavailable) and error.reason == "ADAPTER_LOAD_FAILED"
        why = f"longer than {TIMEOUT_S} s" if how == "hangs" else "could not be read"
        assert why in str(error)
        version = until_tier(client, name, adapter_pb2.TIER_FAILED)
        assert why in version.failure
        assert why in run_cli(server, "adapters", "show", name).stdout
        (status,) = [each for each in client.status().adapters if each.adapter_id == name]
        assert (status.tier, status.failure) == (adapter_pb2.TIER_FAILED, version.failure)
        assert_nothing_held(client, 10.0)

        weights.unlink() if how == "hangs" else weights.rmdir()
        shutil.copy(SAMPLES / name / WEIGHTS, weights)
        assert len(list(stream(client, name, 4))) == 4, "a later attempt is not poisoned"
        version = client.version(name)
        assert (version.tier, version.failure) == (adapter_pb2.TIER_DEVICE, "")
        assert_nothing_held(client, 10.0)
