"""The engine: requests in, token deltas out, one model forward per step.

    plan = decide(state)  ->  chunks = prepare(plan)  ->  output = runner.run(chunks)  ->  deltas = apply(plan, output)

Decisions are `sched.scheduler`'s and pure; every effect on pages, pins and queues is in this file, in `_prepare` and
`_apply` and what they call.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from heapq import merge
from operator import itemgetter

from lorasrv.config import SchedulerConfig
from lorasrv.engine.admission import TokenLimits, check_tokens
from lorasrv.engine.batch import AdapterInput, ChunkInput, Runner, StepOutput
from lorasrv.engine.sampling import check_named_tokens, finish_reason, first_needed_row, sample_input, score_input
from lorasrv.engine.tiers import AdapterTiers
from lorasrv.errors import GenerationExists, InternalError, LorasrvError, QueueFull
from lorasrv.memory.eviction import Candidate, IdleAdapter, IdleBlock
from lorasrv.memory.pages import Owner, OwnerKind, PagePool
from lorasrv.memory.prefix import BlockKeys, PrefixCache
from lorasrv.memory.residency import Residency
from lorasrv.sched.plan import Admission, Chunk, Plan
from lorasrv.sched.scheduler import Scheduler, View
from lorasrv.sched.sequence import Sequence
from lorasrv.types import (
    AdapterResidency,
    EngineCounters,
    EngineRequest,
    EngineStatus,
    Failure,
    PositionLogprobs,
    Tier,
    TokenDelta,
)

IDLE_WAIT_S = 0.005

_CACHE = Owner(OwnerKind.PREFIX, "cache")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model and the pool can take."""

    num_pages: int
    block_tokens: int
    context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]


