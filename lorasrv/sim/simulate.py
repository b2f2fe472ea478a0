"""The simulator's two questions: what becomes of a workload on so many engines, and how many engines it takes."""

from collections.abc import Callable
from dataclasses import dataclass

from lorasrv.sim.engine import EngineSetup, SimEngine
from lorasrv.sim.outcome import Outcome, Traffic, summarize
from lorasrv.sim.replay import Replica, replay
from lorasrv.sim.routing import ROUTERS
from lorasrv.sim.slo import Slo
from lorasrv.sim.workload import Workload, digest_of, make_request

_NUM_SAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A number of engines that was tried; the outcome is None where the run was stopped, the SLO being lost."""

    num_engines: int
    outcome: Outcome | None

    @property
    def keeps_slo(self) -> bool:
        return self.outcome is not None and self.outcome.keeps_slo


def simulate(
    setup: EngineSetup,
    workload: Workload,
    num_engines: int,
    *,
    routing: str,
    slo: Slo,
    progress: Callable[[float], None] = lambda share: None,
) -> Outcome:
    """Run all of it. Raises ConfigurationError."""
    outcome = _run(setup, workload, num_engines, routing, slo, progress, stop=False)
    assert outcome is not None
    return outcome


def fewest_engines(
    setup: EngineSetup,
    workload: Workload,
    *,
    routing: str,
    slo: Slo,
    most: int,
    tell: Callable[[Trial], None] = lambda trial: None,
    progress: Callable[[float], None] = lambda share: None,
) -> Outcome | None:
    """The outcome on the smallest number of engines that keeps the SLO; None if `most` do not.

    A number is tried by running all of the workload, or as much as it takes to lose; what one number keeps, larger
    ones are taken to keep. Raises ConfigurationError.
    """

    def attempt(num_engines: int) -> Trial:
        outcome = _run(setup, workload, num_engines, routing, slo, progress, stop=True)
        trial = Trial(num_engines=num_engines, outcome=outcome)
        tell(trial)
        return trial

    low, best = 0, attempt(1)
    while not best.keeps_slo:
        low = best.num_engines
        if low == most:
            return None
        best = attempt(min(2 * low, most))
    while best.num_engines - low > 1:
        middle = attempt((low + best.num_engines) // 2)
        if middle.keeps_slo:
            best = middle
        else:
            low = middle.num_engines
    return best.outcome


def _run(
    setup: EngineSetup,
    workload: Workload,
    num_engines: int,
    routing: str,
    slo: Slo,
    progress: Callable[[float], None],
    *,
    stop: bool,
) -> Outcome | None:
    engines = [SimEngine(setup, workload.ranks) for _ in range(num_engines)]
    sample_every_s = workload.arrivals[-1].at_s / _NUM_SAMPLES
    replicas = [Replica(core=each.core, clock=each.clock, slo=slo, sample_every_s=sample_every_s) for each in engines]
    whole = replay(
        workload.arrivals,
        replicas,
        ROUTERS[routing](),
        make_request,
        resident=[digest_of(adapter) for adapter in workload.resident],
        slo=slo if stop else None,
        progress=progress,
    )
    return summarize(replicas, slo, _traffic(engines)) if whole else None


def _traffic(engines: list[SimEngine]) -> Traffic:
    counters = [engine.core.status().counters for engine in engines]
    elapsed_s = max(engine.clock.now_s for engine in engines)
    return Traffic(
        steps=sum(each.steps for each in counters),
        prompt_tokens=sum(each.prompt_tokens for each in counters),
        cached_prompt_tokens=sum(each.cached_prompt_tokens for each in counters),
        adapter_loads=sum(each.adapter_loads for each in counters),
        adapter_evictions=sum(each.adapter_evictions for each in counters),
        preemptions=sum(each.preemptions for each in counters),
        disk_bytes=sum(engine.reads.read_bytes for engine in engines),
        copied_bytes=sum(engine.device.copied_bytes for engine in engines),
        device_busy=sum(engine.device.busy_s for engine in engines) / (elapsed_s * len(engines)),
    )
