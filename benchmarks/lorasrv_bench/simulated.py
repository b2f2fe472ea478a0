"""The simulator against the real engine, on this machine's CPU: how far its times are from those of a real run.

    PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.simulated

Three small workloads run through real engines, in this process, and through the simulator: the same requests, asked by
the same code. Printed are both sides' percentiles and their ratio, and how far the real runs are from each other.

The simulator's hardware table is measured (`--out FILE` keeps it, for `lorasrv simulate --hardware FILE`): how long the
real engine's steps take by what they compute while it serves other workloads, and its reads and copies. A machine's
speed changes while one measures; so a workload is asked in parts, and each part simulated by what was measured just
before and behind it.

On a machine that others use too, `--cpu-time` counts this process's CPU seconds instead: with one thread
(OMP_NUM_THREADS=1) they are what an idle machine's clock would show, but for work of other threads and processes. So
the workload whose adapters are read meanwhile is left out.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasrv.config import SchedulerConfig
from lorasrv.engine.process import spare_collections
from lorasrv.sim.clock import Clock, WallClock
from lorasrv.sim.cost import CostModel
from lorasrv.sim.engine import EngineSetup, SimEngine
from lorasrv.sim.hardware import Hardware, write_hardware
from lorasrv.sim.outcome import Times
from lorasrv.sim.replay import Replica, replay
from lorasrv.sim.routing import Balanced
from lorasrv.sim.work import StepWork
from lorasrv.sim.workload import Arrival, make_request
from lorasrv.types import AdapterUse, EngineRequest
from lorasrv_bench.calibration import ITEMSIZE, Calibration, Calibrator
from lorasrv_bench.figures import commit
from lorasrv_bench.real_engine import Prepared, RealEngine, prepare, real_engine
from lorasrv_bench.workloads import Workload, parse_workload

RANKS = (8, 16, 32, 64)
LIMIT = 0.15
# Kinds of steps seen so often have a median to hold the fit against.
OFTEN = 10
PARTS = 6
SCHEDULER = SchedulerConfig(max_running=16, max_step_tokens=256)
# A pool that holds all adapters of a workload, and one that does not.
LARGE_POOL, SMALL_POOL = 512 << 20, 24 << 20
NUM_ADAPTERS = 200
_LENGTHS = "in_range=16..128,out_range=16..128"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A workload over so many adapters, at `load` of what the engine can take by the simulator."""

    name: str
    num_adapters: int
    load: float
    pool_bytes: int

    @property
    def is_cold(self) -> bool:
        """Whether adapters are read and copied all the time."""
        return self.pool_bytes == SMALL_POOL


CASES = (
    Case(name="base only", num_adapters=0, load=0.5, pool_bytes=LARGE_POOL),
    Case(name="8 adapters", num_adapters=8, load=0.5, pool_bytes=LARGE_POOL),
    Case(name="cold adapters", num_adapters=NUM_ADAPTERS, load=0.35, pool_bytes=SMALL_POOL),
)