class EngineCore:
    """One engine's state. Owned by the engine's thread: every method is called from it."""

    def __init__(self, *, config: SchedulerConfig, limits: Limits, runner: Runner, tiers: AdapterTiers) -> None:
        self._config = config
        self._limits = limits
        self._runner = runner
        self._tiers = tiers
        self._scheduler = Scheduler(config=config, block_tokens=limits.block_tokens)
        self._pool = PagePool(limits.num_pages)
        self._residency = Residency()
        self._prefix = PrefixCache()
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._num_added = 0
        self._step = 0
        self._counters = EngineCounters()

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, GenerationExists or QueueFull, and then nothing has changed."""
        self._validate(request)
        if request.request_id in self._sequences:
            raise GenerationExists(f"generation {request.request_id!r} is running")
        if len(self._waiting) >= self._config.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting; the limit is {self._config.max_waiting}")
        sequence = Sequence(
            request=request,
            order=self._num_added,
            token_ids=list(request.token_ids),
            keys=BlockKeys(
                weights=repr(request.adapter), salt=request.cache_salt, block_tokens=self._limits.block_tokens
            ),
        )
        self._num_added += 1
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request and give back what it holds; one that has ended already is no error."""
        assert index is None, "one sample is all a request has so far"
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._drop(sequence)
            if not self._waiting:
                self._tiers.want(())
            # Between steps none is in flight that could still read the pages.
            self._pool.reclaim(self._step)

    def has_work(self) -> bool:
        return bool(self._sequences)

    def step(self) -> tuple[TokenDelta, ...]:
        """Decide, compute and apply one step; a step that can compute nothing waits briefly for an adapter."""
        failed = self._fail_unloadable()
        plan = self._scheduler.decide(self._view())
        rejected = self._reject(plan)
        chunks = self._prepare(plan)
        if not chunks:
            if self._sequences and not (failed or rejected):
                self._tiers.wait(IDLE_WAIT_S)
            return (*failed, *rejected)
        self._step += 1
        output = self._runner.run(chunks)
        return (*failed, *rejected, *self._apply(plan, output))

    def status(self) -> EngineStatus:
        resident = {
            adapter.digest: AdapterResidency(
                digest=adapter.digest,
                tier=Tier.DEVICE,
                num_pages=len(adapter.pages),
                pins=self._residency.pins(adapter.digest),
            )
            for adapter in self._residency
        }
        below = {
            digest: AdapterResidency(digest=digest, tier=tier, num_pages=0, pins=0)
            for digest, tier in self._tiers.host_tiers().items()
        }
        return EngineStatus(
            pool=self._pool.stats(),
            running=len(self._running),
            waiting=len(self._waiting),
            pins=self._residency.num_pins,
            adapters=tuple((below | resident).values()),
            counters=self._counters,
        )

    def check(self) -> None:
        """Raise AssertionError on a broken invariant, within a part or between parts."""
        self._pool.check()
        self._residency.check()
        self._prefix.check()
        self._tiers.check()
        for sequence in self._running:
            owners = {_CACHE, _sequence_owner(sequence)}
            assert all(self._pool.owner(page) in owners for page in sequence.block_table), "a block is another's"
            assert sequence.num_computed <= len(sequence.block_table) * self._limits.block_tokens, "KV without a page"
        assert not any(sequence.block_table for sequence in self._waiting), "a waiting request holds pages"
        assert {id(s) for s in self._sequences.values()} == {id(s) for s in (*self._waiting, *self._running)}
        orders = [sequence.order for sequence in self._waiting]
        assert orders == sorted(orders), "the queue is out of order"
        stats = self._pool.stats()
        shared = Counter(page for s in self._running for page in s.block_table if page in self._prefix)
        num_blocks = sum(len(sequence.block_table) for sequence in self._running)
        assert stats.sequences == num_blocks - shared.total(), "sequence pages leaked"
        assert stats.prefix == len(self._prefix), "cached pages leaked"
        assert all(self._prefix.pins(page) == count for page, count in shared.items()), "a cached block's pins are off"
        num_idle = sum(1 for _ in self._prefix.idle())
        assert len(shared) + num_idle == len(self._prefix), "a cached block is pinned by nobody"
        assert stats.adapters == sum(len(adapter.pages) for adapter in self._residency), "adapter pages leaked"
        used = [sequence.digest for sequence in self._running if sequence.digest is not None]
        for adapter in self._residency:
            assert self._residency.pins(adapter.digest) == used.count(adapter.digest), "pins do not match requests"

    def close(self) -> None:
        self._tiers.close()

    def _validate(self, request: EngineRequest) -> None:
        """Front ends have asked the same; here it keeps what cannot run from the scheduler, whoever sends it."""
        limits = self._limits
        pool_tokens = limits.num_pages * limits.block_tokens
        tokens = TokenLimits(
            vocab_size=limits.vocab_size, context_tokens=limits.context_tokens, pool_tokens=pool_tokens
        )
        check_tokens(request.token_ids, request.max_tokens, tokens)
        check_named_tokens(request, limits.vocab_size, limits.eos_token_ids)

    def _view(self) -> View:
        return View(
            running=self._running,
            waiting=self._waiting,
            num_pages=self._limits.num_pages,
            free_pages=self._pool.num_free,
            resources=self,
        )

    # What the scheduler asks (sched.scheduler.Resources).

    def is_resident(self, digest: str) -> bool:
        return digest in self._residency

    def num_pages(self, digest: str) -> int | None:
        if digest in self._residency:
            return len(self._residency[digest].pages)
        return self._tiers.num_pages(digest)

    def idle(self) -> Iterable[Candidate]:
        adapters = ((now, IdleAdapter(each.digest, len(each.pages))) for each, now in self._residency.idle())
        blocks = ((now, IdleBlock(page)) for page, now in self._prefix.idle())
        return (candidate for _, candidate in merge(adapters, blocks, key=itemgetter(0)))

    def num_own_pages(self, sequence: Sequence) -> int:
        return sum(page not in self._prefix for page in sequence.block_table)

    def cached_blocks(self, sequence: Sequence) -> list[int]:
        if not self._config.prefix_cache:
            return []
        # What the request needs the logits of is computed in any case.
        count = first_needed_row(sequence) // self._limits.block_tokens
        return self._prefix.match(sequence.keys.first(count, sequence.token_ids))

    # Effects before the forward.

    def _fail_unloadable(self) -> tuple[TokenDelta, ...]:
        """End the queued requests whose adapter could not be read."""
        failures = self._tiers.poll()
        ended = [sequence for sequence in self._waiting if sequence.digest in failures]
        return tuple(self._fail(sequence, failures[sequence.digest or ""]) for sequence in ended)

    def _reject(self, plan: Plan) -> tuple[TokenDelta, ...]:
        for rejection in plan.reject:
            self._drop(self._sequences[rejection.request_id])
        return tuple(TokenDelta(request_id=r.request_id, failure=r.failure) for r in plan.reject)

    def _prepare(self, plan: Plan) -> tuple[ChunkInput, ...]:
        """Carry the plan out up to the forward: pages change hands here, and nowhere else but in `_release`."""
        for request_id in plan.preempt:
            self._preempt(self._sequences[request_id])
        for victim in plan.evict:
            self._evict(victim)
        self._pool.reclaim(self._step)
        self._tiers.want(plan.want)
        for digest in plan.load:
            self._load(digest)
        for admission in plan.admit:
            self._admit(admission)
        return tuple(self._chunk_input(chunk) for chunk in plan.chunks)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=lambda waiting: waiting.order)
        self._count(preemptions=1)

    def _evict(self, victim: Candidate) -> None:
        match victim:
            case IdleAdapter(digest):
                adapter = self._residency.remove(digest)
                self._pool.retire(adapter.pages, Owner(OwnerKind.ADAPTER, digest), self._step)
                self._count(adapter_evictions=1)
            case IdleBlock(page):
                self._prefix.remove(page)
                self._pool.retire([page], _CACHE, self._step)

    def _load(self, digest: str) -> None:
        num_pages = self._tiers.num_pages(digest)
        assert num_pages is not None, f"{digest} is planned to load but not in host memory"
        pages = self._pool.alloc(num_pages, Owner(OwnerKind.ADAPTER, digest))
        self._residency.add(self._tiers.load(digest, pages), self._step)
        self._count(adapter_loads=1)

    def _admit(self, admission: Admission) -> None:
        sequence = self._sequences[admission.request_id]
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=lambda running: running.order)
        num_cached = admission.num_cached_blocks
        sequence.block_table = self.cached_blocks(sequence)[:num_cached]
        self._prefix.pin(sequence.block_table)
        sequence.num_keyed_blocks = num_cached
        sequence.num_computed = num_cached * self._limits.block_tokens
        self._count(cached_prompt_tokens=sequence.num_computed)
        self._grow(sequence, len(sequence.token_ids))
        if sequence.digest is not None:
            self._residency.pin(sequence.digest)

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the sequence's pages cover `num_tokens` tokens."""
        missing = -(-num_tokens // self._limits.block_tokens) - len(sequence.block_table)
        if missing > 0:
            sequence.block_table += self._pool.alloc(missing, _sequence_owner(sequence))

    def _chunk_input(self, chunk: Chunk) -> ChunkInput:
        sequence = self._sequences[chunk.request_id]
        request = sequence.request
        end = chunk.start + chunk.num_tokens
        self._grow(sequence, end)
        adapter = None
        if request.adapter is not None:
            resident = self._residency[request.adapter.digest]
            adapter = AdapterInput(
                directory=resident.directory, max_rank=resident.max_rank, scale=request.adapter.scale
            )
        return ChunkInput(
            token_ids=tuple(sequence.token_ids[chunk.start : end]),
            start=chunk.start,
            block_table=tuple(sequence.block_table),
            adapter=adapter,
            sample=sample_input(sequence, self._limits.eos_token_ids) if end == len(sequence.token_ids) else None,
            score=score_input(sequence, chunk.start, end),
        )

    # Effects after the forward.

    def _apply(self, plan: Plan, output: StepOutput) -> tuple[TokenDelta, ...]:
        """Advance the sequences of a completed step and end those that are done."""
        deltas: list[TokenDelta] = []
        num_prompt = num_sampled = 0
        for index, chunk in enumerate(plan.chunks):
            sequence = self._sequences[chunk.request_id]
            sequence.num_computed += chunk.num_tokens
            self._cache_full_blocks(sequence)
            num_prompt += max(0, min(sequence.num_computed, len(sequence.request.token_ids)) - chunk.start)
            scored = output.prompt_logprobs.get(index, ())
            sequence.num_scored += len(scored)
            delta = None
            if sequence.num_computed == len(sequence.token_ids):
                delta = self._append(sequence, output.tokens[num_sampled], output.logprobs.get(num_sampled))
                num_sampled += 1
            if scored:
                delta = replace(delta or TokenDelta(request_id=sequence.request_id), prompt_logprobs=scored)
            if delta is not None:
                deltas.append(delta)
        self._pool.reclaim(self._step)
        self._count(steps=1, prompt_tokens=num_prompt, completion_tokens=sum(len(d.token_ids) for d in deltas))
        return tuple(deltas)

    def _cache_full_blocks(self, sequence: Sequence) -> None:
        """Share the blocks that the sequence has filled; from now on they belong to the cache."""
        if not self._config.prefix_cache:
            return
        num_full = sequence.num_computed // self._limits.block_tokens
        if num_full > sequence.num_keyed_blocks:
            keys = sequence.keys.first(num_full, sequence.token_ids)
            for index in range(sequence.num_keyed_blocks, num_full):
                page = sequence.block_table[index]
                if self._prefix.insert(keys[index], page):
                    self._pool.transfer(page, _sequence_owner(sequence), _CACHE)
            sequence.num_keyed_blocks = num_full

    def _append(self, sequence: Sequence, token_id: int | None, logprobs: PositionLogprobs | None) -> TokenDelta:
        if token_id is None:
            return self._fail_not_finite(sequence)
        sequence.token_ids.append(token_id)
        finish = finish_reason(sequence, self._limits.eos_token_ids)
        if finish is not None:
            self._drop(sequence)
            self._count(finished_requests=1)
        return TokenDelta(
            request_id=sequence.request_id,
            token_ids=(token_id,),
            logprobs=() if logprobs is None else (logprobs,),
            finish=finish,
        )

    def _fail_not_finite(self, sequence: Sequence) -> TokenDelta:
        """End a request whose logits were not finite. Its KV may be to blame: no later request is to find it cached."""
        cached = [page for page in sequence.block_table if page in self._prefix]
        delta = self._fail(sequence, InternalError("the model's output is not finite"))
        for page in cached:
            if not self._prefix.pins(page):
                self._evict(IdleBlock(page))
        return delta

    def _fail(self, sequence: Sequence, error: LorasrvError) -> TokenDelta:
        self._drop(sequence)
        return TokenDelta(request_id=sequence.request_id, failure=Failure(reason=error.reason, message=str(error)))

    def _drop(self, sequence: Sequence) -> None:
        """End a request, wherever it is."""
        del self._sequences[sequence.request_id]
        if sequence in self._running:
            self._release(sequence)
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back a running sequence's pages and pins; its full blocks stay in the prefix cache."""
        cached = [page for page in sequence.block_table if page in self._prefix]
        own = [page for page in sequence.block_table if page not in self._prefix]
        self._prefix.unpin(cached, self._step)
        self._pool.retire(own, _sequence_owner(sequence), self._step)
        sequence.block_table = []
        sequence.num_computed = sequence.num_keyed_blocks = 0
        if sequence.digest is not None:
            self._residency.unpin(sequence.digest, self._step)

    def _count(self, **increments: int) -> None:
        totals = {name: getattr(self._counters, name) + increment for name, increment in increments.items()}
        self._counters = replace(self._counters, **totals)


def _sequence_owner(sequence: Sequence) -> Owner:
    return Owner(OwnerKind.SEQUENCE, sequence.request_id)
