"""Streams through gRPC against the same streams in process, on an engine that costs next to nothing.

    PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.streaming

The engine gives every running request a token per step, at 45,000 tokens a second in all.

- `grpc` is a server as `lorasrv serve` runs it, the engine in a process of its own, and clients in others.
- `desk` is the same core in a thread of this process, and the same front desk, which makes the same text.
- `loop` is the same core and the same text in one plain loop, as `lorasrv.LLM` has it: nothing waits for anything.

The three alternate. A round's speed is all its tokens over the time from the first request to the last stream's end,
and it counts when every stream has the right tokens and the right text.
"""

import argparse
import asyncio
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lorasrv.config import EngineConfig, ModelConfig
from lorasrv.engine.admission import TokenLimits, engine_request
from lorasrv.engine.client import ProcessEngine, ThreadEngine
from lorasrv.engine.output import OutputStream
from lorasrv.engine.text import load_tokenizer
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.requests import AdapterRef, Delta, GenerationRequest
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.server.seen import SeenVersions
from lorasrv.server.server import Server, ServerConfig
from lorasrv.types import SamplingParams
from lorasrv_bench.figures import commit, cpu_name, spread
from lorasrv_bench.stream_core import DELTAS_PER_S, PacedCore, answer_token, answers_of, info_of
from lorasrv_bench.stream_load import PROMPT, Streamed, Work, serve_load

_SPAWN = multiprocessing.get_context("spawn")
BUSY = 0.9


@dataclass(frozen=True, kw_only=True)
class Setup:
    model: str
    streams: int
    tokens: int
    clients: int
    repeats: int
    seed: int
    paced: bool


@dataclass(frozen=True, kw_only=True)
class Round:
    """One way measured once: messages or events read, and CPU seconds by process."""

    wall_s: float
    tokens_per_s: float
    num_messages: int
    cpu_s: dict[str, float]


class WrongOutput(Exception):
    """A stream's tokens or text are not what the engine gave."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parents[2]
    parser.add_argument("--model", default=str(root / "adapters" / "samples" / "base"), help="its tokenizer is used")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unpaced", action="store_true", help="the engine steps as fast as it can")
    given = parser.parse_args(argv)
    setup = Setup(
        model=given.model,
        streams=given.streams,
        tokens=given.tokens,
        clients=given.clients,
        repeats=given.repeats,
        seed=given.seed,
        paced=not given.unpaced,
    )
    print(f"commit {commit()}; {platform.machine()}, {cpu_name()}, {multiprocessing.cpu_count()} cores")
    print(f"{setup}; Python {platform.python_version()}")
    print(report(setup, measure(setup)))
    return 0


def measure(setup: Setup) -> list[dict[str, Round]]:
    """By repeat, a round of each way; a repeat before them warms all up."""
    expected = Expected(setup)
    repeats: list[dict[str, Round]] = []
    with served(setup) as (address, serving), clients(setup.clients) as orders:
        for number in range(setup.repeats + 1):
            rounds = {
                "grpc": _grpc_round(setup, expected, address, serving, orders),
                "desk": _desk_round(setup, expected),
                "loop": _loop_round(setup, expected),
            }
            print(f"repeat {number}" + (" (warm-up)" if number == 0 else ""))
            print(*(f"  {name}  {_line(each)}" for name, each in rounds.items()), sep="\n", flush=True)
            repeats.append(rounds)
    return repeats[1:]


class Expected:
    """What each seed's stream has to say: told from the answers and the tokenizer alone."""

    def __init__(self, setup: Setup) -> None:
        self.seeds = [setup.seed * 1_000_003 + index for index in range(setup.streams)]
        answers, tokenizer = answers_of(setup.model), load_tokenizer(Path(setup.model))
        self.tokens = {s: tuple(answer_token(answers, s, i) for i in range(setup.tokens)) for s in self.seeds}
        self.texts = {seed: _text_behind_prompt(tokenizer, tokens) for seed, tokens in self.tokens.items()}

    def check(self, tokens: dict[int, tuple[int, ...]], texts: dict[int, str]) -> None:
        if tokens != self.tokens:
            raise WrongOutput("a stream's tokens")
        if texts != self.texts:
            raise WrongOutput("a stream's text")


