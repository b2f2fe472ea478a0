"""Both engines behind one interface, and what a process adds: death, silence, restart."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

import fake_core
from fake_core import FakeCore
from lorasrv.config import EngineConfig, ModelConfig
from lorasrv.engine.child import EngineChild
from lorasrv.engine.client import Engine, ProcessEngine, ThreadEngine
from lorasrv.engine.messages import Cancel, Configure, GetStatus, Ready, StatusReply, Step, Submit
from lorasrv.engine.routing import EngineState
from lorasrv.errors import (
    AdapterCorrupt,
    AdapterLoadFailed,
    EngineUnavailable,
    GenerationExists,
    LorasrvError,
    QueueFull,
    UnsupportedModel,
)
from lorasrv.types import EngineRequest, FinishReason, Tier, TokenDelta

WAIT_S = 20.0
E = TypeVar("E", bound=ThreadEngine | ProcessEngine)


def request(request_id: str, kind: int = fake_core.COUNT, max_tokens: int = 5) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=(kind,), adapter=None, max_tokens=max_tokens, seed=0)


def process_engine(path: str = "model", heartbeat_timeout_s: float = 10.0) -> ProcessEngine:
    return ProcessEngine(
        EngineConfig(model=ModelConfig(path=path)),
        factory="fake_core:build",
        heartbeat_timeout_s=heartbeat_timeout_s,
        first_backoff_s=0.05,
    )


@contextlib.asynccontextmanager
async def started(engine: E) -> AsyncIterator[E]:
    await engine.start()
    try:
        yield engine
        engine.check()
    finally:
        await engine.close()


@pytest.fixture(params=["thread", "process"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[ThreadEngine | ProcessEngine]:
    made = ThreadEngine(FakeCore(step_s=0.002), fake_core.INFO) if request.param == "thread" else process_engine()
    async with started(made):
        yield made


@pytest.fixture(autouse=True)
async def nothing_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tasks, threads, files = asyncio.all_tasks(), set(threading.enumerate()), open_files()
    yield
    await eventually(lambda: asyncio.all_tasks() <= tasks | {current_task()})
    left = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not {name for name in left if name.startswith("lorasrv")}
    assert not list(tmp_path.glob("lorasrv-*"))
    assert not children()
    await eventually(lambda: len(open_files() - files) <= NUM_LOOP_FILES)


# asyncio's own: the executor's and the child watcher's.
NUM_LOOP_FILES = 2


def current_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


def open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.01)


async def collect(engine: Engine, wanted: EngineRequest) -> list[int]:
    return [token for delta in [d async for d in engine.stream(wanted)] for token in delta.token_ids]


async def running(engine: Engine) -> int:
    return (await engine.status()).running


async def test_requests_stream_side_by_side(engine: Engine) -> None:
    results = await asyncio.gather(*(collect(engine, request(f"r{n}", max_tokens=n + 1)) for n in range(20)))
    assert results == [list(range(n + 1)) for n in range(20)]


async def samples_of(deltas: AsyncGenerator[TokenDelta, None]) -> dict[int, list[int]]:
    """The tokens by sample, of each of which nothing comes behind its finish."""
    tokens: dict[int, list[int]] = {}
    ended: set[int] = set()
    async for delta in deltas:
        assert delta.sample not in ended
        tokens.setdefault(delta.sample, []).extend(delta.token_ids)
        ended |= {delta.sample} if delta.finish else set()
    return tokens


async def test_a_stream_ends_when_all_its_samples_have(engine: Engine) -> None:
    wanted = replace(request("a"), n=3)
    assert await samples_of(engine.stream(wanted)) == {n: list(range(10 * n, 10 * n + 5)) for n in range(3)}


async def test_one_sample_is_cancelled_alone(engine: Engine) -> None:
    neighbour = asyncio.create_task(collect(engine, request("b", max_tokens=100)))
    stream = engine.stream(replace(request("a", fake_core.FOREVER), n=3))
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async for delta in stream:
        seen[delta.sample] += delta.token_ids
        if all(seen.values()) and delta.sample == 1:
            break
    engine.cancel("a", 1)
    last = len(seen[1])
    while min(len(seen[0]), len(seen[2])) < last + 20:
        delta = await anext(stream)
        seen[delta.sample] += delta.token_ids
    assert len(seen[1]) == last
    assert seen[2] == list(range(20, 20 + len(seen[2])))
    assert await running(engine) >= 1
    engine.cancel("a", 0)
    engine.cancel("a", 0)
    engine.cancel("a", 2)
    assert [delta async for delta in stream] == []
    engine.cancel("a", 2)
    assert await neighbour == list(range(100))
    assert await running(engine) == 0


async def test_the_engine_tells_samples_at_their_end_from_requests_that_are_dropped() -> None:
    core = FakeCore()
    async with started(ThreadEngine(core, fake_core.INFO)) as engine:
        ends, dropped = (engine.stream(replace(request(name, fake_core.FOREVER), n=2)) for name in ("ends", "dropped"))
        await anext(ends)
        await anext(dropped)
        for index in (1, 0):
            engine.cancel("ends", index)
        assert [delta async for delta in ends] == []
        await dropped.aclose()
        await eventually(lambda: len(core.cancelled) == 3)
    assert core.cancelled == [("ends#0", 1), ("ends#0", 0), "dropped#1"]


async def test_a_sample_cancelled_behind_its_unread_end_gives_nothing_more(engine: Engine) -> None:
    stream = engine.stream(replace(request("a", max_tokens=20), n=2))
    first = await anext(stream)
    await collect(engine, request("later", max_tokens=100))
    engine.cancel("a", first.sample)
    other = 1 - first.sample
    assert await samples_of(stream) == {other: list(range(10 * other, 10 * other + 20))}


async def test_a_failure_ends_all_samples_whichever_are_left(engine: Engine) -> None:
    stream = engine.stream(replace(request("a", fake_core.FAIL), n=2))
    seen = [await anext(stream), await anext(stream)]
    engine.cancel("a", 0)
    with pytest.raises(AdapterLoadFailed):
        seen += [delta async for delta in stream]
    assert sorted((delta.sample, delta.token_ids) for delta in seen) == [(0, (0,)), (1, (10,))]


async def test_the_last_delta_says_how_it_ended(engine: Engine) -> None:
    deltas = [delta async for delta in engine.stream(request("a"))]
    assert deltas[-1].finish == FinishReason.LENGTH
    assert all(delta.finish is None for delta in deltas[:-1])
    assert {delta.request_id for delta in deltas} == {"a"}


async def test_closing_a_stream_cancels_the_request(engine: Engine) -> None:
    stream = engine.stream(request("a", fake_core.FOREVER))
    await anext(stream)
    assert await running(engine) == 1
    await stream.aclose()
    assert await running(engine) == 0


async def test_cancelling_the_reader_cancels_the_request(engine: Engine) -> None:
    reader = asyncio.create_task(collect(engine, request("a", fake_core.FOREVER)))
    while await running(engine) == 0:
        await asyncio.sleep(0.01)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert await running(engine) == 0


async def test_an_id_can_be_used_again_at_once(engine: Engine) -> None:
    for _ in range(20):
        stream = engine.stream(request("a", fake_core.FOREVER))
        assert (await anext(stream)).token_ids[0] == 0, "a delta of the cancelled request came"
        with pytest.raises(GenerationExists, match="'a'"):
            await anext(engine.stream(request("a")))
        await stream.aclose()


async def test_a_lagging_readers_deltas_merge(engine: Engine) -> None:
    stream = engine.stream(replace(request("slow", max_tokens=50), logprobs=0, prompt_logprobs=0))
    first = await anext(stream)
    await collect(engine, request("fast", max_tokens=200))
    rest = [delta async for delta in stream]
    assert len(rest) == 1
    assert rest[0].sample == 0
    assert (*first.token_ids, *rest[0].token_ids) == tuple(range(50))
    assert rest[0].finish == FinishReason.LENGTH
    for merged in (first, rest[0]):
        assert tuple(each.token_id for each in merged.logprobs) == merged.token_ids
        assert merged.prompt_logprobs == merged.logprobs


async def test_a_refused_request_raises_its_error(engine: Engine) -> None:
    with pytest.raises(QueueFull, match="0 requests may wait"):
        await collect(engine, request("a", fake_core.REFUSE))


async def test_tokens_before_a_failure_are_given_before_it_is_raised(engine: Engine) -> None:
    seen: list[TokenDelta] = []
    with pytest.raises(AdapterLoadFailed, match="abc is damaged"):
        async for delta in engine.stream(request("a", fake_core.FAIL)):
            seen.append(delta)
            await collect(engine, request("other", max_tokens=20))
    assert [delta.token_ids for delta in seen] == [(0,)]


async def test_warms_end_with_their_tier_or_their_loads_error(engine: Engine) -> None:
    later = time.monotonic() + 60
    assert await engine.warm("a", Tier.DEVICE, later) is Tier.DEVICE
    with pytest.raises(AdapterCorrupt, match="no longer matches its digest"):
        await engine.warm("damaged", Tier.DEVICE, later)


async def test_a_cancelled_warm_is_cancelled_in_the_engine(engine: Engine) -> None:
    waiting = [asyncio.create_task(engine.warm("never", Tier.HOST, time.monotonic() + 60)) for _ in range(3)]
    while (await engine.status()).waiting < 3:
        await asyncio.sleep(0.01)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (await engine.status()).waiting == 0


async def test_warms_do_not_outlive_the_engine(engine: ThreadEngine | ProcessEngine) -> None:
    warming = asyncio.create_task(engine.warm("never", Tier.HOST, time.monotonic() + 60))
    while not (await engine.status()).waiting:
        await asyncio.sleep(0.01)
    await engine.close()
    for late in (warming, engine.warm("a", Tier.HOST, time.monotonic() + 60)):
        with pytest.raises(EngineUnavailable):
            await late
    engine.check()


async def test_a_step_that_breaks_ends_all_streams(engine: ThreadEngine | ProcessEngine) -> None:
    others = [asyncio.create_task(collect(engine, request(f"r{n}", fake_core.FOREVER))) for n in range(3)]
    while await running(engine) < 3:
        await asyncio.sleep(0.01)
    with pytest.raises(EngineUnavailable):
        await collect(engine, request("a", fake_core.BREAK))
    ended = await asyncio.gather(*others, return_exceptions=True)
    assert [type(error) for error in ended] == [EngineUnavailable] * 3
    engine.check()


async def test_close_ends_streams_and_later_calls(engine: Engine) -> None:
    reader = asyncio.create_task(collect(engine, request("a", fake_core.FOREVER)))
    while await running(engine) == 0:
        await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        await reader
    with pytest.raises(EngineUnavailable, match="unavailable"):
        await engine.status()
    with pytest.raises(EngineUnavailable, match="unavailable"):
        await collect(engine, request("b"))


async def test_a_front_process_that_stalls_finds_a_few_messages_and_every_token() -> None:
    """The engine goes on meanwhile, and hears what it is told."""
    child = await EngineChild.spawn("fake_core:build")
    try:
        child.send(Configure(EngineConfig(model=ModelConfig(path="model"))))
        assert isinstance(await child.receive(None, time.monotonic), Ready)
        child.send(Submit(replace(request("big", max_tokens=400), n=64)))
        child.send(Submit(request("endless", fake_core.FOREVER)))
        await asyncio.sleep(2.0)
        child.send(Cancel("endless"))
        deltas: list[TokenDelta] = []
        while sum(delta.finish is not None for delta in deltas) < 64:
            message = await child.receive(WAIT_S, time.monotonic)
            deltas += message.deltas if isinstance(message, Step) else ()
        child.send(GetStatus(1))
        while not isinstance(message := await child.receive(WAIT_S, time.monotonic), StatusReply):
            pass
        assert message.status.running == 0
    finally:
        await child.shutdown()
    tokens: dict[int, list[int]] = {index: [] for index in range(64)}
    for delta in deltas:
        if delta.request_id == "big":
            tokens[delta.sample] += delta.token_ids
    assert tokens == {index: list(range(10 * index, 10 * index + 400)) for index in range(64)}
    assert max(len(delta.token_ids) for delta in deltas) > 1, "a message tells of one step"


async def test_a_thread_engine_closes_its_core() -> None:
    core = FakeCore()
    async with started(ThreadEngine(core, fake_core.INFO)) as engine:
        assert await collect(engine, request("a")) == [0, 1, 2, 3, 4]
    assert core.closed


async def test_nothing_is_served_before_the_start() -> None:
    engine = process_engine()
    assert (engine.state, engine.pid) == ("starting", None)
    with pytest.raises(EngineUnavailable, match="starting"):
        await collect(engine, request("a"))
    await engine.close()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("unsupported", UnsupportedModel, "'gpt9' is not served"),
        ("defect", LorasrvError, "could not be built"),
        ("dies", EngineUnavailable, "exit status -9 while starting"),
    ],
)
async def test_a_start_that_fails_says_why(path: str, error: type[LorasrvError], message: str) -> None:
    engine = process_engine(path)
    with pytest.raises(error, match=message) as raised:
        await engine.start()
    assert "secret" not in str(raised.value)
    assert engine.pid is None
    await engine.close()


async def test_a_start_can_be_cancelled() -> None:
    engine = process_engine("loads-forever")
    starting = asyncio.create_task(engine.start())
    await eventually(lambda: engine.pid is not None)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert engine.pid is None
    await engine.close()


async def test_a_killed_process_ends_its_streams_and_comes_back() -> None:
    states: list[EngineState] = []
    async with started(process_engine()) as engine:
        engine.on_state_change(states.append)
        stream = engine.stream(request("a", fake_core.FOREVER))
        await anext(stream)
        killed = engine.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="exit status -9"):
            async for _ in stream:
                assert engine.state == "ready"
        assert states == ["unavailable"]
        await eventually(lambda: engine.state == "ready")
        assert engine.pid != killed
        assert await collect(engine, request("a")) == [0, 1, 2, 3, 4]
    assert states == ["unavailable", "ready", "unavailable"]


async def test_a_silent_process_is_replaced() -> None:
    async with started(process_engine(heartbeat_timeout_s=1.5)) as engine:
        with pytest.raises(EngineUnavailable, match=r"said nothing for 1\.5 s"):
            await collect(engine, request("a", fake_core.HANG))
        await eventually(lambda: engine.state == "ready")
        assert await collect(engine, request("a")) == [0, 1, 2, 3, 4]


async def test_restarts_go_on_until_one_succeeds(tmp_path: Path) -> None:
    gone = tmp_path / "started"
    async with started(process_engine(f"once:{gone}")) as engine:
        first = engine.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: engine.pid not in (None, first))
        second = engine.pid
        await eventually(lambda: engine.pid != second)
        assert engine.state == "unavailable"
        gone.unlink()
        await eventually(lambda: engine.state == "ready")


async def test_a_process_whose_words_nobody_reads_ends_when_told_to() -> None:
    engine = process_engine()
    async with started(engine):
        child = engine._child
        assert child is not None
        streams = [engine.stream(request(f"r{index}", fake_core.FOREVER)) for index in range(50)]
        for stream in streams:
            await anext(stream)
        time.sleep(0.3)  # noqa: ASYNC251 the loop reads nothing, and the channel fills
    assert child._process.returncode == 0, "it had to be killed"
    for stream in streams:
        await stream.aclose()


async def test_the_process_ends_with_its_parent() -> None:
    program = """
import asyncio, os, signal
from test_engine_client import process_engine
async def main():
    engine = process_engine()
    await engine.start()
    print(engine.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, sys.path))
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), cwd=tests, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    output, _ = await parent.communicate()
    await eventually(lambda: not Path(f"/proc/{int(output)}/cmdline").exists() or is_zombie(int(output)))


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
