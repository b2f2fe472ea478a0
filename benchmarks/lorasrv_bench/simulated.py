"""The simulator against the real engine, on this machine's CPU: how far its times are from those of a real run.

    PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.simulated

First the machine is measured: how long the real engine's steps take by what they compute, and its reads and copies.
That makes a hardware table (`--out FILE` keeps it, for `lorasrv simulate --hardware FILE`). Then three small workloads
run through the real engine, in this process, and through the simulator with that table: the same requests, asked by
the same code. Printed are both sides' percentiles and their ratio.

On a machine that others use too, `--cpu-time` counts this process's CPU seconds instead: with one thread
(OMP_NUM_THREADS=1) they are what an idle machine's clock would show, but for work of other threads and processes. So
the workload whose adapters are read meanwhile is left out.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasrv.config import SchedulerConfig
from lorasrv.engine.process import spare_collections
from lorasrv.sim.clock import Clock, WallClock
from lorasrv.sim.engine import EngineSetup, SimEngine
from lorasrv.sim.hardware import Hardware, write_hardware
from lorasrv.sim.outcome import Times
from lorasrv.sim.replay import Replica, replay
from lorasrv.sim.routing import Balanced
from lorasrv.sim.work import StepWork
from lorasrv.sim.workload import Arrival, digest_of, make_request
from lorasrv.types import EngineRequest
from lorasrv_bench.calibration import ITEMSIZE, Calibration, calibrate
from lorasrv_bench.real_engine import Prepared, RealEngine, prepare, real_engine
from lorasrv_bench.workloads import Workload, parse_workload

RANKS = (8, 16, 32, 64)
LIMIT = 0.15
# Kinds of steps seen so often have a median to hold the fit against.
OFTEN = 10
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
    hardware: Hardware
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
    parser.add_argument("--repeats", type=int, default=3, help="runs of each workload through the real engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds of this process")
    parser.add_argument("--out", type=Path, help="keep the hardware table in this file")
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="a workload to run; else all")
    given = parser.parse_args(argv)
    root = Path(__file__).parents[2]
    print(f"commit {_commit(root)}; {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder), num_adapters=NUM_ADAPTERS, ranks=RANKS, model=given.model)
        clock = CpuClock if given.cpu_time else WallClock
        with real_engine(prepared, pool_bytes=LARGE_POOL, scheduler=SCHEDULER) as engine:
            found = calibrate(engine, clock, timer=time.process_time if given.cpu_time else time.perf_counter)
        print(described(found), flush=True)
        if given.out is not None:
            write_hardware(found.hardware, given.out)
        run = Run(
            prepared=prepared,
            hardware=found.hardware,
            requests=given.requests,
            repeats=given.repeats,
            seed=given.seed,
            clock=clock,
        )
        asked = [case for case in CASES if case.name in (given.case or names)]
        near = [_compare(case, run) for case in asked if not (case.is_cold and given.cpu_time)]
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
    setup = EngineSetup(
        shape=run.prepared.shape,
        hardware=run.hardware,
        itemsize=ITEMSIZE,
        pool_bytes=case.pool_bytes,
        scheduler=SCHEDULER,
    )
    workload = _workload(case, case.load * _capacity(setup, case, run.seed), run.requests, run.seed)
    simulated = run_simulated(setup, workload)
    with real_engine(run.prepared, pool_bytes=case.pool_bytes, scheduler=SCHEDULER) as engine:
        # The first run also pays for what is done once.
        real = [run_real(engine, workload, run.clock(), number) for number in range(run.repeats + 1)][1:]
    print(f"\n{case.name}: {workload.text}, pool {case.pool_bytes >> 20} MiB, {run.repeats} runs")
    worst = 0.0
    for name, value in simulated.figures.items():
        measured = [side.figures[name] for side in real]
        middle = statistics.median(measured)
        worst = max(worst, abs(value / middle - 1))
        spread = f"{middle * 1e3:.2f} ms ({min(measured) * 1e3:.2f}–{max(measured) * 1e3:.2f})"
        print(f"  {name}: real {spread}, simulated {value * 1e3:.2f}, ratio {value / middle:.3f}", flush=True)
    return worst <= LIMIT


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


def run_simulated(setup: EngineSetup, workload: Workload) -> Side:
    engine = SimEngine(setup, workload.ranks)
    replica = Replica(core=engine.core, clock=engine.clock)
    replay(workload.arrivals, [replica], Balanced(), make_request, resident=_resident(workload))
    return _side(replica)


def run_real(engine: RealEngine, workload: Workload, clock: Clock, number: int) -> Side:
    """With nothing of the runs before in the caches: each is of other tenants."""
    for digest in engine.digests:
        engine.core.discard(digest)
    # As in the engine's process.
    spare_collections()
    replica = Replica(core=engine.core, clock=clock)

    def make(index: int, arrival: Arrival) -> EngineRequest:
        request = engine.make_request(index, arrival)
        return replace(request, tenant=f"{number} {request.tenant}")

    replay(workload.arrivals, [replica], Balanced(), make)
    return _side(replica)


def _resident(workload: Workload) -> list[str]:
    return [digest_of(adapter) for adapter in workload.resident]


def _side(replica: Replica) -> Side:
    ttft = Times.of(Counter(each.first_s - each.at_s for each in replica.records if each.first_s is not None))
    itl = Times.of(replica.gaps)
    assert ttft is not None and itl is not None and all(record.done for record in replica.records), "requests failed"
    return Side(ttft=ttft, itl=itl)


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