class CpuClock:
    """This process's CPU seconds; sleeping takes none of them."""

    def __init__(self) -> None:
        self._origin_s = time.process_time()

    def __call__(self) -> float:
        return time.process_time() - self._origin_s

    def sleep_until(self, at_s: float) -> None:
        self._origin_s -= max(0.0, at_s - self())


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all comparisons have in common; `repeats` are of the real engine."""

    prepared: Prepared
    calibrator: Calibrator
    requests: int
    repeats: int
    seed: int
    clock: Callable[[], Clock]


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one side of a comparison came to."""

    ttft: Times
    itl: Times

    @property
    def figures(self) -> dict[str, float]:
        return {
            "TTFT p50": self.ttft.p50,
            "TTFT p99": self.ttft.p99,
            "ITL p50": self.itl.p50,
            "ITL p99": self.itl.p99,
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder, taken for its shape; else a small Llama")
    parser.add_argument("--requests", type=int, default=300, help="of each workload")
    parser.add_argument("--repeats", type=int, default=2, help="real engines, each with all workloads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds of this process")
    parser.add_argument("--out", type=Path, help="keep the hardware table in this file")
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="a workload to run; else all")
    given = parser.parse_args(argv)
    print(f"commit {commit()}; {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder), num_adapters=NUM_ADAPTERS, ranks=RANKS, model=given.model)
        clock = CpuClock if given.cpu_time else WallClock
        timer = time.process_time if given.cpu_time else time.perf_counter
        asked = [case for case in CASES if case.name in (given.case or names)]
        with real_engine(prepared, pool_bytes=LARGE_POOL, scheduler=SCHEDULER) as engine:
            run = Run(
                prepared=prepared,
                calibrator=Calibrator(engine, clock, timer),
                requests=given.requests,
                repeats=given.repeats,
                seed=given.seed,
                clock=clock,
            )
            near = [_compare(case, run) for case in asked if not (case.is_cold and given.cpu_time)]
            if given.out is not None:
                write_hardware(run.calibrator.found(len(asked) * (PARTS + 1)).hardware, given.out)
    print(f"{sum(near)} of {len(near)} workloads within {LIMIT:.0%}")
    return 0


def described(found: Calibration) -> str:
    hardware, steps = found.hardware, found.hardware.steps
    assert steps is not None, "a calibration is of steps"
    often = [abs(error) for each, error in zip(found.timed, found.errors, strict=True) if each.count >= OFTEN]
    terms = (
        *(f"a step of {rows} without adapters {steps.step_s(_decode(rows)) * 1e3:.2f} ms" for rows in (1, 4, 16)),
        f"reads {hardware.read_s * 1e3:.1f} ms and {hardware.disk_bytes_per_s / 1e6:.0f} MB/s",
        f"copies {hardware.copy_bytes_per_s / 1e9:.2f} GB/s",
    )
    error = f"median {statistics.median(often):.1%}, worst {max(often):.1%}" if often else "unknown"
    fit = f"{len(found.timed)} kinds of steps; error of the {len(often)} that were seen {OFTEN} times: {error}"
    return f"calibrated: {', '.join(terms)}\n{fit}"


def _decode(rows: int) -> StepWork:
    return StepWork(num_rows=rows, num_tokens=rows, context_tokens=64 * rows, pairs=64 * rows)


def _compare(case: Case, run: Run) -> bool:
    """Print both sides of a case; whether all figures are within the limit."""
    run.calibrator.measure()
    rate = case.load * _capacity(_setup(case, run, run.calibrator.found(1).hardware), case, run.seed)
    with ExitStack() as stack:
        real: list[Replica] = []
        engines = [
            stack.enter_context(real_engine(run.prepared, pool_bytes=case.pool_bytes, scheduler=SCHEDULER))
            for _ in range(run.repeats)
        ]
        for engine in engines:
            use_once(engine, case.num_adapters)
            real.append(Replica(core=engine.core, clock=run.clock()))
        # As in the engine's process.
        spare_collections()
        parts = [_workload(case, rate, run.requests // PARTS, run.seed + part) for part in range(PARTS)]
        tables: list[Hardware] = []
        for part, workload in enumerate(parts):
            for engine, replica in list(zip(engines, real, strict=True))[:: -1 if part % 2 else 1]:
                replay_part(workload, replica, engine.make_request, part)
            run.calibrator.measure()
            tables.append(run.calibrator.found(2).hardware)
    print(f"\n{case.name}: {PARTS} parts as {parts[0].text}, pool {case.pool_bytes >> 20} MiB, {run.repeats} runs")
    print(described(run.calibrator.found(PARTS + 1)))
    simulated = run_simulated([_setup(case, run, table) for table in tables], parts)
    return _told(_side(simulated), [_side(replica) for replica in real])


def _told(simulated: Side, real: Sequence[Side]) -> bool:
    worst = 0.0
    for name, value in simulated.figures.items():
        measured = [side.figures[name] for side in real]
        middle = statistics.median(measured)
        worst = max(worst, abs(value / middle - 1))
        spread = f"{middle * 1e3:.2f} ms ({min(measured) * 1e3:.2f}–{max(measured) * 1e3:.2f})"
        print(f"  {name}: real {spread}, simulated {value * 1e3:.2f}, ratio {value / middle:.3f}", flush=True)
    return worst <= LIMIT


def _setup(case: Case, run: Run, hardware: Hardware) -> EngineSetup:
    return EngineSetup(
        shape=run.prepared.shape,
        hardware=hardware,
        itemsize=ITEMSIZE,
        pool_bytes=case.pool_bytes,
        scheduler=SCHEDULER,
    )


def _workload(case: Case, rate: float, requests: int, seed: int) -> Workload:
    ranks = "/".join(map(str, RANKS))
    text = f"slora:n={case.num_adapters},rate={rate:.4g},requests={requests},{_LENGTHS},ranks={ranks}"
    return parse_workload(text, seed)


def _capacity(setup: EngineSetup, case: Case, seed: int) -> float:
    """Requests a second when all are there at the start, by the simulator."""
    workload = _workload(case, 1e5, 200, seed)
    engine = SimEngine(setup, workload.ranks)
    replay(workload.arrivals, [Replica(core=engine.core, clock=engine.clock)], Balanced(), make_request)
    return len(workload.arrivals) / engine.clock.now_s


def run_simulated(setups: Sequence[EngineSetup], parts: Sequence[Workload]) -> Replica:
    """One engine; in each part its hardware is the setup's."""
    engine = SimEngine(setups[0], parts[0].ranks)
    replica = Replica(core=engine.core, clock=engine.clock)
    for part, (setup, workload) in enumerate(zip(setups, parts, strict=True)):
        engine.device.costs = CostModel(setup.shape, setup.hardware, setup.itemsize)
        engine.reads.hardware = setup.hardware
        replay_part(workload, replica, make_request, part)
    return replica


def replay_part(workload: Workload, replica: Replica, make: Callable[[int, Arrival], EngineRequest], part: int) -> None:
    """With no prompt of an earlier part in the prefix cache: each part is of other tenants."""

    def make_own(index: int, arrival: Arrival) -> EngineRequest:
        request = make(index, arrival)
        return replace(request, tenant=f"{part} {request.tenant}")

    replay(workload.arrivals, [replica], Balanced(), make_own)


def use_once(engine: RealEngine, num_adapters: int) -> None:
    """Do what is done once: start builders, and use memory for the first time. No adapter is in memory behind it."""
    core = engine.core
    for digest in (None, *engine.digests[:num_adapters]):
        adapter = None if digest is None else AdapterUse(digest=digest)
        core.add(EngineRequest(request_id="once", token_ids=(3,) * 32, adapter=adapter, max_tokens=2, seed=0))
        while core.has_work():
            core.step()
    for digest in engine.digests:
        core.discard(digest)


def _side(replica: Replica) -> Side:
    ttft = Times.of(Counter(each.first_s - each.at_s for each in replica.records if each.first_s is not None))
    itl = Times.of(replica.gaps)
    assert ttft is not None and itl is not None and all(record.done for record in replica.records), "requests failed"
    return Side(ttft=ttft, itl=itl)


if __name__ == "__main__":
    sys.exit(main())
