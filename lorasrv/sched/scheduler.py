"""Iteration-level scheduling with chunked prefill: a pure decision over ids and integers.

Running decodes go first, then running prefills, then the queue in its order, under one token budget (Orca, OSDI 2022;
Sarathi-Serve, OSDI 2024). When running sequences outgrow the pool, idle adapters and idle cached blocks are evicted,
then the youngest sequence is preempted: it queues again in its old place, its full blocks stay in the prefix cache, and
what is no longer there when its turn comes is recomputed.
"""

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Protocol

from lorasrv.config import SchedulerConfig
from lorasrv.errors import ResourceExhausted
from lorasrv.memory.eviction import Candidate
from lorasrv.memory.victims import Victims, name_of
from lorasrv.sched.plan import Admission, Chunk, Plan, Rejection
from lorasrv.sched.queue import WaitingQueue
from lorasrv.sched.running import Running
from lorasrv.sched.sequence import Sequence, order_of
from lorasrv.types import Failure, Tier, Warm

# So many queued requests are looked at for each adapter of the look-ahead: several may ask for the same one.
_SCANNED = 2


class Resources(Protocol):
    """What the scheduler may ask about adapter versions and cached blocks."""

    def is_resident(self, digest: str) -> bool:
        """Whether the adapter has its pages on the device."""
        ...

    def is_loaded(self, digest: str) -> bool:
        """Whether those hold its weights already."""
        ...

    def num_pages(self, digest: str) -> int | None:
        """Pages the adapter takes on the device; None while it is neither there nor in host memory."""
        ...

    def idle(self) -> Iterable[Candidate]:
        """Adapters and cached blocks that no running request uses, in the order in which they should go."""
        ...

    def num_own_pages(self, sequence: Sequence) -> int:
        """Pages that are free once this running sequence is preempted: those that are not in the prefix cache."""
        ...

    def cached_blocks(self, sequence: Sequence) -> Seq[int]:
        """Pages of the longest cached prefix of a queued sequence, its last token left out."""
        ...

    def copyable_page(self, sequence: Sequence) -> int | None:
        """The page that holds what the full blocks of the prompt leave, in a running sample of the same request."""
        ...


@dataclass(frozen=True, kw_only=True)
class View:
    """The engine's state as one decision sees it; read, never written.

    What the plan loads into its first `pages_at_once` pages has its weights there before the step computes.
    `warms` are the adapters that are wanted in memory before a request asks for them, in order of arrival; they have
    not arrived.
    """

    running: Running
    waiting: WaitingQueue
    num_pages: int
    free_pages: int
    resources: Resources
    pages_at_once: int = 0
    warms: Seq[Warm] = ()


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    config: SchedulerConfig
    block_tokens: int

    def decide(self, view: View) -> Plan:
        draft = _Draft(view, self.config, self.block_tokens)
        draft.continue_running()
        draft.look_ahead()
        if not draft.preempted and draft.admit_waiting():
            draft.load_warms()
        return draft.plan()


