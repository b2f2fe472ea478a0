"""A hardware table of this machine, from what the real engine takes: its steps while it serves, its reads and copies.

Steps are those of workloads at several loads, without adapters and with few and many of them. The table's terms are
fitted to the medians of their kinds, each kind's error counting by its share. The table is good for the model that it
was measured on.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lorasrv.sim.clock import Clock
from lorasrv.sim.hardware import Hardware
from lorasrv.sim.measured import MeasuredSteps, terms
from lorasrv.sim.replay import Replica, replay
from lorasrv.sim.routing import Balanced
from lorasrv.sim.work import StepWork
from lorasrv.sim.workload import Arrival
from lorasrv.types import AdapterUse, EngineRequest, Tier, Warm
from lorasrv_bench.real_engine import RealEngine
from lorasrv_bench.step_records import StepRecorder, Timed, kinds
from lorasrv_bench.workloads import Workload, parse_workload

ITEMSIZE = 4
_UNBOUNDED = 1e18
_TRIALS = 12
# A kind of step of which there are more counts as one with so many.
_MANY = 30
_SECTIONS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
# Of the workloads: adapters, requests of each, lengths, and loads, as shares of what the engine takes at once.
_ADAPTERS, _REQUESTS, _LENGTHS, _LOADS = (0, 8, 48), 40, "in_range=8..160,out_range=8..96", (0.2, 0.4, 0.6)
_SEED = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`errors` are the fit's, as shares of the measured times."""

    hardware: Hardware
    timed: tuple[Timed, ...]
    errors: tuple[float, ...]


def calibrate(engine: RealEngine, clock: Callable[[], Clock], timer: Callable[[], float]) -> Calibration:
    """Measure `engine`, which has 48 adapters or more, none in memory, and no work, in the seconds of `timer`."""
    prober = _Prober(engine)
    read_s, disk_bytes_per_s, copy_bytes_per_s = prober.transfers()
    timed = tuple(kinds(_served_steps(engine, prober, clock, timer)))
    steps = fit(engine.shape.linear_params, timed)
    hardware = Hardware(
        name="calibrated",
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        read_bytes_per_s=_UNBOUNDED,
        adapter_bytes_per_s=_UNBOUNDED,
        kv_bytes_per_s=_UNBOUNDED,
        flops_per_s=_UNBOUNDED,
        copy_bytes_per_s=copy_bytes_per_s,
        disk_bytes_per_s=disk_bytes_per_s,
        read_s=read_s,
        runs_ahead=False,
        steps=steps,
    )
    errors = tuple(steps.step_s(each.work) / each.seconds - 1 for each in timed)
    return Calibration(hardware=hardware, timed=timed, errors=errors)


def fit(linear_params: int, timed: Sequence[Timed]) -> MeasuredSteps:
    """The terms, of a model of `linear_params`, whose steps come nearest to the measured ones."""
    weights = np.array([min(each.count, _MANY) ** 0.5 for each in timed])
    seconds = np.array([each.seconds for each in timed])
    found = np.array([terms(each.work, _SECTIONS) for each in timed])
    return MeasuredSteps(
        linear_params=linear_params,
        tokens=_SECTIONS,
        seconds=tuple(_not_negative(found * (weights / seconds)[:, None], weights)),
    )


def _not_negative(
    rows: NDArray[np.float64],  # [kinds, terms]
    wanted: NDArray[np.float64],  # [kinds]
) -> list[float]:
    """Coefficients of least squares, terms that would be negative left out, the most negative first; those that no row
    has are zero."""
    kept = [column for column in range(rows.shape[1]) if rows[:, column].any()]
    while True:
        scale = rows[:, kept].max(axis=0)
        found = np.linalg.lstsq(rows[:, kept] / scale, wanted, rcond=None)[0]
        if not kept or found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    coefficients = [0.0] * rows.shape[1]
    for column, value in zip(kept, (found / scale).tolist(), strict=True):
        coefficients[column] = value
    return coefficients


def _served_steps(
    engine: RealEngine, prober: "_Prober", clock: Callable[[], Clock], timer: Callable[[], float]
) -> Iterator[tuple[StepWork, float]]:
    """Of all workloads, and of one more of each, whose requests come at once: what it takes tells the load."""
    runner = engine.core._runner
    for num_adapters in _ADAPTERS:
        for digest in engine.digests[:num_adapters]:
            prober.warm(digest, Tier.DEVICE)
        capacity = 0.0
        for number, load in enumerate((None, *_LOADS)):
            rate = 1e5 if load is None else load * capacity
            workload = parse_workload(
                f"slora:n={num_adapters},rate={rate:.4g},requests={_REQUESTS},{_LENGTHS}", _SEED + number
            )
            recorder = StepRecorder(runner, clock(), timer, engine.shape)
            engine.core._runner = recorder
            _serve(engine, workload, recorder, f"{num_adapters} {number}")
            engine.core._runner = runner
            if load is None:
                capacity = _REQUESTS / recorder()
            yield from recorder.steps