def _text_behind_prompt(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    prompt = tokenizer.encode(PROMPT).ids
    return tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]


def _grpc_round(setup: Setup, expected: Expected, address: str, serving: "Pids", orders: Sequence[Any]) -> Round:
    before = serving.cpu_s()
    started_s = time.monotonic()
    for index, order in enumerate(orders):
        seeds = expected.seeds[index :: len(orders)]
        order.send(Work(address=address, seeds=seeds, max_tokens=setup.tokens))
    streamed: list[Streamed] = [order.recv() for order in orders]
    wall_s = max(each.ended_s for each in streamed) - started_s
    used = {name: after - before[name] for name, after in serving.cpu_s().items()}
    expected.check(
        {seed: tokens for each in streamed for seed, tokens in each.tokens.items()},
        {seed: text for each in streamed for seed, text in each.texts.items()},
    )
    return Round(
        wall_s=wall_s,
        tokens_per_s=setup.streams * setup.tokens / wall_s,
        num_messages=sum(each.num_messages for each in streamed),
        cpu_s=used | {"busiest client": max(each.cpu_s for each in streamed)},
    )


def _desk_round(setup: Setup, expected: Expected) -> Round:
    used_s = time.process_time()
    wall_s, events = asyncio.run(_run_desk(setup, expected.seeds))
    deltas = {seed: [each for each in of_seed if isinstance(each, Delta)] for seed, of_seed in events.items()}
    expected.check(
        {seed: tuple(token for delta in each for token in delta.token_ids) for seed, each in deltas.items()},
        {seed: "".join(delta.text for delta in each) for seed, each in deltas.items()},
    )
    return Round(
        wall_s=wall_s,
        tokens_per_s=setup.streams * setup.tokens / wall_s,
        num_messages=sum(map(len, events.values())),
        cpu_s={"all": time.process_time() - used_s},
    )


async def _run_desk(setup: Setup, seeds: Sequence[int]) -> tuple[float, dict[int, list[Any]]]:
    engine = ThreadEngine(_core(setup), info_of(setup.model))
    with ThreadPoolExecutor(4) as workers:
        desk = FrontDesk(
            engine=engine,
            limits=TokenLimits.of(await engine.start()),
            versions=NoVersions(),
            tokenizer=load_tokenizer(Path(setup.model)),
            chat_template=None,
            workers=workers,
            pinning=workers,
            seen=SeenVersions(),
        )

        async def read(seed: int) -> list[Any]:
            return [event async for event in desk.generate(_request(seed, setup.tokens))]

        started_s = time.monotonic()
        events = await asyncio.gather(*map(read, seeds))
        wall_s = time.monotonic() - started_s
        await engine.close()
    return wall_s, dict(zip(seeds, events, strict=True))


def _request(seed: int, max_tokens: int) -> GenerationRequest:
    sampling = SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(tenant="", adapters=(AdapterRef(name="base"),), prompt=PROMPT, sampling=sampling)


def _loop_round(setup: Setup, expected: Expected) -> Round:
    used_s = time.process_time()
    tokenizer = load_tokenizer(Path(setup.model))
    vocabulary, limits = Vocabulary(tokenizer), TokenLimits.of(info_of(setup.model))
    core = _core(setup)
    outputs: dict[str, OutputStream] = {}
    tokens: dict[int, list[int]] = {seed: [] for seed in expected.seeds}
    texts: dict[int, list[str]] = {seed: [] for seed in expected.seeds}
    started_s = time.monotonic()
    for seed in expected.seeds:
        asked = _request(seed, setup.tokens)
        prompt = tuple(tokenizer.encode(PROMPT).ids)
        request = engine_request(str(seed), prompt, adapter=None, sampling=asked.sampling, limits=limits)
        outputs[request.request_id] = OutputStream(vocabulary, request, asked.sampling.stop)
        core.add(request)
    while core.has_work():
        for delta in core.step():
            piece = outputs[delta.request_id].take(delta)
            tokens[int(delta.request_id)] += piece.token_ids
            texts[int(delta.request_id)].append(piece.text)
    wall_s = time.monotonic() - started_s
    expected.check({s: tuple(each) for s, each in tokens.items()}, {s: "".join(each) for s, each in texts.items()})
    return Round(
        wall_s=wall_s,
        tokens_per_s=setup.streams * setup.tokens / wall_s,
        num_messages=setup.streams * setup.tokens,
        cpu_s={"all": time.process_time() - used_s},
    )


