"""`lorasrv serve` with one place in its batch: positions, classes, deadlines, metrics and draining."""

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasrv.client import Client
from lorasrv.client.errors import DeadlineExceeded, Unavailable
from lorasrv.demo.local_server import LocalServer
from lorasrv.v1.generation_pb2 import Finished, Queued
from test_end_to_end import assert_nothing_held

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
OPTIONS = ("--pool-mib", "6", "--max-running", "1", "--metrics-port", "0")
PROMPT = "neighbour>"
UNIQUE = "a prompt that nobody else has>"
SHORT: dict[str, Any] = {"adapter": "base", "temperature": 9, "seed": 5, "ignore_eos": True, "max_tokens": 5}
# One after the other: more than a second's work.
LONG: dict[str, Any] = {**SHORT, "max_tokens": 400, "n": 32}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(SAMPLES / "base", tmp_path / "data", tmp_path / "log", OPTIONS) as server:
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


class Calls:
    """Streams in threads of their own; what each got, and in which order they ended."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads: list[threading.Thread] = []
        self.positions: dict[str, list[int]] = {}
        self.texts: dict[str, str] = {}
        self.ended: list[str] = []

    def start(self, name: str, **asked: object) -> None:
        thread = threading.Thread(target=self._stream, args=(name, asked))
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)

    def last_position(self, name: str) -> int:
        return (self.positions.get(name) or [-1])[-1]

    def _stream(self, name: str, asked: dict[str, object]) -> None:
        with Client(self._url) as client:
            self.positions[name] = []
            for event in client.stream(PROMPT, **asked):
                if isinstance(event, Queued):
                    self.positions[name].append(event.position)
                self.texts[name] = self.texts.get(name, "") + getattr(event, "text", "")
                if isinstance(event, Finished):
                    self.ended.append(name)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def metric(tmp_path: Path, name: str) -> float:
    """Of the server whose log is there."""
    address = re.search(r"metrics at (\S+)", (tmp_path / "log").read_text())
    assert address is not None
    with urllib.request.urlopen(address[1], timeout=30) as reply:
        found = re.search(rf"^{re.escape(name)} (\S+)$", reply.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


@pytest.mark.row(50)
def test_those_who_wait(server: LocalServer, client: Client, tmp_path: Path) -> None:
    alone = client.generate(PROMPT, **SHORT).text
    before = client.status().counters
    calls = Calls(server.url)
    blocker = client.stream(PROMPT, **LONG)
    next(blocker)
    until(lambda: client.status().running_requests == 1)
    for number, name in enumerate(("batch", "normal0", "normal1")):
        calls.start(name, priority="batch" if name == "batch" else None, **SHORT)
        until(lambda number=number: client.status().open_generations == 2 + number)
    with Client(server.url, timeout_s=1.0) as hasty, pytest.raises(DeadlineExceeded):
        hasty.generate(UNIQUE, **SHORT)
    # Overtaken, though it came first.
    until(lambda: calls.last_position("batch") > calls.last_position("normal1") > calls.last_position("normal0") >= 0)
    blocker.close()  # pyright: ignore[reportAttributeAccessIssue]
    calls.join()
    assert calls.ended == ["normal0", "normal1", "batch"]
    assert set(calls.texts.values()) == {alone}
    assert_nothing_held(client, 30.0)
    after = client.status().counters
    assert after.finished_requests - before.finished_requests == 3
    # What was overdue had not a token computed.
    cached = client.status().counters.cached_prompt_tokens
    client.generate(UNIQUE, **SHORT)
    assert client.status().counters.cached_prompt_tokens == cached
    assert metric(tmp_path, "lorasrv_waiting_sequences") == 0
    assert metric(tmp_path, "lorasrv_finished_requests_total") == after.finished_requests + 1
    code = 'lorasrv_calls_total{code="DEADLINE_EXCEEDED",method="GenerationService/Generate"}'
    assert metric(tmp_path, code) == 1


def test_a_deadline_ends_what_runs_and_draining_finishes_what_is_in_time(server: LocalServer, client: Client) -> None:
    alone = client.generate(PROMPT, **SHORT).text
    with Client(server.url, timeout_s=1.0) as hasty, pytest.raises(DeadlineExceeded):
        list(hasty.stream(PROMPT, **LONG))
    assert_nothing_held(client, 30.0)
    calls = Calls(server.url)
    blocker = client.stream(PROMPT, **LONG)
    next(blocker)
    calls.start("queued", **SHORT)
    until(lambda: client.status().open_generations == 2)
    assert client.drain() == 2
    with pytest.raises(Unavailable) as refused:
        client.generate(PROMPT, **SHORT)
    assert refused.value.reason == "DRAINING"
    assert client.status().draining
    blocker.close()  # pyright: ignore[reportAttributeAccessIssue]
    calls.join()
    assert calls.texts == {"queued": alone}
    until(lambda: client.drain() == 0)
