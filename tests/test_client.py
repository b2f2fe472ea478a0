"""The client library against a real server with a fake engine."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from adapter_folders import write_adapter
from lorasrv.client import AsyncClient, Client, ClientError
from lorasrv.client import errors as client_errors
from lorasrv.client.batch import Job, Outcome, generate_all
from lorasrv.client.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from lorasrv.client.messages import CHANNEL_OPTIONS, generate_request, target_of
from lorasrv.client.transfer import default_id, differing_files
from lorasrv.server.server import _OPTIONS as SERVER_OPTIONS
from lorasrv.types import SamplingParams
from lorasrv.v1 import adapter_pb2, generation_pb2, server_pb2
from relay import Relay
from running_server import Running, running_server, subprocess_env, until


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        yield found


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def test_a_session(running: Running, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper", rank=64)
    progress: list[tuple[int, int]] = []

    def session() -> None:
        with Client(f"http://{running.address}") as client:
            version = client.push(folder, progress=lambda sent, total: progress.append((sent, total)))
            response = client.generate("hello", adapter="upper", temperature=0.0, stop=["l"])
            assert (response.text, response.started.version_digest) == ("he", version.digest)
            assert client.generate([256, 71], adapter="base").text == "h"
            assert [adapter.adapter_id for adapter in client.adapters()] == ["upper"]
            assert client.adapter("upper").tags["latest"] == version.digest
            assert client.info().base_model.name == "base"
            assert client.status().state == server_pb2.ENGINE_STATE_READY
            client.delete_adapter("upper")
            with pytest.raises(NotFound, match="upper") as missing:
                client.adapter("upper")
            assert (missing.value.reason, missing.value.code) == ("ADAPTER_NOT_FOUND", grpc.StatusCode.NOT_FOUND)

    await asyncio.to_thread(session)
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert progress[-1] == (total, total)
    assert progress == sorted(progress)


async def test_every_verb_of_the_registry(running: Running, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in (0, 1)]

    def session() -> None:
        with Client(running.address) as client:
            old, new = (client.push(folder, "upper") for folder in folders)
            tag = client.set_tag(f"upper@sha256:{old.digest[:8]}", "prod")
            assert (tag.tag, tag.versions[0].digest) == ("prod", old.digest)
            started = client.generate("hello", adapter="upper@prod").started
            assert started.version_digest == client.version("upper@prod").digest == old.digest
            assert client.version("upper").digest == client.version("upper@latest").digest == new.digest
            assert [each.tag for each in client.tags("upper")] == ["latest", "prod"]
            assert [each.digest for each in client.versions("upper")] == [new.digest, old.digest]
            assert client.pull("upper@prod", tmp_path / "pulled").digest == old.digest
            for path in folders[0].iterdir():
                assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
            with pytest.raises(FileExistsError):
                client.pull("upper", tmp_path / "pulled")
            client.delete_tag("upper", "prod")
            client.delete_version(f"upper@sha256:{old.digest}")
            for gone in ("upper@prod", f"upper@sha256:{old.digest}"):
                with pytest.raises(NotFound, match="not found"):
                    client.version(gone)
            etag = client.update_adapter("upper", labels={"a": "b"}, annotations={"note": "x"}).etag
            assert [each.adapter_id for each in client.adapters(name_prefix="u", labels={"a": "b"})] == ["upper"]
            with pytest.raises(Aborted, match="etag"):
                client.update_adapter("upper", labels={}, etag="old")
            assert dict(client.update_adapter("upper", labels={}, etag=etag).annotations) == {"note": "x"}
            assert client.pin_adapter("upper").pinned
            with pytest.raises(FailedPrecondition, match="pinned"):
                client.delete_adapter("upper")
            assert not client.unpin_adapter("upper").pinned
            assert client.delete_adapter("upper").HasField("delete_time")
            assert (client.adapters(), len(client.adapters(show_deleted=True))) == ([], 1)
            with pytest.raises(AlreadyExists, match="deleted"):
                client.push(folders[0], "upper", create_only=True)
            assert client.undelete_adapter("upper") == client.adapter("upper")
            with pytest.raises(PermissionDenied, match="import root"):
                client.import_adapter("runs/upper", "upper")

    await asyncio.to_thread(session)


async def test_warm_and_verify(running: Running, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")

    def session() -> None:
        with Client(running.address) as client:
            version = client.push(folder)
            assert client.warm("upper").tier == adapter_pb2.TIER_DEVICE
            assert client.warm(f"upper@sha256:{version.digest[:8]}", "host").tier == adapter_pb2.TIER_HOST
            with pytest.raises(ValueError, match="'disk' is not one of host, device"):
                client.warm("upper", "disk")  # pyright: ignore[reportArgumentType]
            with pytest.raises(NotFound):
                client.warm("lower")
            found = client.verify("upper")
            assert found.version.digest == version.digest
            assert differing_files(folder, found.files) == []
            assert differing_files(write_adapter(tmp_path / "other", seed=1), found.files) == [
                "adapter_model.safetensors"
            ]
            (folder / "serving.json").write_text("{}")
            assert differing_files(folder, found.files) == ["serving.json"]
            with pytest.raises(NotFound):
                client.verify("upper@prod")
            running.engine.warm_gate.clear()
            with pytest.raises(DeadlineExceeded):
                client.warm("upper", timeout_s=0.05)

    await asyncio.to_thread(session)
    await until(lambda: not running.engine.warming)


async def test_the_async_client_has_what_a_service_asks_for_while_it_runs(running: Running, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("upper", "lower"))]

    def session(call: Callable[[Client], Any]) -> Any:
        with Client(running.address) as client:
            return call(client)

    for folder in folders:
        await asyncio.to_thread(session, lambda client, folder=folder: client.push(folder))
    async with AsyncClient(running.address) as client:
        assert (await client.warm("upper")).tier == adapter_pb2.TIER_DEVICE
        calls: tuple[Callable[[Any], Any], ...] = (
            lambda each: each.tokenize("hi", with_offsets=True, with_text=True),
            lambda each: each.tokenize("hi", adapter="base"),
            lambda each: each.detokenize([72, 73]),
            lambda each: each.adapters(),
            lambda each: each.adapters(name_prefix="u"),
        )
        for call in calls:
            same, other = await call(client), await asyncio.to_thread(session, call)
            assert same and same == other
        assert (await client.status()).state == server_pb2.ENGINE_STATE_READY
        running.engine.warm_gate.clear()
        waiting = asyncio.create_task(client.warm("upper"))
        await until(lambda: bool(running.engine.warming))
        waiting.cancel()
        await until(lambda: not running.engine.warming)
        for failing in (client.warm("nobody"), client.tokenize("hi", adapter="nobody")):
            with pytest.raises(NotFound) as missing:
                await failing
            assert missing.value.reason == "ADAPTER_NOT_FOUND"
        with pytest.raises(DeadlineExceeded):
            await client.warm("upper", timeout_s=0.05)


async def test_a_stream_in_both_clients(running: Running) -> None:
    def sync_kinds() -> list[type]:
        with Client(running.address) as client:
            return [type(event) for event in client.stream("hi", adapter="base", seed=1)]

    async with AsyncClient(running.address) as client:
        kinds = [type(event) async for event in client.stream("hi", adapter="base", seed=1)]
    assert kinds == await asyncio.to_thread(sync_kinds)
    assert (kinds[0], kinds[1], kinds[-1]) == (
        generation_pb2.Started,
        generation_pb2.Delta,
        generation_pb2.Finished,
    )


async def test_several_samples_have_no_text_of_their_own(running: Running) -> None:
    async with AsyncClient(running.address) as client:
        one = await client.generate("hi", adapter="base")
        two = await client.generate("hi", adapter="base", n=2)
    assert (one.text, list(one.token_ids), one.finished.usage.completion_tokens) == ("hi", [71, 72, 257], 3)
    assert [sample.text for sample in two.samples] == ["hi", "i"]
    for name in ("text", "token_ids", "logprobs", "finished"):
        with pytest.raises(ValueError, match="2 samples"):
            getattr(two, name)


async def test_closing_a_stream_cancels(running: Running) -> None:
    running.engine.gate.clear()

    def read_one() -> None:
        with Client(running.address) as client:
            events = client.stream("hello", adapter="base")
            next(events)
            next(events)
            events.close()  # pyright: ignore[reportAttributeAccessIssue]

    await asyncio.to_thread(read_one)
    while running.engine.running:
        await asyncio.sleep(0.005)
    assert len(running.engine.ended_early) == 1


async def test_errors_carry_code_reason_and_message(running: Running) -> None:
    async with AsyncClient(running.address) as client:
        with pytest.raises(InvalidArgument, match=r"sampling\.top_p: 2\.0") as caught:
            await client.generate("hi", adapter="base", top_p=2.0)
        assert caught.value.reason == "INVALID_REQUEST"
        with pytest.raises(NotFound):
            await anext(client.stream("hi", adapter="nope"))


async def test_no_server_is_unavailable() -> None:
    async with AsyncClient(free_address()) as client:
        with pytest.raises(Unavailable) as caught:
            await client.generate("hi", adapter="base")
    assert caught.value.reason is None


async def test_a_server_far_away_is_reached(running: Running) -> None:
    """The handshakes of a connection across an ocean take as long."""

    def session() -> str:
        with Relay(running.address, delay_s=0.4) as relay, Client(relay.address) as client:
            return client.generate("hello", adapter="base", temperature=0.0).text

    assert await asyncio.to_thread(session) == "hello"


async def test_a_server_that_is_gone_without_a_word_is_found_out(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a NAT that has forgotten the connection: nothing arrives, and nothing says so."""
    monkeypatch.setattr("lorasrv.client.messages.CHANNEL_OPTIONS", with_quick_pings(CHANNEL_OPTIONS))

    def session() -> str:
        with Relay(running.address) as relay, Client(relay.address, timeout_s=30) as client:
            client.info()
            relay.stop()
            with pytest.raises(Unavailable):
                client.generate("hello", adapter="base")
            relay.drop()
            relay.stop_at(None)
            return client.generate("hello", adapter="base", temperature=0.0).text

    assert await asyncio.to_thread(session) == "hello"


