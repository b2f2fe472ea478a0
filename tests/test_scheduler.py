"""Plans that a state hard to reach through the core asks for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lorasrv.config import SchedulerConfig
from lorasrv.memory.eviction import Candidate, IdleAdapter
from lorasrv.memory.prefix import BlockKeys
from lorasrv.sched.fairness import Shares
from lorasrv.sched.plan import Admission
from lorasrv.sched.queue import WaitingQueue
from lorasrv.sched.running import Running
from lorasrv.sched.scheduler import Scheduler, View
from lorasrv.sched.sequence import Sequence
from lorasrv.types import AdapterUse, EngineRequest, Tier, Warm

BLOCK_TOKENS = 4
SHARES = Shares()


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """Of a request whose other sample runs on an adapter of two pages, and has a page to copy."""

    loaded: bool

    def is_resident(self, digest: str) -> bool:
        return True

    def is_loaded(self, digest: str) -> bool:
        return self.loaded

    def num_pages(self, digest: str) -> int | None:
        return 2

    def idle(self) -> Iterable[Candidate]:
        return ()

    def num_own_pages(self, sequence: Sequence) -> int:
        return len(sequence.block_table)

    def cached_blocks(self, sequence: Sequence) -> list[int]:
        return []

    def copyable_page(self, sequence: Sequence) -> int | None:
        return 5


def make_sequence(prompt: tuple[int, ...], sequence_id: str = "r/1", digest: str | None = "a") -> Sequence:
    adapter = AdapterUse(digest=digest) if digest else None
    request = EngineRequest(request_id="r", token_ids=prompt, adapter=adapter, max_tokens=5, seed=0, n=2)
    return Sequence(
        sequence_id=sequence_id,
        request=request,
        sample=1,
        order=(0, 1 if sequence_id != "younger" else 2),
        share=SHARES.open("", 1.0),
        token_ids=list(prompt),
        ends=frozenset(),
        keys=BlockKeys(weights="", salt="", block_tokens=BLOCK_TOKENS),
    )


def queue_of(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue(SHARES)
    for sequence in sequences:
        queue.add(sequence, away=False)
    return queue


def test_a_page_is_copied_only_where_a_step_computes_with_it() -> None:
    """Preempted, the other sample goes on from its cached prompt, and may wait for their adapter to come back."""
    scheduler = Scheduler(config=SchedulerConfig(), block_tokens=BLOCK_TOKENS)
    for loaded, copied_page in ((True, 5), (False, None)):
        sequence = make_sequence((1, 2, 3))
        view = View(
            running=Running(),
            waiting=queue_of(sequence),
            num_pages=9,
            free_pages=9,
            resources=Siblings(loaded=loaded),
        )
        plan = scheduler.decide(view)
        assert plan.admit == (Admission(sequence=sequence, num_cached_blocks=0, copied_page=copied_page),)
        assert bool(plan.chunks) == loaded


@dataclass(frozen=True, kw_only=True)
class OneIdle(Siblings):
    """Adapter "a" is idle on five pages, all others are in host memory."""

    def is_resident(self, digest: str) -> bool:
        return digest == "a"

    def idle(self) -> Iterable[Candidate]:
        return (IdleAdapter("a", 5),)


def test_a_queued_request_whose_adapter_an_older_one_evicts_goes_before_a_warm() -> None:
    scheduler = Scheduler(config=SchedulerConfig(), block_tokens=BLOCK_TOKENS)
    older = make_sequence((1,) * 12, "older", None)
    view = View(
        running=Running(),
        waiting=queue_of(older, make_sequence((1,), "younger")),
        num_pages=9,
        free_pages=2,
        resources=OneIdle(loaded=True),
        warms=(Warm(warm_id=0, digest="w", tier=Tier.DEVICE, deadline_s=1.0),),
    )
    plan = scheduler.decide(view)
    assert (plan.evict, plan.load) == ((IdleAdapter("a", 5),), ())
    assert [admission.sequence.sequence_id for admission in plan.admit] == ["older"]
    older.queued = False
    assert scheduler.decide(replace(view, waiting=queue_of(older))).load == ("w",)
