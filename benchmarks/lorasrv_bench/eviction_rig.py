"""The engine's ledger under a stream of requests, without a model: what is brought back, and what that would take.

A closed loop: as many requests run as may, in order of arrival, each with all its pages from the start; one ends when
its adapter is there, its prompt is computed and its tokens are drawn. Times are the hardware's below.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from lorasrv.engine.ledger import Ledger
from lorasrv.engine.tiers import TierChanges
from lorasrv.errors import LorasrvError
from lorasrv.memory.eviction import Policy
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.memory.victims import Victims
from lorasrv.sched.fairness import Share
from lorasrv.sched.plan import Admission
from lorasrv.sched.sequence import Sequence as Running
from lorasrv.types import AdapterUse, EngineRequest, Tier

BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request: the adapter's number, and its prompt as runs of tokens: (name, length), equal where the names are."""

    adapter: int | None
    prompt: tuple[tuple[int, int], ...]
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Sizes in pages, times in seconds. `rank_pages` is what a rank takes: adapter i has rank `ranks[i % len]`."""

    num_pages: int = 12_288
    host_pages: int = 65_536
    page_bytes: int = 2 << 20
    rank_pages: float = 2.5
    ranks: tuple[int, ...] = (64, 32, 16, 8)
    prefill_s_per_token: float = 29e-6
    step_s: float = 8e-3
    copy_s_per_page: float = 42e-6
    read_s_per_page: float = 1e-3
    max_running: int = 32

    def pages_of(self, adapter: int) -> int:
        return max(1, round(self.ranks[adapter % len(self.ranks)] * self.rank_pages))


@dataclass(kw_only=True)
class Outcome:
    """Of a run, its warm-up left out. Brought back is what had been there before: what comes for the first time has to
    come whatever goes. Seconds are of a thousand requests."""

    requests: int = 0
    adapter_requests: int = 0
    adapter_hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    copied_pages: int = 0
    reread_pages: int = 0
    evictions: int = 0

    def copies_s(self, hardware: Hardware) -> float:
        return self.copied_pages * hardware.copy_s_per_page / self.requests * 1000

    def reads_s(self, hardware: Hardware) -> float:
        return self.reread_pages * hardware.read_s_per_page / self.requests * 1000

    def prefill_s(self, hardware: Hardware) -> float:
        return self.recomputed_tokens * hardware.prefill_s_per_token / self.requests * 1000

    def seconds(self, hardware: Hardware) -> float:
        return self.copies_s(hardware) + self.reads_s(hardware) + self.prefill_s(hardware)


@dataclass
class RigTiers:
    """Host memory as a budget of pages, least recently used first out. What is asked for is there at the next poll; the
    time that takes passes on a clock of work."""

    hardware: Hardware
    sizes: Mapping[str, int]
    clock: float = 0.0
    host: OrderedDict[str, int] = field(default_factory=OrderedDict[str, int])
    arriving: list[str] = field(default_factory=list[str])
    wanted: tuple[str, ...] = ()
    used: int = 0

    def want(self, digests: Sequence[str]) -> None:
        self.wanted = tuple(digests)

    def num_pages(self, digest: str) -> int | None:
        if digest in self.host:
            self.host.move_to_end(digest)
        return self.host.get(digest)

    def poll(self) -> TierChanges:
        read = tuple(digest for digest in self.wanted if digest not in self.host)
        for digest in self.wanted:
            if digest not in self.host:
                self.clock += self.sizes[digest] * self.hardware.read_s_per_page
                self.host[digest] = self.sizes[digest]
                self.used += self.sizes[digest]
                while self.used > self.hardware.host_pages:
                    self.used -= self.host.popitem(last=False)[1]
        for digest in self.arriving:
            self.clock += self.sizes[digest] * self.hardware.copy_s_per_page
        loaded, self.arriving = tuple(self.arriving), []
        failed: dict[str, LorasrvError] = {}
        return TierChanges(failed=failed, read=read, loaded=loaded)

    def load(self, digest: str, pages: list[int], *, wait_for_steps: bool) -> ResidentAdapter:
        self.arriving.append(digest)
        return ResidentAdapter(digest=digest, pages=tuple(pages), directory=pages[0], max_rank=1)

    def bytes_at_once(self) -> int:
        return 0

    def discard(self, digest: str) -> None:
        raise NotImplementedError

    def failures(self) -> Mapping[str, LorasrvError]:
        return {}

    def host_tiers(self) -> dict[str, Tier]:
        return dict.fromkeys(self.host, Tier.HOST)

    def wait(self, timeout_s: float) -> None:
        raise NotImplementedError

    def check(self) -> None: ...

    def close(self) -> None: ...


class Rig:
    """One policy. With `drop_idle` nothing is kept when nobody uses it."""

    def __init__(self, policy: Policy, hardware: Hardware, *, drop_idle: bool = False) -> None:
        self.hardware = hardware
        self.drop_idle = drop_idle
        self.tiers = RigTiers(hardware, _Sizes(hardware))
        self.ledger = Ledger(
            num_pages=hardware.num_pages,
            page_bytes=hardware.page_bytes,
            block_tokens=BLOCK_TOKENS,
            keep_prefixes=True,
            tiers=self.tiers,
            policy=policy,
            clock=lambda: self.tiers.clock,
        )
        self.outcome = Outcome()
        self.now = 0.0
        self._count = 0
        self._running: list[tuple[float, int, Running]] = []
        self._known_blocks: set[bytes] = set()
        self._known_adapters: set[str] = set()

    def run(self, asks: Iterable[Ask], warm_up: int) -> Outcome:
        for number, ask in enumerate(asks):
            if number == warm_up:
                self.outcome = Outcome()
            self._serve(number, ask)
        while self._running:
            self._end_one()
        self.ledger.check([])
        return self.outcome

    def _serve(self, number: int, ask: Ask) -> None:
        digest = None if ask.adapter is None else str(ask.adapter)
        if len(self._running) == self.hardware.max_running:
            self._end_one()
        sequence = _sequence(number, ask, self.ledger)
        missing = self._num_missing(digest)
        num_blocks = -(-len(sequence.token_ids) // BLOCK_TOKENS)
        while not self._make_room(missing, num_blocks, digest, self.ledger.cached_blocks(sequence)):
            self._end_one()
            missing = self._num_missing(digest)
        if missing and digest is not None:
            self.ledger.load(digest)
        self._admit(sequence, missing)

    def _num_missing(self, digest: str | None) -> int:
        """Pages of the adapter to copy, which are in host memory then."""
        if digest is None or self.ledger.is_resident(digest):
            return 0
        num_pages = self.ledger.num_pages(digest)
        if num_pages is None:
            self.ledger.want((digest,))
            self.ledger.poll()
            self.ledger.want(())
            num_pages = self.tiers.sizes[digest]
            if digest in self._known_adapters:
                self.outcome.reread_pages += num_pages
        return num_pages

    def _make_room(self, missing: int, num_blocks: int, digest: str | None, cached: list[int]) -> bool:
        missing += num_blocks - len(cached) - self.ledger.num_free
        victims = Victims(self.ledger.idle(), lambda _: False).choose(missing, {digest or "", *cached})
        if victims is None:
            return False
        self.ledger.evict(victims)
        self.outcome.evictions += len(victims)
        return True

    def _admit(self, sequence: Running, copied_pages: int) -> None:
        hardware, outcome, costs = self.hardware, self.outcome, self.ledger.costs
        num_prompt = len(sequence.request.token_ids)
        num_cached = len(self.ledger.cached_blocks(sequence))
        self.ledger.admit(sequence, Admission(sequence=sequence, num_cached_blocks=num_cached))
        self.ledger.poll()
        num_computed = num_prompt - num_cached * BLOCK_TOKENS
        began = self.tiers.clock
        self.tiers.clock += hardware.step_s + (num_computed - 1) * hardware.prefill_s_per_token
        costs.step_ended(1, num_computed, began, self.tiers.clock)
        costs.step_ended(1, 1, self.tiers.clock, self.tiers.clock + hardware.step_s)
        self.tiers.clock += hardware.step_s
        keys = sequence.keys.first(num_prompt // BLOCK_TOKENS, sequence.token_ids)
        again = sum(key in self._known_blocks for key in keys[num_cached:])
        self._known_blocks |= set(keys)
        self.ledger.share_full_blocks(sequence, num_prompt)
        outcome.requests += 1
        outcome.prompt_tokens += num_prompt
        outcome.cached_tokens += num_cached * BLOCK_TOKENS
        outcome.recomputed_tokens += again * BLOCK_TOKENS
        if sequence.digest is not None:
            outcome.adapter_requests += 1
            outcome.adapter_hits += not copied_pages
            outcome.copied_pages += copied_pages if sequence.digest in self._known_adapters else 0
            self._known_adapters.add(sequence.digest)
        took = copied_pages * hardware.copy_s_per_page + num_computed * hardware.prefill_s_per_token
        took += (len(sequence.token_ids) - num_prompt) * hardware.step_s
        self._count += 1
        heappush(self._running, (self.now + took, self._count, sequence))

    def _end_one(self) -> None:
        self.now, _, sequence = heappop(self._running)
        self.ledger.share_full_blocks(sequence, len(sequence.token_ids))
        self._known_blocks |= set(sequence.keys.first(sequence.num_keyed_blocks, sequence.token_ids))
        self.ledger.release(sequence)
        if self.drop_idle:
            self.ledger.evict(list(self.ledger.idle()))


class _Sizes(dict[str, int]):
    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self._hardware = hardware

    def __missing__(self, digest: str) -> int:
        return self._hardware.pages_of(int(digest))


def _sequence(number: int, ask: Ask, ledger: Ledger) -> Running:
    # A run's tokens need only differ from another's.
    prompt = tuple((name << 20) + place for name, length in ask.prompt for place in range(length))
    output = [(-number << 20) - place for place in range(1, ask.output_tokens + 1)]
    adapter = None if ask.adapter is None else AdapterUse(digest=str(ask.adapter))
    request = EngineRequest(
        request_id=str(number), token_ids=prompt, adapter=adapter, max_tokens=ask.output_tokens, seed=0
    )
    return Running(
        sequence_id=str(number),
        request=request,
        sample=0,
        order=(0, number),
        share=Share("", 1.0),
        ends=frozenset(),
        token_ids=[*prompt, *output],
        keys=ledger.block_keys(request),
    )
