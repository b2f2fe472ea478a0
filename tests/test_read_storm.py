"""Reads that hang by the dozen, in virtual time: the production core, tiers and pool of builders, over no process."""

from collections.abc import Sequence
from random import Random
from typing import Any, cast

import pytest

from lorasrv.config import SchedulerConfig
from lorasrv.engine.builder_messages import Build, Built, Measure, Measured, Message
from lorasrv.engine.builder_pool import BuilderPool
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.engine.tiers import Tiers
from lorasrv.memory.arena import HostArena
from lorasrv.sched.queue import MAX_SLOW_READS
from lorasrv.sim.clock import VirtualClock
from lorasrv.sim.cost import CostModel
from lorasrv.sim.device import SimCopy, SimDevice, SimRunner, SimStorage
from lorasrv.sim.images import SimImage
from lorasrv.types import AdapterUse, EngineRequest, Tier, Warm
from sim_rig import TINY, hardware

PAGE_BYTES = 4096
IMAGE_PAGES = 2
READ_S = 0.05
TIMEOUT_S = 30.0
WARM_DEADLINE_S = 1.5
NUM_BUILDERS = 2


class Disk:
    """A builder's: what is called so hangs, all else takes READ_S."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._answers: list[tuple[float, Message]] = []
        self._ended = False

    def fileno(self) -> int:
        return 0

    def send(self, message: Measure | Build) -> None:
        if message.digest.startswith("hangs"):
            return
        answer: Message = Built(digest=message.digest)
        if isinstance(message, Measure):
            built = len(message.places) >= IMAGE_PAGES
            answer = Measured(digest=message.digest, num_pages=IMAGE_PAGES, num_tiles=1, max_rank=1, built=built)
        self._answers.append((self._clock() + READ_S, answer))

    def receive(self) -> list[Message]:
        come = [answer for at_s, answer in self._answers if at_s <= self._clock()]
        self._answers = self._answers[len(come) :]
        return come

    def close(self) -> None:
        self._ended = True

    def kill(self) -> None:
        self._ended = True

    def has_ended(self) -> bool:
        return self._ended

    def wait(self, timeout_s: float) -> None:
        pass


class Builders(BuilderPool):
    def wait(self, timeout_s: float) -> None:
        clock = cast(VirtualClock, self._clock)
        clock.sleep_until(clock() + timeout_s)


class Storage(SimStorage):
    def begin_adapter(self, adapter: Any, pages: Sequence[int], *, wait_for_steps: bool) -> SimCopy:
        image = SimImage(num_pages=adapter.num_pages, page_bytes=PAGE_BYTES, max_rank=1, params=1000)
        return super().begin_adapter(image, pages, wait_for_steps=wait_for_steps)


class Storm:
    """A tenant asks for adapters whose reads hang and, when that has failed, again, or with a deadline for others;
    another one's are cold."""

    def __init__(self, deadline_s: float | None) -> None:
        self.deadline_s = deadline_s
        self.clock = VirtualClock()
        self.random = Random(0)
        device = SimDevice(clock=self.clock, costs=CostModel(TINY, hardware(copy_bytes_per_s=1e9, kernel_s=2e-3), 4))
        self.spawned: list[Disk] = []
        pool = Builders(
            HostArena(1125, PAGE_BYTES),
            1,
            self.spawn,
            num_builders=NUM_BUILDERS,
            num_ahead=125,
            read_timeout_s=TIMEOUT_S,
            clock=self.clock,
        )
        limits = Limits(
            num_pages=4000,
            page_bytes=PAGE_BYTES,
            block_tokens=16,
            context_tokens=1000,
            vocab_size=1 << 31,
            eos_token_ids=frozenset(),
        )
        self.core = EngineCore(
            config=SchedulerConfig(),
            limits=limits,
            runner=SimRunner(device),
            tiers=Tiers(cast(Any, Storage(device)), pool, 1000 * PAGE_BYTES, 1 << 24),
            clock=self.clock,
        )
        self.asked_s: dict[str, float] = {}
        self.first_s: dict[str, float] = {}
        self.count = 0

    def spawn(self) -> Disk:
        self.spawned.append(Disk(self.clock))
        return self.spawned[-1]

    def ask(self, digest: str | None, tenant: str, deadline_s: float | None = None) -> None:
        self.count += 1
        request = EngineRequest(
            request_id=f"{digest}/{self.count}",
            token_ids=tuple(self.random.randrange(1 << 31) for _ in range(50)),
            adapter=None if digest is None else AdapterUse(digest=digest),
            max_tokens=20,
            seed=0,
            ignore_eos=True,
            tenant=tenant,
            deadline_s=None if deadline_s is None else self.clock() + deadline_s,
        )
        self.asked_s[request.request_id] = self.clock()
        self.core.add(request)

    def step(self) -> None:
        for delta in self.core.step():
            if delta.token_ids:
                self.first_s.setdefault(delta.request_id, self.clock())
            elif delta.failure is not None:
                digest = delta.request_id.split("/")[0] if self.deadline_s is None else f"hangs{self.count}"
                self.ask(digest, "storm", self.deadline_s)

    def warm(self) -> None:
        self.count += 1
        warm = Warm(
            warm_id=self.count, digest=f"hangs{self.count}", tier=Tier.HOST, deadline_s=self.clock() + WARM_DEADLINE_S
        )
        self.core.warm(warm)

    def longest_wait_s(self, num_hanging: int, seconds: float, *, warms: bool = False) -> float:
        """Of the other tenant, which asks every half second for the base and for another cold adapter."""
        for number in range(num_hanging):
            self.ask(f"hangs{number}", "storm", self.deadline_s)
        next_s = 0.0
        while self.clock() < seconds:
            if self.clock() >= next_s:
                self.ask(f"cold{self.count}", "modest")
                self.ask(None, "modest")
                if warms:
                    self.warm()
                next_s += 0.5
            self.step()
        waited = [
            self.first_s.get(request_id, self.clock()) - asked_s
            for request_id, asked_s in self.asked_s.items()
            if not request_id.startswith("hangs")
        ]
        return max(waited)


@pytest.mark.parametrize("deadline_s", [None, 1.5, 3.0, 8.0])
def test_a_storm_of_hanging_reads_is_its_own_tenants_affair(deadline_s: float | None) -> None:
    """Far more hang than there are builders or places in the look-ahead. The others wait while builders are added, a
    second for each pair."""
    storm = Storm(deadline_s)
    assert storm.longest_wait_s(100, 2.5 * TIMEOUT_S) < 5.0
    storm.core.check()
    assert sum(not builder.has_ended() for builder in storm.spawned) <= NUM_BUILDERS + MAX_SLOW_READS


def test_warming_what_hangs_takes_one_builder() -> None:
    storm = Storm(None)
    assert storm.longest_wait_s(0, 2.5 * TIMEOUT_S, warms=True) < 2.0
    assert sum(not builder.has_ended() for builder in storm.spawned) <= NUM_BUILDERS + 1
