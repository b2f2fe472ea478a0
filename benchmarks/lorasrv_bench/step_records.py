"""What a real engine's steps take while it serves, and what they compute."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorasrv.engine.batch import ChunkInput, PageCopy, Runner, RunningStep
from lorasrv.model.shape import ModelShape
from lorasrv.sim.clock import Clock
from lorasrv.sim.work import StepWork, step_work

# Prompts' tokens of steps that count as one kind are at most so many apart.
_ALIKE_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A kind of step, the median of its times, and how many there were."""

    work: StepWork
    seconds: float
    count: int = 1


class StepRecorder:
    """In place of an engine's runner and its replay's clock, which it hands all to: keeps each step's time, from its
    forward to the next step's, and so what the host does between. Not of steps behind which the engine had no work.
    """

    def __init__(self, runner: Runner, clock: Clock, timer: Callable[[], float], shape: ModelShape) -> None:
        self._runner = runner
        self._clock = clock
        self._timer = timer
        self._shape = shape
        self._last: tuple[StepWork, float] | None = None
        self.steps: list[tuple[StepWork, float]] = []

    @property
    def runs_ahead(self) -> bool:
        return self._runner.runs_ahead

    def forward(self, chunks: tuple[ChunkInput, ...], copies: tuple[PageCopy, ...] = ()) -> RunningStep:
        now_s = self._timer()
        if self._last is not None:
            work, began_s = self._last
            self.steps.append((work, now_s - began_s))
        adapters = [chunk.adapter for chunk in chunks if chunk.adapter is not None]
        params = {each.directory: self._shape.adapter_params(each.max_rank) for each in adapters}
        self._last = step_work(chunks, params), now_s
        return self._runner.forward(chunks, copies)

    def __call__(self) -> float:
        return self._clock()

    def sleep_until(self, at_s: float) -> None:
        if at_s > self._clock():
            self._last = None
        self._clock.sleep_until(at_s)


def kinds(steps: Sequence[tuple[StepWork, float]]) -> list[Timed]:
    """Steps of as many sequences and adapters, and about as many prompts' tokens, together: their work on the mean."""
    found: dict[tuple[int, int, int], list[tuple[StepWork, float]]] = defaultdict(list)
    for work, seconds in steps:
        num_more = work.num_tokens - work.num_rows
        found[work.num_rows, -(-num_more // _ALIKE_TOKENS), work.num_adapters].append((work, seconds))
    return [
        Timed(
            work=_mean([work for work, _ in alike]),
            seconds=statistics.median(seconds for _, seconds in alike),
            count=len(alike),
        )
        for alike in found.values()
    ]


def _mean(works: Sequence[StepWork]) -> StepWork:
    def mean(values: Sequence[int]) -> int:
        return round(statistics.fmean(values))

    return StepWork(
        num_rows=works[0].num_rows,
        num_tokens=mean([work.num_tokens for work in works]),
        context_tokens=mean([work.context_tokens for work in works]),
        pairs=mean([work.pairs for work in works]),
        num_adapters=works[0].num_adapters,
        adapter_params=mean([work.adapter_params for work in works]),
        adapter_products=mean([work.adapter_products for work in works]),
    )