def _core(setup: Setup) -> PacedCore:
    return PacedCore(answers_of(setup.model), DELTAS_PER_S if setup.paced else None)


class NoVersions:
    """A registry without adapters."""

    def acquire(self, tenant: str, reference: str) -> Any:
        raise AssertionError(f"{reference}: only the base is asked for")

    def unpin(self, digest: str) -> None:
        raise AssertionError(f"{digest} was never pinned")


# The server, in a process of its own.


@dataclass(frozen=True, kw_only=True)
class Pids:
    front: int
    engine: int

    def cpu_s(self) -> dict[str, float]:
        return {"front": _cpu_s_of(self.front), "engine": _cpu_s_of(self.engine)}


@contextmanager
def served(setup: Setup) -> Iterator[tuple[str, Pids]]:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(setup, theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def _serve(setup: Setup, parent: Connection) -> None:
    asyncio.run(_serve_until_told(setup, parent))


async def _serve_until_told(setup: Setup, parent: Connection) -> None:
    engines: list[ProcessEngine] = []

    def make_engine(config: EngineConfig) -> ProcessEngine:
        name = "build" if setup.paced else "build_unpaced"
        engines.append(ProcessEngine(config, factory=f"lorasrv_bench.stream_core:{name}"))
        return engines[0]

    with tempfile.TemporaryDirectory() as data_dir:
        engine = EngineConfig(model=ModelConfig(path=setup.model))
        server = Server(ServerConfig(engine=engine, data_dir=data_dir, listen="127.0.0.1:0"), make_engine)
        try:
            address = await server.start()
            pid = engines[0].pid
            assert pid is not None
            parent.send((address, Pids(front=multiprocessing.current_process().pid or 0, engine=pid)))
            await asyncio.to_thread(parent.recv)
        finally:
            await server.close()


@contextmanager
def clients(count: int) -> Iterator[Sequence[Any]]:
    pipes = [_SPAWN.Pipe() for _ in range(count)]
    processes = [_SPAWN.Process(target=serve_load, args=(theirs,)) for _, theirs in pipes]
    for process in processes:
        process.start()
    try:
        yield [ours for ours, _ in pipes]
    finally:
        for ours, _ in pipes:
            ours.send(None)
        for process in processes:
            process.join()


# What is said.


def report(setup: Setup, repeats: Sequence[dict[str, Round]]) -> str:
    """Medians, the medians of ratios within a repeat, and spreads."""
    speeds = {name: [rounds[name].tokens_per_s for rounds in repeats] for name in repeats[0]}
    lines = [f"{name}         {spread(each, '.0f')} tokens/s" for name, each in speeds.items()]
    for name in ("desk", "loop"):
        ratios = [a / b for a, b in zip(speeds["grpc"], speeds[name], strict=True)]
        lines.append(f"grpc / {name}  {spread(ratios, '.3f')} of {len(repeats)} repeats")
    through = [rounds["grpc"] for rounds in repeats]
    per_message = setup.streams * setup.tokens / statistics.median(each.num_messages for each in through)
    lines.append(f"{per_message:.1f} tokens in a message of grpc")
    busy = max(each.cpu_s["busiest client"] / each.wall_s for each in through)
    if busy > BUSY:
        lines.append(f"a client used {busy:.2f} of a core: it may be what bounds grpc; try --clients")
    return "\n".join(lines)


def _line(each: Round) -> str:
    used = ", ".join(f"{name} {seconds / each.wall_s:.2f}" for name, seconds in each.cpu_s.items())
    return f"{each.tokens_per_s:8.0f} tokens/s, {each.num_messages} messages, cores: {used}"


def _cpu_s_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / 100


if __name__ == "__main__":
    sys.exit(main())
