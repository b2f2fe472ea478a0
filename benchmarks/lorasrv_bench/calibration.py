"""A hardware table of this machine, from what the real engine takes: its steps while it serves, its reads and copies.

Steps are those of workloads at several loads, without adapters and with few and many of them. The table's terms are
fitted to the medians of their kinds, each kind's error counting by its share. The table is good for the model that it
was measured on, and for the time: a virtual machine's speed changes by tens of percent within seconds, so who compares
measures again and again meanwhile.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

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
from lorasrv_bench.workloads import parse_workload

ITEMSIZE = 4
_UNBOUNDED = 1e18
_TRIALS, _STEPS_BETWEEN = 4, 30
# A kind of step of which there are more counts as one with so many.
_MANY = 30
_SECTIONS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
# Of the workloads: adapters, requests of each, lengths, and loads, as shares of what the engine takes at once.
_ADAPTERS, _REQUESTS, _LENGTHS, _LOADS = (0, 8, 48), 16, "in_range=8..160,out_range=8..96", (0.25, 0.5, 0.75)
_SEED = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`errors` are the fit's, as shares of the measured times."""

    hardware: Hardware
    timed: tuple[Timed, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Seconds of a small adapter and of a large one, from disk to host memory and from there to the device."""

    reads: tuple[float, float]
    copies: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    transfers: Transfers
    steps: list[tuple[StepWork, float]] = field(default_factory=list[tuple[StepWork, float]])


class Calibrator:
    """Measures `engine`, which has 48 adapters or more, none in memory, and no work, in the seconds of `timer`."""

    def __init__(self, engine: RealEngine, clock: Callable[[], Clock], timer: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        self._timer = timer
        self._prober = _Prober(engine)
        self._num_workloads = 0
        self._capacities: dict[int, float] = {}
        self._measured: list[_Measured] = []
        # What is done once is none of a read's time: a builder's start, memory that is used for the first time.
        self._prober.transfers()

    def measure(self) -> None:
        """Some seconds of all kinds of work."""
        self._measured.append(_Measured(transfers=self._prober.transfers()))
        for num_adapters in _ADAPTERS:
            for digest in self._engine.digests[:num_adapters]:
                self._prober.warm(digest, Tier.DEVICE)
            if num_adapters not in self._capacities:
                self._capacities[num_adapters] = _REQUESTS / self._serve(num_adapters, 1e5)
            for load in _LOADS:
                self._serve(num_adapters, load * self._capacities[num_adapters])

    def found(self, last: int) -> Calibration:
        """By so many of the last measurements."""
        measured = self._measured[-last:]
        timed = tuple(kinds([step for each in measured for step in each.steps]))
        steps = fit(self._engine.shape.linear_params, timed)
        hardware = Hardware(
            name="calibrated",
            memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
            read_bytes_per_s=_UNBOUNDED,
            adapter_bytes_per_s=_UNBOUNDED,
            kv_bytes_per_s=_UNBOUNDED,
            flops_per_s=_UNBOUNDED,
            runs_ahead=False,
            steps=steps,
            **self._rates([each.transfers for each in measured]),
        )
        errors = tuple(steps.step_s(each.work) / each.seconds - 1 for each in timed)
        return Calibration(hardware=hardware, timed=timed, errors=errors)

    def _serve(self, num_adapters: int, rate: float) -> float:
        """A workload that no other is like; what it took."""
        engine, number = self._engine, self._num_workloads
        self._num_workloads += 1
        text = f"slora:n={num_adapters},rate={rate:.4g},requests={_REQUESTS},{_LENGTHS}"
        workload = parse_workload(text, _SEED + number)

        def make(index: int, arrival: Arrival) -> EngineRequest:
            return replace(engine.make_request(index, arrival), tenant=f"workload {number} {arrival.tenant}")

        runner = engine.core._runner
        recorder = StepRecorder(runner, self._clock(), self._timer, engine.shape)
        engine.core._runner = recorder
        begin_s = recorder()
        replay(workload.arrivals, [Replica(core=engine.core, clock=recorder)], Balanced(), make)
        engine.core._runner = runner
        self._measured[-1].steps.extend(recorder.steps)
        return recorder() - begin_s

    def _rates(self, transfers: Sequence[Transfers]) -> dict[str, float]:
        """Of reads and copies, from two sizes of adapters."""
        ranks = (min(self._engine.ranks), max(self._engine.ranks))
        small, large = (ITEMSIZE * self._engine.shape.adapter_params(rank) for rank in ranks)
        reads = [statistics.median(each.reads[size] for each in transfers) for size in (0, 1)]
        copies = [statistics.median(each.copies[size] for each in transfers) for size in (0, 1)]
        read = (large - small) / (reads[1] - reads[0]) if reads[1] > reads[0] else _UNBOUNDED
        copied = (large - small) / (copies[1] - copies[0]) if copies[1] > copies[0] else _UNBOUNDED
        return {
            "read_s": max(0.0, reads[0] - small / read),
            "disk_bytes_per_s": read,
            "copy_bytes_per_s": copied,
        }


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


class _Prober:
    """Asks a real engine for adapters, one after the other."""

    def __init__(self, engine: RealEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._trials = itertools.count()

    def transfers(self) -> "Transfers":
        """Reads as they are made in service: beside a sequence that decodes, each of another adapter, some time behind
        the one before: builders have been idle."""
        engine = self._engine
        small, large = (engine.ranks.index(rank) for rank in (min(engine.ranks), max(engine.ranks)))
        trials = [next(self._trials) for _ in range(_TRIALS)]
        places = [place + len(engine.ranks) * trial for trial in trials for place in (small, large)]
        digests = [engine.digests[place % len(engine.digests)] for place in places]
        beside = self._ask(None, 32, 1000)
        reads = self._again(digests, self._read)
        engine.core.cancel(beside)
        copies = self._again(digests, self._copy)
        return Transfers(
            reads=(statistics.median(reads[0::2]), statistics.median(reads[1::2])),
            copies=(statistics.median(copies[0::2]), statistics.median(copies[1::2])),
        )

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
        """What `ask` says of each; none is in memory before, nor behind."""
        for digest in digests:
            self._engine.core.discard(digest)
        found = [ask(digest) for digest in digests]
        for digest in digests:
            self._engine.core.discard(digest)
        return found

    def _read(self, digest: str) -> float:
        """Seconds from disk to host memory, asked for by a request. A step looks for it when it begins: it came half a
        step before that, on the mean."""
        core = self._engine.core
        for _ in range(_STEPS_BETWEEN):
            core.step()
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
