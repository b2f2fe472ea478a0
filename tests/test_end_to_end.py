"""`lorasrv serve` as a process of its own, with the sample adapters, and the commands that talk to it."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from lorasrv.client import Client
from lorasrv.client.errors import ClientError
from lorasrv.demo.local_server import LocalServer
from lorasrv.demo.run import Kind, draw_runs, served_tasks, stream_all
from lorasrv.demo.tasks import TASKS, prompt, random_words
from lorasrv.v1.generation_pb2 import Delta, Started

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    with LocalServer(SAMPLES / "base", folder / "data", folder / "log", ("--pool-mib", "6")) as server:
        with Client(server.url) as client:
            for config in sorted(SAMPLES.glob("*/adapter_config.json")):
                client.push(config.parent)
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def run_cli(server: LocalServer, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lorasrv.cli", *arguments, "--url", server.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def assert_nothing_held(client: Client, within_s: float) -> None:
    """No sequence page, request or pin is held, now or shortly."""
    deadline = time.monotonic() + within_s
    while True:
        status = client.status()
        held = (status.running_requests, status.waiting_requests, status.adapter_pins, status.pool.sequence_pages)
        if not any(held):
            return
        assert time.monotonic() < deadline, f"still held after {within_s} s: {held}"
        time.sleep(0.02)


def test_all_samples_and_the_base_at_once(server: LocalServer, client: Client) -> None:
    tasks = served_tasks({adapter.adapter_id for adapter in client.adapters()})
    assert len(tasks) == len(TASKS) >= 6
    runs = draw_runs(tasks, seed=7)
    asyncio.run(stream_all(server.url, runs))
    assert [run for run in runs if not run.as_expected] == []
    assert {run.kind for run in runs} == set(Kind)
    assert_nothing_held(client, 1.0)


def test_started_names_the_version(client: Client) -> None:
    adapter = client.adapter("reverse")
    first = next(client.stream("banana>", adapter="reverse", temperature=0))
    assert isinstance(first, Started) and first.version_digest == adapter.tags["latest"]
    short = f"reverse@sha256:{adapter.tags['latest'][:8]}"
    assert client.generate("banana>", adapter=short, temperature=0).text == "ananab"
    assert client.generate("banana>", adapter="base", temperature=0).started.version_digest == ""


@pytest.mark.row(56)
def test_deleted_while_streaming(server: LocalServer, client: Client) -> None:
    version = client.push(SAMPLES / "upper", "doomed")
    word = random_words(3, 1)[0]
    stream = client.stream(prompt(word), adapter="doomed", temperature=0)
    started = next(stream)
    assert isinstance(started, Started) and started.version_digest == version.digest
    client.delete_adapter("doomed")
    text = "".join(getattr(event, "text", "") for event in stream)
    assert text == word.upper()
    with pytest.raises(ClientError) as error:
        client.generate("x>", adapter="doomed")
    assert error.value.code.name == "NOT_FOUND"


@pytest.mark.row(49)
def test_vanished_clients_leave_nothing_behind(server: LocalServer, client: Client, tmp_path: Path) -> None:
    """200 prompts at concurrency 32, interrupted midway; a neighbour's text is what it always is."""
    expected = client.generate("neighbour>", adapter="base", temperature=0.9, seed=5, max_tokens=200).text
    prompts = tmp_path / "prompts.jsonl"
    names = [task.name for task in TASKS]
    lines = [
        json.dumps({"prompt": prompt(word), "adapter": names[index % len(names)], "temperature": 9, "max_tokens": 400})
        for index, word in enumerate(random_words(11, 200))
    ]
    prompts.write_text("\n".join(lines))
    command = ["generate", "--file", str(prompts), "--concurrency", "32", "--url", server.url]
    with subprocess.Popen(
        [sys.executable, "-m", "lorasrv.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while client.status().running_requests < 8:
            assert process.poll() is None, "all done before eight ran at once"
        stream = client.stream("neighbour>", adapter="base", temperature=0.9, seed=5, max_tokens=200)
        next(stream)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.count("\n") < 199, "it was to be interrupted midway"
    assert "".join(getattr(event, "text", "") for event in stream) == expected
    status = json.loads(run_cli(server, "status", "--json").stdout)["status"]
    assert status["pool"]["sequence_pages"] == status["running_requests"] == status["adapter_pins"] == 0
    assert_nothing_held(client, 1.0)


def test_commands(server: LocalServer, tmp_path: Path) -> None:
    assert run_cli(server, "generate", "banana>", "--adapter", "reverse", "--temperature", "0").stdout == "ananab\n"
    pushed = run_cli(server, "adapters", "push", str(SAMPLES / "rot13"), "--name", "again", "--json")
    digest = json.loads(pushed.stdout)["version"]["digest"]
    listed = json.loads(run_cli(server, "adapters", "ls", "--json").stdout)["adapters"]
    assert {"again", "reverse"} <= {adapter["adapter_id"] for adapter in listed}
    assert digest in run_cli(server, "adapters", "show", "again").stdout
    assert run_cli(server, "adapters", "rm", "again").returncode == 0
    gone = run_cli(server, "adapters", "show", "again")
    assert (gone.returncode, gone.stderr.count("\n")) == (3, 1)


def test_a_refused_adapter_leaves_no_trace(client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "dora"
    folder.mkdir()
    config = json.loads((SAMPLES / "reverse" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    (folder / "adapter_model.safetensors").write_bytes((SAMPLES / "reverse" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ClientError) as error:
        client.push(folder)
    assert error.value.code.name == "FAILED_PRECONDITION"
    assert "use_dora" in error.value.message
    assert "dora" not in {adapter.adapter_id for adapter in client.adapters()}


def test_sigterm_ends_the_server(tmp_path: Path) -> None:
    with LocalServer(SAMPLES / "base", tmp_path / "data", tmp_path / "log") as server:
        pid = server.pid
        with Client(server.url) as client:
            assert client.generate("banana>", adapter="base", temperature=0).text == "banana"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_demo_from_the_command_line() -> None:
    command = [sys.executable, "-m", "lorasrv.cli", "demo", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "seed 1" in result.stdout


def engine_pid(server: LocalServer) -> int | None:
    """The server's engine process, by what it was started with."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server.pid and b"lorasrv.engine.process" in arguments:
                return int(folder.name)
    return None


def wait_for_health(channel: grpc.Channel, wanted: int) -> None:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    deadline = time.monotonic() + 60
    while check(health_pb2.HealthCheckRequest()).status != wanted:
        assert time.monotonic() < deadline, f"health is not {wanted} after a minute"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the engine in /proc")
def test_an_engine_that_is_killed_comes_back_with_its_adapters(server: LocalServer, client: Client) -> None:
    killed = engine_pid(server)
    assert killed is not None
    running = client.stream(
        "banana>", adapter="reverse", temperature=9, seed=0, max_tokens=400
    )  # 366 tokens, unless cut
    assert isinstance(next(running), Started) and isinstance(next(running), Delta)
    os.kill(killed, signal.SIGSTOP)
    queued = [client.stream("banana>", adapter=name, max_tokens=400) for name in ("upper", "base")]
    for stream in queued:
        assert isinstance(next(stream), Started)
    os.kill(killed, signal.SIGKILL)
    streams = [running, *queued]
    for stream in streams:
        with pytest.raises(ClientError) as error:
            list(stream)
        assert error.value.code.name == "UNAVAILABLE"
    with grpc.insecure_channel(server.url) as channel:
        wait_for_health(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert {"reverse", "upper"} <= {adapter.adapter_id for adapter in client.adapters()}
        wait_for_health(channel, health_pb2.HealthCheckResponse.SERVING)
    assert engine_pid(server) not in (None, killed)
    assert client.generate("banana>", adapter="reverse", temperature=0).text == "ananab"
    assert client.generate("banana>", adapter="upper", temperature=0).text == "BANANA"
    assert_nothing_held(client, 1.0)


def test_dummy_weights_need_no_checkpoint_and_may_be_deterministic(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes((SAMPLES / "base" / name).read_bytes())
    local = LocalServer(model, tmp_path / "data", tmp_path / "log", ("--dummy-weights", "--deterministic"))
    with local as server, Client(server.url) as client:
        client.push(SAMPLES / "upper")
        assert client.info().deterministic
        for adapter in ("base", "upper"):
            finished = client.generate("banana>", adapter=adapter, temperature=1, seed=1, max_tokens=5).finished
            assert 1 <= finished.usage.completion_tokens <= 5
