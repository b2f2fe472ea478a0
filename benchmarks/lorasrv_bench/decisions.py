"""What the engine's own work costs a step: decide, submit and apply on a device that computes nothing.

A closed loop of requests over many adapters through a pool too small for them all, so that every few steps there are
admissions, loads, evictions and preemptions. `python -m lorasrv_bench.decisions` prints percentiles, of the thread's
CPU time, for growing sizes, and with `--plot FILE.svg` draws them: of all of `EngineCore.step`, and of deciding and
applying alone. What the former has beside is submitting: pages change hands, and each row is described to the runner.
"""

import argparse
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorasrv.config import SchedulerConfig
from lorasrv.engine.batch import ChunkInput, Draw, PageCopy, StepOutput
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.engine.process import spare_collections
from lorasrv.engine.tiers import TierChanges
from lorasrv.errors import LorasrvError
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.types import AdapterUse, EngineRequest, Tier
from lorasrv_bench.figures import commit, cpu_name
from lorasrv_bench.plots import Curve, chart

BLOCK_TOKENS = 16
MIN_TOKENS = 8
# As in the default configuration: more prefill in a step would hold up those that decode.
STEP_TOKENS_PER_PLACE = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """`num_running` and `num_waiting` requests at all times, over so many adapters."""

    num_running: int = 256
    num_waiting: int = 2000
    num_adapters: int = 1000
    num_tenants: int = 8
    adapter_pages: int = 8
    max_prompt: int = 256
    max_output: int = 256

    @property
    def num_pages(self) -> int:
        """Blocks for what the running ones hold on the average: while many are long, some are preempted."""
        mean_tokens = (MIN_TOKENS + self.max_prompt) // 2 + (MIN_TOKENS + self.max_output) // 4
        blocks = -(-mean_tokens // BLOCK_TOKENS)
        return self.num_running * blocks + min(self.num_adapters, self.num_running) * self.adapter_pages


class NullRunner:
    """Steps take no time and draw token 1."""

    runs_ahead = False

    def forward(self, chunks: tuple[ChunkInput, ...], copies: tuple[PageCopy, ...] = ()) -> "NullStep":
        return NullStep()


class NullStep:
    def draw(self, draws: tuple[Draw, ...]) -> None:
        self._tokens = (1,) * len(draws)

    def output(self) -> StepOutput:
        return StepOutput(tokens=self._tokens)


@dataclass
class HostTiers:
    """All adapters are in host memory; a copy ends with the next poll."""

    adapter_pages: int
    loaded: list[str] = field(default_factory=list[str])

    def want(self, digests: Sequence[str]) -> None: ...

    def num_pages(self, digest: str) -> int | None:
        return self.adapter_pages

    def poll(self) -> TierChanges:
        loaded, self.loaded = tuple(self.loaded), []
        return TierChanges(failed={}, read=(), loaded=loaded)

    def load(self, digest: str, pages: list[int], *, wait_for_steps: bool) -> ResidentAdapter:
        self.loaded.append(digest)
        return ResidentAdapter(digest=digest, pages=tuple(pages), directory=pages[0], max_rank=16)

    def bytes_at_once(self) -> int:
        return 0

    def discard(self, digest: str) -> None: ...

    def failures(self) -> dict[str, LorasrvError]:
        return {}

    def host_tiers(self) -> dict[str, Tier]:
        return {}

    def wait(self, timeout_s: float) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Processor seconds a step, and of them those of deciding and applying; what happened in those steps."""

    step_s: list[float]
    decide_apply_s: list[float]
    admissions: int
    loads: int
    evictions: int
    preemptions: int


def quantile(seconds: Sequence[float], share: float) -> float:
    return sorted(seconds)[int(share * (len(seconds) - 1))]


@dataclass
class Stopwatch:
    """Adds up what the calls that it is put around take."""

    seconds: float = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.thread_time()
            result = call(*arguments)
            self.seconds += time.thread_time() - begin
            return result

        return timed

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure(load: Load, num_steps: int, seed: int) -> Measured:
    """Percentiles are of steps behind a warm-up in which the batch fills."""
    rng = random.Random(seed)
    core = EngineCore(
        config=SchedulerConfig(
            max_step_tokens=STEP_TOKENS_PER_PLACE * load.num_running,
            max_running=load.num_running,
            max_waiting=load.num_waiting + load.num_running,
        ),
        limits=Limits(
            num_pages=load.num_pages,
            page_bytes=1 << 20,
            block_tokens=BLOCK_TOKENS,
            context_tokens=1 << 15,
            vocab_size=1000,
            eos_token_ids=frozenset((0,)),
        ),
        runner=NullRunner(),
        tiers=HostTiers(load.adapter_pages),
    )
    watch = Stopwatch()
    scheduler = SimpleNamespace(decide=watch.around(core._scheduler.decide))
    core.__dict__.update(_scheduler=scheduler, _apply=watch.around(core._apply))
    number, open_requests = 0, 0
    owed: dict[str, int] = {}
    given: Counter[str] = Counter()
    step_s: list[float] = []
    decide_apply_s: list[float] = []
    before = core.status().counters
    warm_up = load.max_output
    spare_collections()
    for step in range(warm_up + num_steps):
        while open_requests < load.num_running + load.num_waiting:
            request = _request(load, number, rng)
            core.add(request)
            owed[request.request_id] = request.max_tokens
            number, open_requests = number + 1, open_requests + 1
        begin = time.thread_time()
        deltas = core.step()
        step_s.append(time.thread_time() - begin)
        decide_apply_s.append(watch.read())
        for delta in deltas:
            given[delta.request_id] += len(delta.token_ids)
            if delta.finish is not None:
                open_requests -= 1
                assert given.pop(delta.request_id) == owed.pop(delta.request_id), "a request got too few tokens"
        if step == warm_up:
            before = core.status().counters
            step_s.clear()
            decide_apply_s.clear()
    core.check()
    after = core.status().counters
    return Measured(
        step_s=step_s,
        decide_apply_s=decide_apply_s,
        admissions=number - load.num_waiting - load.num_running,
        loads=after.adapter_loads - before.adapter_loads,
        evictions=after.adapter_evictions - before.adapter_evictions,
        preemptions=after.preemptions - before.preemptions,
    )


def _request(load: Load, number: int, rng: random.Random) -> EngineRequest:
    return EngineRequest(
        request_id=str(number),
        token_ids=tuple(rng.randrange(1000) for _ in range(rng.randint(MIN_TOKENS, load.max_prompt))),
        adapter=AdapterUse(digest=str(rng.randrange(load.num_adapters))),
        max_tokens=rng.randint(MIN_TOKENS, load.max_output),
        seed=number,
        temperature=0.0,
        tenant=str(number % load.num_tenants),
    )


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One number of the load grows, the others stay."""

    name: str
    target: int
    loads: tuple[Load, ...]

    def curves(self, found: Mapping[Load, Measured]) -> tuple[Curve, Curve]:
        """99th percentiles of all of a step, and of deciding and applying, in milliseconds over the number, 1 being the
        target's."""
        name, sizes = self.name.removeprefix("num_"), [getattr(load, self.name) / self.target for load in self.loads]
        whole = [1e3 * quantile(found[load].step_s, 0.99) for load in self.loads]
        part = [1e3 * quantile(found[load].decide_apply_s, 0.99) for load in self.loads]
        return (
            Curve(name=f"{name}: all", points=tuple(zip(sizes, whole, strict=True))),
            Curve(name=f"{name}: decide, apply", points=tuple(zip(sizes, part, strict=True))),
        )


GROWTHS = (
    Growth(name="num_running", target=256, loads=tuple(Load(num_running=n) for n in (32, 64, 128, 256, 384, 512))),
    Growth(name="num_waiting", target=2000, loads=tuple(Load(num_waiting=n) for n in (250, 1000, 2000, 4000))),
    Growth(name="num_adapters", target=1000, loads=tuple(Load(num_adapters=n) for n in (250, 500, 1000, 2000))),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lorasrv_bench.decisions", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw the growth, as SVG")
    arguments = parser.parse_args()
    print(f"commit {commit()}; {platform.machine()}, {cpu_name()}; Python {platform.python_version()}")
    print(f"seed {arguments.seed}, {arguments.steps} steps behind a warm-up; milliseconds of CPU time a step")
    print("                         | all of a step        | decide and apply     |")
    print(
        "running waiting adapters |   p50    p99    max  |   p50    p99    max  | admitted loads evictions preemptions"
    )
    found: dict[Load, Measured] = {}
    for load in dict.fromkeys(load for growth in GROWTHS for load in growth.loads):
        each = found[load] = measure(load, arguments.steps, arguments.seed)
        times = [
            " ".join(f"{1e3 * quantile(seconds, share):6.3f}" for share in (0.5, 0.99, 1.0))
            for seconds in (each.step_s, each.decide_apply_s)
        ]
        print(
            f"{load.num_running:7d} {load.num_waiting:7d} {load.num_adapters:8d} | {times[0]} | {times[1]} | "
            f"{each.admissions:8d} {each.loads:5d} {each.evictions:9d} {each.preemptions:11d}",
            flush=True,
        )
    if arguments.plot is not None:
        curves = [curve for growth in GROWTHS for curve in growth.curves(found)]
        title = "256 running, 2,000 waiting, 1,000 adapters, and one of these grown: p99 of a step's own work"
        arguments.plot.write_text(chart(title, curves, x="times that number", y="ms") + "\n")


if __name__ == "__main__":
    main()