class _Draft:
    """A plan in the making: what is left of the budget, the pages and the places as decisions are taken."""

    def __init__(self, view: View, config: SchedulerConfig, block_tokens: int) -> None:
        self.view = view
        self.config = config
        self.block_tokens = block_tokens
        self.budget = config.max_step_tokens
        self.free = view.free_pages
        self.grow: list[Sequence] = []
        self.decodes: tuple[Sequence, ...] = ()
        self.chunks: list[Chunk] = []
        self.admitted: list[Admission] = []
        self.loads: dict[str, None] = {}
        # Those of them whose requests may run in this step already.
        self.at_once: set[str] = set()
        self.pages_at_once = view.pages_at_once
        self.evicted: list[Candidate] = []
        # Digests and pages that this plan evicts, and those that it relies on.
        self.gone: set[str | int] = set()
        self.kept: set[str | int] = set()
        self.preempted: list[Sequence] = []
        self.rejected: list[Rejection] = []
        self.wanted: dict[str, None] = {}
        self.victims = Victims(view.resources.idle(), view.waiting.waits_for)

    def plan(self) -> Plan:
        return Plan(
            reject=tuple(self.rejected),
            preempt=tuple(self.preempted),
            evict=tuple(self.evicted),
            want=tuple(self.wanted),
            load=tuple(self.loads),
            admit=tuple(self.admitted),
            grow=tuple(self.grow),
            decodes=self.decodes,
            chunks=tuple(self.chunks),
        )

    def continue_running(self) -> None:
        """Decodes, of which there are never more than the budget has tokens; then prefills that have begun, oldest
        first. Prefills hold their pages already.
        """
        running = self.view.running
        decodes = running.decoding
        num_decodes = len(decodes)
        full = [place for place, each in enumerate(decodes) if each.num_computed == each.num_covered]
        if self._take(len(full)):
            self.grow = [decodes[place] for place in full]
        else:
            num_decodes = self._grow_by_turns(full)
        self.decodes = tuple(decodes[:num_decodes])
        self.budget -= num_decodes
        for sequence in running.prefilling:
            if not self.preempted or sequence.order < self.preempted[-1].order:
                self._add_chunk(sequence, sequence.num_computed, sequence.num_remaining)

    def _grow_by_turns(self, full: list[int]) -> int:
        """Give a page to each of these decodes, oldest first, of which not all get one. How many decodes go on."""
        decodes = self.view.running.decoding
        num_decodes = len(decodes)
        for place in full:
            if place >= num_decodes:
                break
            if not self._grow(decodes[place]):
                return place
            self.grow.append(decodes[place])
            if self.preempted:
                num_decodes = bisect_left(decodes, self.preempted[-1].order, key=order_of)
        return num_decodes

    def _grow(self, sequence: Sequence) -> bool:
        """Whether there is a page for one more token of a running sequence; may drop younger ones, youngest first, or
        itself, to get one."""
        running = self.view.running
        while not self._take(1):
            num_kept = len(running) - len(self.preempted)
            if num_kept == 1:
                return False
            youngest = running[num_kept - 1]
            self.preempted.append(youngest)
            # Its cached blocks only become idle: the next plan may evict them.
            self.free += self.view.resources.num_own_pages(youngest)
            if youngest is sequence:
                return False
        return True

    def look_ahead(self) -> None:
        """The first adapters in the order of service that are not on the device and are needed in host memory.

        Behind them one that is to be warm: the reads of requests that come next queue behind its own. While a read
        for a warm is under way, no other's begins, though nobody waits for it any more.
        """
        if self.view.waiting.num_away:
            self.wanted = self.view.waiting.next_away(
                self.config.lookahead,
                _SCANNED * self.config.lookahead,
                is_read=lambda digest: self.view.resources.num_pages(digest) is not None,
            )
        unread = (warm.digest for warm in self.view.warms if self.view.resources.num_pages(warm.digest) is None)
        if len(self.wanted) < self.config.lookahead:
            under_way = self.view.waiting.reads_for_warms
            self.wanted |= dict.fromkeys(islice((each for each in unread if not under_way or each in under_way), 1))

    def admit_waiting(self) -> bool:
        """Grant requests, in the order of service, their adapter's pages and their known tokens' pages together.
        Whether all that are left wait for their adapters to be read.

        A request whose adapter is not in host memory waits on its own; the first one that is ready but does not fit
        ends the round, so that others cannot starve it.
        """
        places, all_ready_admitted = self.config.max_running - len(self.view.running), True
        if not places or not self.budget or not self.view.waiting:
            return not self.view.waiting
        # Of the others not one could be loaded.
        is_any_read = any(self.view.resources.num_pages(digest) is not None for digest in self.wanted)
        turns = self.view.waiting.turns(num_away=_SCANNED * self.config.lookahead if is_any_read else 0)
        for sequence in turns:
            if len(self.admitted) == places or self.budget == 0:
                return False
            digest = sequence.digest
            load = digest if digest is not None and self._must_load(digest) else None
            if digest in self.gone or (load and len(self.loads) == self.config.max_loads_per_step):
                all_ready_admitted = False
                continue
            adapter_pages = 0
            if load is not None:
                found = self.view.resources.num_pages(load) if load in self.wanted else None
                if found is None:
                    continue
                adapter_pages = found
            if self._reject_oversized(sequence):
                self.wanted.pop(digest or "", None)  # who else asks for it does so in the next plan
                continue
            cached = list(takewhile(lambda page: page not in self.gone, self.view.resources.cached_blocks(sequence)))
            self.kept |= {digest, *cached} if digest is not None else {*cached}
            num_new = self._pages_for(len(sequence.token_ids)) - len(cached)
            if not self._take(num_new + adapter_pages):
                return False
            if load is not None:
                self._load(load, adapter_pages)
            turns.grant(sequence)
            self._admit(sequence, len(cached))
        return all_ready_admitted

    def load_warms(self) -> None:
        """Load adapters that are wanted on the device before a request asks for them, each as soon as there is room.

        Beyond their pages, one page for each running request stays to be had: a page that is being written cannot be
        taken back, and nobody is to be preempted for it.
        """
        self.kept |= {warm.digest for warm in self.view.warms}
        reserved, too_many = len(self.view.running) + len(self.admitted), self.view.num_pages
        for warm in self.view.warms:
            num_pages = self.view.resources.num_pages(warm.digest)
            if warm.tier is not Tier.DEVICE or num_pages is None or not self._must_load(warm.digest):
                continue
            if len(self.loads) == self.config.max_loads_per_step:
                return
            if num_pages >= too_many:
                continue
            victims = self.victims.choose(num_pages + reserved - self.free, self.kept)
            if victims is None:
                too_many = num_pages
                continue
            self.victims.put_back(victims)
            self._take(num_pages)
            self._load(warm.digest, num_pages)

    def _admit(self, sequence: Sequence, num_cached_blocks: int) -> None:
        known, start = len(sequence.token_ids), num_cached_blocks * self.block_tokens
        digest, copied = sequence.digest, None
        may_run = digest is None or digest in self.at_once or self.view.resources.is_loaded(digest)
        # A copy is made in the step that computes behind it.
        if may_run and known - start in range(2, self.block_tokens + 1):
            copied = self.view.resources.copyable_page(sequence)
        self.admitted.append(Admission(sequence=sequence, num_cached_blocks=num_cached_blocks, copied_page=copied))
        if may_run:
            start = start if copied is None else known - 1
            self._add_chunk(sequence, start, known - start)

    def _load(self, digest: str, num_pages: int) -> None:
        """Copies are made one behind the other, so behind one that takes longer none is made at once."""
        self.loads[digest] = None
        if num_pages <= self.pages_at_once:
            self.pages_at_once -= num_pages
            self.at_once.add(digest)
        else:
            self.pages_at_once = 0

    def _must_load(self, digest: str) -> bool:
        return digest not in self.loads and not self.view.resources.is_resident(digest)

    def _reject_oversized(self, sequence: Sequence) -> bool:
        """Whether the pool can never hold the sequence and its adapter, whose size is known once it has been read."""
        digest = sequence.digest
        adapter_pages = (0 if digest is None else self.view.resources.num_pages(digest)) or 0
        needed = adapter_pages + self._pages_for(sequence.max_tokens_total)
        if needed <= self.view.num_pages:
            return False
        message = f"needs {needed} pages ({adapter_pages} of them for its adapter); the pool has {self.view.num_pages}"
        failure = Failure(reason=ResourceExhausted.reason, message=message)
        self.rejected.append(Rejection(sequence=sequence, failure=failure))
        return True

    def _add_chunk(self, sequence: Sequence, start: int, wanted: int) -> None:
        num_tokens = min(wanted, self.budget)
        if num_tokens:
            self.budget -= num_tokens
            self.chunks.append(Chunk(sequence, start, num_tokens))

    def _take(self, num_pages: int) -> bool:
        """Set `num_pages` aside, evicting what is idle if that makes it possible; all or nothing."""
        missing = num_pages - self.free
        if missing > 0:
            victims = self.victims.choose(missing, self.kept)
            if victims is None:
                return False
            self.evicted += victims
            self.gone.update(map(name_of, victims))
            self.free += sum(victim.num_pages for victim in victims)
        self.free -= num_pages
        return True

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)