async def test_a_client_that_is_gone_without_a_word_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asked for gives its place to others."""
    monkeypatch.setattr("lorasrv.server.server._OPTIONS", with_quick_pings(SERVER_OPTIONS))
    async with running_server(tmp_path / "data") as running:
        running.engine.gate.clear()
        with Relay(running.address) as relay:
            async with AsyncClient(relay.address) as client:
                call = asyncio.create_task(client.generate("hello", adapter="base"))
                await until(lambda: bool(running.engine.running))
                relay.stop()
                async with asyncio.timeout(30):
                    await until(lambda: not running.engine.running)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)


def with_quick_pings(options: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Options with the same pings, where there are any, a hundred times as often, and answers waited for for 3 s."""
    scaled = [(name, value // 100 if name == "grpc.keepalive_time_ms" else value) for name, value in options]
    return (*scaled, ("grpc.http2.ping_timeout_ms", 3000))


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy"])
async def test_no_proxy_is_asked_for_this_machine(
    running: Running, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://{free_address()}")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with AsyncClient(running.address) as client:
        assert (await client.generate("hello", adapter="base", temperature=0.0)).text == "hello"


async def test_a_broken_push_continues_where_the_server_is(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "upper")
    monkeypatch.setattr("lorasrv.client.messages.CHUNK_BYTES", 1000)
    offsets: list[int] = []
    broken = False

    def push() -> adapter_pb2.Version:
        with Client(running.address) as client:
            write = client._adapters.WriteUpload

            def break_once(requests: object, **options: Any) -> adapter_pb2.Upload:
                nonlocal broken
                if broken:
                    messages = list(requests)  # pyright: ignore[reportArgumentType, reportCallIssue]
                    offsets.extend(message.offset_bytes for message in messages)
                    return write(iter(messages), **options)
                broken = True
                first = next(requests)  # pyright: ignore[reportArgumentType, reportCallIssue]
                write(iter([first]), **options)
                raise BrokenCall

            client._adapters.WriteUpload = break_once
            return client.push(folder, "upper")

    version = await asyncio.to_thread(push)
    assert len(version.digest) == 64
    config_bytes = (folder / "adapter_config.json").stat().st_size
    assert offsets[0] == min(1000, config_bytes) % config_bytes
    assert offsets[1] == 1000


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
async def test_a_push_that_breaks_after_an_hour_of_progress_goes_on(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: grpc.StatusCode
) -> None:
    folder = write_adapter(tmp_path / "upper")
    monkeypatch.setattr("lorasrv.client.messages.CHUNK_BYTES", 1000)
    monkeypatch.setattr("lorasrv.client.transfer.time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    now, num_breaks = 0.0, 0

    def push() -> adapter_pb2.Version:
        with Client(running.address) as client:
            write = client._adapters.WriteUpload

            def break_late(requests: object, **options: Any) -> adapter_pb2.Upload:
                nonlocal now, num_breaks
                now += 3600.0
                if num_breaks == 3:
                    return write(requests, **options)
                num_breaks += 1
                first = next(requests)  # pyright: ignore[reportArgumentType, reportCallIssue]
                write(iter([first]), **options)
                raise BrokenCall(code)

            client._adapters.WriteUpload = break_late
            return client.push(folder, "upper")

    assert len((await asyncio.to_thread(push)).digest) == 64


async def test_a_push_that_gets_nowhere_ends(running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "upper")
    monkeypatch.setattr("lorasrv.client.transfer.time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep))
    now, num_breaks = 0.0, 0

    def push() -> None:
        with Client(running.address) as client:

            def break_at_once(requests: object, **options: Any) -> adapter_pb2.Upload:
                nonlocal now, num_breaks
                now += 25.0
                num_breaks += 1
                raise BrokenCall

            client._adapters.WriteUpload = break_at_once
            with pytest.raises(Unavailable):
                client.push(folder, "upper", resume_s=60.0)

    await asyncio.to_thread(push)
    assert num_breaks == 4


class BrokenCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "connection reset"

    def trailing_metadata(self) -> tuple[()]:
        return ()


async def test_a_batch_comes_back_in_order_and_a_failure_is_one_jobs(running: Running) -> None:
    prompts = [f"prompt {'x' * (20 - index)}" for index in range(20)]
    jobs = [Job(prompt=prompt, adapter="nope" if index == 3 else "base") for index, prompt in enumerate(prompts)]
    outcomes: list[Outcome] = []
    async with AsyncClient(running.address) as client:
        await generate_all(client, jobs, 8, outcomes.append)
    assert [outcome.index for outcome in outcomes] == list(range(20))
    assert isinstance(outcomes[3].result, NotFound)
    texts = [outcome.result.text for outcome in outcomes if not isinstance(outcome.result, ClientError)]
    assert texts == [prompt for index, prompt in enumerate(prompts) if index != 3]


async def test_a_batch_keeps_to_its_concurrency_and_cancels_as_a_whole(running: Running) -> None:
    running.engine.gate.clear()
    jobs = [Job(prompt="hello", adapter="base")] * 10
    async with AsyncClient(running.address) as client:
        task = asyncio.create_task(generate_all(client, jobs, 4, lambda outcome: None))
        while len(running.engine.running) < 4:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert len(running.engine.requests) == 4
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while running.engine.running:
            await asyncio.sleep(0.005)
    assert len(running.engine.requests) == 4


async def test_more_calls_at_once_than_a_connection_carries(running: Running) -> None:
    async with AsyncClient(running.address) as client:
        answers = await asyncio.gather(*(client.generate("hello", adapter="base") for _ in range(1500)))
    assert {answer.text for answer in answers} == {"hello"}


async def test_calls_that_wait_for_their_turn(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasrv.client.aio.MAX_OPEN_CALLS", 2)
    running.engine.gate.clear()
    async with AsyncClient(running.address) as client, AsyncClient(running.address) as other:
        calls = [asyncio.create_task(client.generate("hello", adapter="base")) for _ in range(4)]
        await until(lambda: len(running.engine.running) == 2)
        with pytest.raises(DeadlineExceeded, match="2 calls of this client were open"):
            await client.warm("upper", timeout_s=0.05)
        await other.status()
        calls[0].cancel()
        await until(lambda: len(running.engine.requests) == 3)
        running.engine.gate.set()
        assert [(await call).text for call in calls[1:]] == ["hello"] * 3


async def test_a_batch_without_a_server_fails_once() -> None:
    async with AsyncClient(free_address()) as client:
        with pytest.raises(Unavailable):
            await generate_all(client, [Job(prompt="x", adapter="base")] * 20, 4, lambda outcome: None)


def test_every_kind_of_prompt_is_a_request() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    request = generate_request(messages, adapter="base", ignore_version_defaults=True)
    assert [(each.role, each.content) for each in request.messages.messages] == [("user", "hi"), ("assistant", "ho")]
    assert request.ignore_version_defaults
    assert list(generate_request([1, 2], adapter="base").tokens.ids) == [1, 2]
    assert generate_request("hi", adapter="base").WhichOneof("prompt") == "text"
    assert generate_request([], adapter="base").WhichOneof("prompt") == "tokens"
    for mixed in (b"hi", [messages[0], 3], [3, messages[0]], [{"role": "user", "content": "hi", "name": "x"}]):
        with pytest.raises((TypeError, ValueError)):
            generate_request(mixed, adapter="base")


def test_a_linked_folder_has_the_name_of_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run-17").mkdir()
    (tmp_path / "best").symlink_to("run-17")
    assert default_id(tmp_path / "best") == "best"
    monkeypatch.chdir(tmp_path / "run-17")
    assert [default_id(Path(given)) for given in (".", "../best/", "../run-17/.")] == ["run-17", "best", "run-17"]


def test_one_stop_string_is_not_its_characters() -> None:
    assert list(generate_request("hi", adapter="base", stop="ab").sampling.stop) == ["ab"]
    assert list(generate_request("hi", adapter="base", stop=["ab", "c"]).sampling.stop) == ["ab", "c"]
    assert SamplingParams(stop="ab").stop == ("ab",)  # pyright: ignore[reportArgumentType]


def test_an_async_client_may_be_made_before_its_loop() -> None:
    """At the top of a module, as services do."""
    client = AsyncClient(free_address())

    async def session() -> None:
        async with client:
            with pytest.raises(Unavailable):
                await client.generate("hello", adapter="base")

    asyncio.run(session())


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1", "http://127.0.0.1:1/"])
def test_urls(url: str) -> None:
    assert target_of(url) == ("127.0.0.1:1", False)


def test_a_url_of_tls() -> None:
    assert target_of("https://llm.example.com:443/") == ("llm.example.com:443", True)
    assert target_of("https://[fd00::2]:443") == ("[fd00::2]:443", True)


BAD_ADDRESSES = ("", "localhost", "a:b", "::1:8470", "[::1:8470", "a:99999", "a:²", "u@a:1")


@pytest.mark.parametrize("url", [*BAD_ADDRESSES, "ftp://a:1", "https://http://a:1", "http://a:1/path", ":1"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"is not HOST:PORT|above 65535"):
        target_of(url)


def test_every_grpc_code_has_a_class() -> None:
    mapped = {kind.code for kind in ClientError.__subclasses__()} | {ClientError.code, grpc.StatusCode.OK}
    assert mapped == set(grpc.StatusCode)
    assert all(kind.__module__ == client_errors.__name__ for kind in ClientError.__subclasses__())


@pytest.mark.parametrize("module", ["lorasrv.client", "lorasrv.cli.main"])
def test_a_client_loads_no_server_packages(module: str) -> None:
    heavy = ("torch", "transformers", "numpy", "tokenizers", "msgspec", "zmq", "lorasrv.server", "lorasrv.engine")
    program = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=subprocess_env()
    )
    assert result.stdout.strip() == "[]"