def _serve(engine: RealEngine, workload: Workload, clock: Clock, tenant: str) -> None:
    def make(index: int, arrival: Arrival) -> EngineRequest:
        return replace(engine.make_request(index, arrival), tenant=f"{tenant} {arrival.tenant}")

    replay(workload.arrivals, [Replica(core=engine.core, clock=clock)], Balanced(), make)


class _Prober:
    """Asks a real engine for adapters, one after the other."""

    def __init__(self, engine: RealEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    def transfers(self) -> tuple[float, float, float]:
        """(seconds to open an adapter, bytes read per second, bytes copied per second), from two sizes of adapters.

        Reads as they are made in service: beside a sequence that decodes.
        """
        engine = self._engine
        small, large = (engine.ranks.index(rank) for rank in (min(engine.ranks), max(engine.ranks)))
        sizes = [ITEMSIZE * engine.shape.adapter_params(engine.ranks[place]) for place in (small, large)]
        places = [place + len(engine.ranks) * trial for trial in range(_TRIALS) for place in (small, large)]
        digests = [engine.digests[place] for place in places]
        beside = self._ask(None, 32, 3000)
        # What is done once is none of a read's time: a builder's start, memory that is used for the first time.
        self._again(digests, self._read)
        reads = self._again(digests, self._read)
        engine.core.cancel(beside)
        copies = self._again(digests, self._copy)
        read_small, read_large = statistics.median(reads[0::2]), statistics.median(reads[1::2])
        copy_small, copy_large = statistics.median(copies[0::2]), statistics.median(copies[1::2])
        step = sizes[1] - sizes[0]
        bytes_per_s = step / (read_large - read_small) if read_large > read_small else _UNBOUNDED
        copied_per_s = step / (copy_large - copy_small) if copy_large > copy_small else _UNBOUNDED
        return max(0.0, read_small - sizes[0] / bytes_per_s), bytes_per_s, copied_per_s

    def warm(self, digest: str, tier: Tier) -> float:
        """Seconds until an adapter is there."""
        core = self._engine.core
        begin = time.perf_counter()
        core.warm(Warm(warm_id=next(self._numbers), digest=digest, tier=tier, deadline_s=time.monotonic() + 60))
        while core.has_work():
            core.step()
        seconds = time.perf_counter() - begin
        (warmed,) = core.take_warmed()
        assert warmed.failure is None, warmed
        return seconds

    def _again(self, digests: Sequence[str], ask: Callable[[str], float]) -> list[float]:
        """What `ask` says of each, which is gone from memory behind that."""
        found = [ask(digest) for digest in digests]
        for digest in digests:
            self._engine.core.discard(digest)
        return found

    def _read(self, digest: str) -> float:
        """Seconds from disk to host memory, asked for by a request. A step looks for it when it begins: it came half a
        step before that, on the mean."""
        core = self._engine.core
        begin = before = time.perf_counter()
        request_id, seconds, is_open = self._ask(digest, 1, 1), None, True
        while is_open:
            now = time.perf_counter()
            is_open = not any(delta.request_id == request_id and delta.finish for delta in core.step())
            if seconds is None and core.tier_of(digest) is not Tier.DISK:
                seconds = (before + now) / 2 - begin
            before = now
        assert seconds is not None, "an adapter was served from disk"
        return seconds

    def _copy(self, digest: str) -> float:
        """Seconds from host memory to the device."""
        self.warm(digest, Tier.HOST)
        return self.warm(digest, Tier.DEVICE)

    def _ask(self, digest: str | None, prompt: int, output: int) -> str:
        engine, number = self._engine, next(self._numbers)
        # All prompts differ from the first token on.
        token_ids = tuple(
            (number * 31 + 17 * position) % (engine.info.vocab_size - 3) + 3 for position in range(prompt)
        )
        request = EngineRequest(
            request_id=f"probe {number}",
            token_ids=token_ids,
            adapter=None if digest is None else AdapterUse(digest=digest),
            max_tokens=output,
            seed=0,
            temperature=0.0,
            ignore_eos=True,
            tenant=str(number),
        )
        engine.core.add(request)
        return request.request_id
