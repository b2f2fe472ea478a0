"""Plans that a state hard to reach through the core asks for."""

from collections.abc import Iterable
from dataclasses import dataclass

from lorasrv.config import SchedulerConfig
from lorasrv.memory.eviction import Candidate
from lorasrv.memory.prefix import BlockKeys
from lorasrv.sched.plan import Admission
from lorasrv.sched.scheduler import Scheduler, View
from lorasrv.sched.sequence import Sequence
from lorasrv.types import AdapterUse, EngineRequest

BLOCK_TOKENS = 4


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


def make_sequence(prompt: tuple[int, ...]) -> Sequence:
    request = EngineRequest(request_id="r", token_ids=prompt, adapter=AdapterUse(digest="a"), max_tokens=5, seed=0, n=2)
    keys = BlockKeys(weights="", salt="", block_tokens=BLOCK_TOKENS)
    return Sequence(sequence_id="r/1", request=request, sample=1, order=1, token_ids=list(prompt), keys=keys)


def test_a_page_is_copied_only_where_a_step_computes_with_it() -> None:
    """Preempted, the other sample goes on from its cached prompt, and may wait for their adapter to come back."""
    scheduler = Scheduler(config=SchedulerConfig(), block_tokens=BLOCK_TOKENS)
    for loaded, copied_page in ((True, 5), (False, None)):
        view = View(
            running=(),
            waiting=(make_sequence((1, 2, 3)),),
            num_pages=9,
            free_pages=9,
            resources=Siblings(loaded=loaded),
        )
        plan = scheduler.decide(view)
        assert plan.admit == (Admission(sequence_id="r/1", num_cached_blocks=0, copied_page=copied_page),)
        assert bool(plan.chunks) == loaded
