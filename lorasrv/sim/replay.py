"""A workload through engine cores: when each request was asked, when its tokens came.

The same code drives simulated cores on their virtual clocks and a real one on the wall clock.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorasrv.engine.core import EngineCore
from lorasrv.errors import LorasrvError
from lorasrv.sim.clock import Clock
from lorasrv.sim.routing import Router
from lorasrv.sim.slo import SHARE, Slo
from lorasrv.sim.workload import Arrival
from lorasrv.types import EngineRequest, PoolStats, Tier, TokenDelta, Warm


@dataclass(kw_only=True, slots=True)
class Record:
    """What became of a request, asked at `at_s` when its adapter was in `tier`, None for the base.

    `first_s` is None until its first token came; `refused` is the reason of an error that ended it.
    """

    arrival: Arrival
    at_s: float
    tier: Tier | None
    first_s: float | None = None
    last_s: float = 0.0
    done: bool = False
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class PoolSample:
    """An engine at a moment."""

    at_s: float
    pool: PoolStats
    running: int
    waiting: int


@dataclass(kw_only=True)
class Replica:
    """One engine core and what has been seen of it: `gaps` counts the times between two tokens of a request, `late` the
    first tokens behind `slo`. Owned by one thread."""

    core: EngineCore
    clock: Clock
    slo: Slo = field(default_factory=Slo)
    sample_every_s: float = math.inf
    records: list[Record] = field(default_factory=list[Record])
    running: dict[str, Record] = field(default_factory=dict[str, Record])
    gaps: Counter[float] = field(default_factory=Counter[float])
    late: int = 0
    samples: list[PoolSample] = field(default_factory=list[PoolSample])
    _sample_at_s: float = -math.inf

    def add(self, request: EngineRequest, arrival: Arrival, at_s: float) -> None:
        tier = None if request.adapter is None else self.core.tier_of(request.adapter.digest)
        record = Record(arrival=arrival, at_s=at_s, tier=tier)
        self.records.append(record)
        try:
            self.core.add(request)
        except LorasrvError as error:
            record.refused = error.reason
            self.late += 1
        else:
            self.running[request.request_id] = record

    def run_until(self, at_s: float) -> None:
        """Step until the time is `at_s`, or past it by the step that had begun; without work, sleep."""
        core, clock = self.core, self.clock
        while core.has_work() and clock() < at_s:
            self._take(core.step(), clock())
        if at_s < math.inf:
            clock.sleep_until(at_s)

    def warm_up(self, digest: str) -> None:
        """Bring an adapter to the device."""
        self.core.warm(Warm(warm_id=0, digest=digest, tier=Tier.DEVICE, deadline_s=math.inf))
        while self.core.has_work():
            self.core.step()
        self.core.take_warmed()

    def slow_gaps(self) -> int:
        """Times between tokens beyond `slo`."""
        return sum(count for gap, count in self.gaps.items() if gap > self.slo.itl_s)

    def _take(self, deltas: Sequence[TokenDelta], now_s: float) -> None:
        """Called for every step, with a delta of every sequence in it."""
        running = self.running
        before: list[float] = []
        for delta in deltas:
            if not delta.token_ids:
                self._take_failure(delta)
                continue
            record = running[delta.request_id]
            if record.first_s is None:
                record.first_s = now_s
                self.late += now_s - record.at_s > self.slo.ttft_s
            else:
                before.append(record.last_s)
            record.last_s = now_s
            if delta.finish is not None:
                record.done = True
                del running[delta.request_id]
        # Most have their last token from the same step.
        for last_s, count in Counter(before).items():
            self.gaps[now_s - last_s] += count
        if now_s >= self._sample_at_s:
            self._sample(now_s)

    def _take_failure(self, delta: TokenDelta) -> None:
        """Or a place in the queue."""
        if delta.failure is not None:
            self.running.pop(delta.request_id).refused = delta.failure.reason
            self.late += 1

    def _sample(self, now_s: float) -> None:
        self._sample_at_s = now_s + self.sample_every_s
        core = self.core
        self.samples.append(PoolSample(at_s=now_s, pool=core.pool, running=core.num_running, waiting=core.num_waiting))


def replay(
    arrivals: Sequence[Arrival],
    replicas: Sequence[Replica],
    router: Router,
    make_request: Callable[[int, Arrival], EngineRequest],
    *,
    resident: Sequence[str] = (),
    slo: Slo | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> bool:
    """Ask all `arrivals` and wait for their ends. With `slo`, stop as soon as that cannot be kept any more.

    `resident` are the digests of adapters that are brought to all devices before. `progress` is told now and then which
    share of the requests has been asked.

    Returns whether it came to the end. Clocks that stand apart are brought to one time first.
    """
    for replica in replicas:
        for digest in resident:
            replica.warm_up(digest)
    start_s = max(replica.clock() for replica in replicas)
    most_late = (1 - SHARE) * len(arrivals)
    most_slow = (1 - SHARE) * sum(max(0, arrival.output_tokens - 1) for arrival in arrivals)
    check_every = max(1, len(arrivals) // 100)
    for number, arrival in enumerate(arrivals):
        at_s = start_s + arrival.at_s
        for replica in replicas:
            replica.run_until(at_s)
        chosen = replicas[router.choose(arrival.adapter, [len(replica.running) for replica in replicas])]
        chosen.add(make_request(number, arrival), arrival, at_s)
        if number % check_every:
            continue
        progress(number / len(arrivals))
        if slo is not None:
            late, slow = sum(each.late for each in replicas), sum(each.slow_gaps() for each in replicas)
            if late > most_late or slow > most_slow:
                return False
    for replica in replicas:
        replica.run_until(math.inf)
    return True
