"""The engine: requests in, token deltas out, one model forward per step.

    plan = decide(state)  ->  submit(plan)  ->  apply(output of the step before)  ->  draw

While the device runs one step, the next is planned and its forward submitted; the tokens of the step before are learned
then, and what they change (penalties, masks, ends) is known in time for the next draws. So an end is learned one step
late: the surplus row is computed and dropped. Where steps do not run beside the host nothing is kept in flight.

Decisions are `sched.scheduler`'s and pure; effects on pages and pins are `engine.ledger`'s; who waits, runs and ends
changes in `engine.open_requests`.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lorasrv.config import SchedulerConfig
from lorasrv.engine.admission import TokenLimits, check_tokens
from lorasrv.engine.batch import ChunkInput, Draw, PageCopy, Runner, RunningStep, StepOutput
from lorasrv.engine.ledger import Ledger
from lorasrv.engine.open_requests import OpenRequests
from lorasrv.engine.positions import Positions
from lorasrv.engine.rows import decode_inputs, draw_behind, token_delta
from lorasrv.engine.sampling import check_named_tokens, finish_reason, score_input
from lorasrv.engine.tiers import AdapterTiers
from lorasrv.engine.warming import Warms
from lorasrv.errors import DeadlineExceeded, GenerationExists, InternalError, InvalidRequest, LorasrvError, QueueFull
from lorasrv.memory.eviction import Candidate, GreedyDual, IdleAdapter
from lorasrv.sched.fairness import OUTPUT_COST, Shares
from lorasrv.sched.plan import Admission, Chunk, Plan
from lorasrv.sched.queue import WaitingQueue
from lorasrv.sched.running import Running
from lorasrv.sched.scheduler import Scheduler, View
from lorasrv.sched.sequence import Sequence
from lorasrv.types import (
    EngineCounters,
    EngineRequest,
    EngineStatus,
    Failure,
    FinishReason,
    PoolStats,
    PositionLogprobs,
    Tier,
    TokenDelta,
    Warm,
    Warmed,
)

IDLE_WAIT_S = 0.005


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the model and the pool can take."""

    num_pages: int
    page_bytes: int
    block_tokens: int
    context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]


@dataclass(kw_only=True)
class _InFlight:
    """A submitted step. Of its `decodes`, those in `filling` fill a block; `drawing` are the sequences that it draws a
    token for, in the order of the draws."""

    decodes: tuple[Sequence, ...]
    filling: list[Sequence]
    chunks: tuple[Chunk, ...]
    running: RunningStep
    began_s: float
    drawing: list[Sequence] = field(default_factory=list[Sequence])


class EngineCore:
    """One engine's state. Owned by the engine's thread: every method is called from it."""

    def __init__(
        self,
        *,
        config: SchedulerConfig,
        limits: Limits,
        runner: Runner,
        tiers: AdapterTiers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._limits = limits
        self._runner = runner
        self._runs_ahead = runner.runs_ahead if config.run_ahead is None else config.run_ahead
        self._tiers = tiers
        self._clock = clock
        self._positions = Positions(clock())
        self._scheduler = Scheduler(config=config, block_tokens=limits.block_tokens)
        self._ledger = Ledger(
            num_pages=limits.num_pages,
            page_bytes=limits.page_bytes,
            block_tokens=limits.block_tokens,
            keep_prefixes=config.prefix_cache,
            tiers=tiers,
            policy=GreedyDual(),
            clock=clock,
        )
        self._warms = Warms(self._ledger, limits.num_pages)
        self._shares = Shares()
        self._waiting = WaitingQueue(self._shares)
        self._running = Running()
        self._requests = OpenRequests(
            ledger=self._ledger, shares=self._shares, waiting=self._waiting, running=self._running
        )
        self._in_flight: _InFlight | None = None
        self._num_added = 0
        self._counters: Counter[str] = Counter()

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, GenerationExists, QueueFull or DeadlineExceeded, and then nothing has
        changed."""
        self._validate(request)
        if request.request_id in self._requests:
            raise GenerationExists(f"generation {request.request_id!r} is running")
        num_waiting = self._shares.num_held_back(request.tenant)
        if num_waiting + request.n > self._config.max_waiting:
            raise QueueFull(f"{num_waiting} sequences are waiting; the limit is {self._config.max_waiting}")
        if request.deadline_s is not None:
            latest_s = request.deadline_s - self._least_s(request)
            if latest_s <= self._clock():
                raise _past_deadline(request.deadline_s > self._clock())
            self._requests.deadlines.add(request.request_id, latest_s)
        if request.adapter is not None:
            self._ledger.keep(request.adapter.digest)
        self._requests.add([self._new_sequence(request, sample) for sample in range(request.n)])

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or end its sample number `index`, of which its caller has all, and give back what it holds;
        what has ended is no error."""
        for sequence in self._requests.get(request_id, ()):
            if index is None:
                self._requests.drop(sequence)
            elif sequence.sample == index:
                self._finish(sequence)
        self._want_nothing_for_nobody()
        self._drop_discarded()

    def warm(self, warm: Warm) -> None:
        """Have an adapter brought to host memory or to the device, behind all that is queued and where it takes nothing
        from what runs; `take_warmed` tells what became of it."""
        self._warms.add(warm)

    def cancel_warm(self, warm_id: int) -> None:
        """Nobody waits for it any more; what has ended is no error."""
        self._warms.cancel(warm_id)
        self._want_nothing_for_nobody()
        self._drop_discarded()

    def take_warmed(self) -> tuple[Warmed, ...]:
        """What has become of warms since the last call; nothing of cancelled ones."""
        return self._warms.take_ended()

    def discard(self, digest: str) -> None:
        """Nobody will ask for this adapter version again: its pages and its image in host memory go, now or when the
        last request that uses it has ended. A request for it takes this back."""
        self._ledger.discard(digest)
        self._drop_discarded()

    def has_work(self) -> bool:
        return bool(self._requests or self._warms.waiting) or self._in_flight is not None

    def step(self) -> tuple[TokenDelta, ...]:
        """Submit one step and apply the one before; with nothing to do for either, wait briefly for an adapter."""
        changes = self._ledger.poll()
        self._go_on(changes.loaded)
        self._waiting.note_reads(changes.reading)
        self._warms.end_hopeless(changes.failed, self._clock())
        refused = self._fail_overdue() + self._fail_unloadable(changes.failed)
        plan = self._scheduler.decide(self._view())
        refused += self._reject(plan)
        submitted = self._submit(plan)
        self._warms.end_arrived()
        before, self._in_flight = self._in_flight, submitted
        deltas = self._apply(before)
        self._draw(submitted)
        if not self._runs_ahead:
            deltas += self._apply(submitted)
            self._in_flight = None
        self._drop_discarded()
        if not (refused or submitted or before) and self.has_work():
            self._tiers.wait(IDLE_WAIT_S)
        return refused + deltas + self._positions.tell(self._waiting, self._clock())

    def status(self) -> EngineStatus:
        return EngineStatus(
            pool=self.pool,
            running=self.num_running,
            waiting=self.num_waiting,
            pins=self._ledger.num_pins,
            adapters=self._ledger.adapters(),
            counters=EngineCounters(**self._counters),
        )

    def tier_of(self, digest: str) -> Tier:
        """The highest tier that holds an adapter version whole, as a request that comes now finds it."""
        if self._ledger.is_loaded(digest):
            return Tier.DEVICE
        return Tier.DISK if self._ledger.num_pages(digest) is None else Tier.HOST

    @property
    def pool(self) -> PoolStats:
        return self._ledger.pool_stats()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued."""
        return len(self._requests.sequences) - len(self._running)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant, within a part or between parts."""
        self._ledger.check(self._running)
        self._requests.check()
        self._warms.check()
        self._waiting.check(self._ledger.resident())

    def close(self) -> None:
        self._tiers.close()

    def _validate(self, request: EngineRequest) -> None:
        """Front ends have asked the same; here it keeps what cannot run from the scheduler, whoever sends it."""
        limits = self._limits
        pool_tokens = limits.num_pages * limits.block_tokens
        tokens = TokenLimits(
            vocab_size=limits.vocab_size, context_tokens=limits.context_tokens, pool_tokens=pool_tokens
        )
        if request.n < 1:
            raise InvalidRequest("n", f"{request.n} is below 1")
        check_tokens(request.token_ids, request.max_tokens, tokens)
        check_named_tokens(request, limits.vocab_size, limits.eos_token_ids)

    def _new_sequence(self, request: EngineRequest, sample: int) -> Sequence:
        self._num_added += 1
        ends = request.stop_token_ids if request.ignore_eos else (*request.stop_token_ids, *self._limits.eos_token_ids)
        return Sequence(
            sequence_id=f"{request.request_id}/{sample}",
            # The prompt is the first sample's to score.
            request=request if sample == 0 else replace(request, prompt_logprobs=None),
            sample=sample,
            order=(request.priority, self._num_added),
            share=self._shares.open(request.tenant, request.weight),
            token_ids=list(request.token_ids),
            ends=frozenset(ends),
            keys=self._ledger.block_keys(request),
        )

    def _view(self) -> View:
        return View(
            running=self._running,
            waiting=self._waiting,
            num_pages=self._limits.num_pages,
            free_pages=self._ledger.num_free,
            resources=self._ledger,
            pages_at_once=self._ledger.pages_at_once,
            warms=self._warms.waiting,
        )

    # Effects before the forward.

    def _fail_overdue(self) -> tuple[TokenDelta, ...]:
        """End the requests whose deadline has passed, so that they make no further step, and those that have not begun
        and could not meet it any more."""
        now_s = self._clock()
        deltas: list[TokenDelta] = []
        for request_id in self._requests.deadlines.passed(now_s):
            first = self._requests[request_id][0]
            deadline_s = first.request.deadline_s
            assert deadline_s is not None, "a request without a deadline has passed it"
            has_begun = first.charged or first.sample > 0
            if deadline_s > now_s and has_begun:
                self._requests.deadlines.add(request_id, deadline_s)
            else:
                deltas.append(self._fail(first, _past_deadline(deadline_s > now_s)))
        return tuple(deltas)

    def _least_s(self, request: EngineRequest) -> float:
        """What a request takes at least, as far as it is known: its prompt, and the tokens that must come."""
        num_steps = request.min_tokens
        if request.ignore_eos and not request.stop_token_ids:
            num_steps = request.max_tokens
        num_cached = self._ledger.num_cached_tokens(request)
        return self._ledger.costs.least_s(len(request.token_ids) - num_cached, num_steps)

    def _fail_unloadable(self, failures: Mapping[str, LorasrvError]) -> tuple[TokenDelta, ...]:
        """End the queued requests whose adapter could not be read."""
        ended = {
            sequence.request_id: (sequence, error)
            for digest, error in failures.items()
            for sequence in self._waiting.for_digest(digest)
        }
        return tuple(self._fail(sequence, error) for sequence, error in ended.values())

    def _reject(self, plan: Plan) -> tuple[TokenDelta, ...]:
        rejected = {each.sequence.request_id: each.failure for each in plan.reject}
        for request_id in rejected:
            for sequence in self._requests[request_id]:
                self._requests.drop(sequence)
        return tuple(TokenDelta(request_id=request_id, failure=failure) for request_id, failure in rejected.items())

    def _submit(self, plan: Plan) -> _InFlight | None:
        """Carry the plan out: pages change hands, adapters begin to be copied, the forward is submitted."""
        for sequence in plan.preempt:
            self._preempt(sequence)
        self._evict(plan.evict)
        self._ledger.want(plan.want)
        for digest in plan.load:
            self._ledger.load(digest)
            self._waiting.move(digest, away=False)
            self._counters["adapter_loads"] += 1
        copies = tuple(copy for admission in plan.admit if (copy := self._admit(admission)) is not None)
        for sequence in plan.grow:
            self._ledger.grow(sequence, sequence.num_computed + 1)
        inputs = (*self._decode_inputs(plan.decodes), *self._chunk_inputs(plan.chunks))
        for admission in plan.admit:
            self._running.sort_in(admission.sequence)
        if not inputs:
            assert not copies, "a copy without a step"
            return None
        self._ledger.step += 1
        began_s = self._clock()
        return _InFlight(
            decodes=plan.decodes,
            filling=[sequence for sequence in plan.decodes if sequence.num_computed == sequence.num_covered],
            chunks=plan.chunks,
            running=self._runner.forward(inputs, copies),
            began_s=began_s,
        )

    def _preempt(self, sequence: Sequence) -> None:
        self._requests.preempt(sequence)
        self._counters["preemptions"] += 1

    def _evict(self, victims: tuple[Candidate, ...]) -> None:
        self._ledger.evict(victims)
        for victim in victims:
            if isinstance(victim, IdleAdapter):
                self._waiting.move(victim.digest, away=True)
                self._counters["adapter_evictions"] += 1

    def _admit(self, admission: Admission) -> PageCopy | None:
        sequence = admission.sequence
        sequence.share.served += sequence.admission_cost
        sequence.charged = True
        self._waiting.remove(sequence)
        copy = self._ledger.admit(sequence, admission)
        self._running.add(sequence)
        self._counters["cached_prompt_tokens"] += min(sequence.num_computed, sequence.num_prompt)
        return copy

    def _decode_inputs(self, decodes: tuple[Sequence, ...]) -> list[ChunkInput]:
        inputs = decode_inputs(decodes)
        for sequence in decodes:
            if sequence.num_computed < sequence.num_prompt:
                self._counters["prompt_tokens"] += 1
            sequence.num_computed += 1
        return inputs

    def _chunk_inputs(self, chunks: tuple[Chunk, ...]) -> list[ChunkInput]:
        inputs: list[ChunkInput] = []
        for sequence, start, num_tokens in chunks:
            end = start + num_tokens
            if start < sequence.num_prompt:
                self._counters["prompt_tokens"] += min(end, sequence.num_prompt) - start
            sequence.num_computed = end
            score = score_input(sequence, start, end)
            token_ids = tuple(sequence.token_ids[start:end])
            inputs.append(ChunkInput(token_ids, start, sequence.block_table, sequence.adapter, score))
        return inputs

    def _go_on(self, loaded: tuple[str, ...]) -> None:
        """The weights of these adapters have arrived."""
        if loaded:
            for sequence in self._running:
                if sequence.held_up and sequence.digest in loaded:
                    sequence.held_up = False
                    self._running.sort_in(sequence)

    # Effects after the step before.

    def _draw(self, step: _InFlight | None) -> None:
        """Submit the drawing of the tokens behind the last known ones, for the sequences that go on."""
        if step is None:
            return
        draws: list[Draw] = []
        drawing, eos_token_ids = step.drawing, self._limits.eos_token_ids
        for number, sequence in enumerate(step.decodes):
            if not sequence.ended:
                sequence.drawn = len(draws)
                draws.append(draw_behind(number, sequence, eos_token_ids))
                drawing.append(sequence)
                if sequence.num_computed + 1 == sequence.max_tokens_total:
                    self._running.sort_in(sequence)
        for number, (sequence, start, num_tokens) in enumerate(step.chunks, len(step.decodes)):
            if sequence.ended:
                continue
            if start + num_tokens == len(sequence.token_ids):
                sequence.drawn = len(draws)
                draws.append(draw_behind(number, sequence, eos_token_ids))
                drawing.append(sequence)
            self._running.sort_in(sequence)
        step.running.draw(tuple(draws))

    def _apply(self, step: _InFlight | None) -> tuple[TokenDelta, ...]:
        """Wait for a step, advance its sequences and end those that are done."""
        if step is None:
            return ()
        output = step.running.output()
        num_rows = len(step.decodes) + len(step.chunks)
        num_tokens = len(step.decodes) + sum([chunk.num_tokens for chunk in step.chunks])
        self._ledger.costs.step_ended(num_rows, num_tokens, step.began_s, self._clock())
        self._ledger.completed += 1
        self._counters["steps"] += 1
        self._share_full_blocks(step)
        scored = self._take_scores(step, output) if output.prompt_logprobs else {}
        deltas = self._take_tokens(step, output, scored)
        for sequence, scores in scored.items():
            if not sequence.ended:
                deltas.append(TokenDelta(sequence.request_id, prompt_logprobs=scores))
        return tuple(deltas)

    def _share_full_blocks(self, step: _InFlight) -> None:
        """What a preempted sequence had is shared or gone already."""
        for sequence in step.filling:
            if sequence.running:
                self._ledger.share_full_blocks(sequence, len(sequence.token_ids))
        for sequence, start, num_tokens in step.chunks:
            if sequence.running:
                self._ledger.share_full_blocks(sequence, start + num_tokens)

    def _take_scores(self, step: _InFlight, output: StepOutput) -> dict[Sequence, tuple[PositionLogprobs, ...]]:
        """The log-probabilities of prompts, by the sequences that are still owed them."""
        scored: dict[Sequence, tuple[PositionLogprobs, ...]] = {}
        for number, scores in output.prompt_logprobs.items():
            sequence = step.chunks[number - len(step.decodes)].sequence
            if scores and not sequence.ended:
                sequence.num_scored += len(scores)
                scored[sequence] = scores
        return scored

    def _take_tokens(
        self, step: _InFlight, output: StepOutput, scored: dict[Sequence, tuple[PositionLogprobs, ...]]
    ) -> list[TokenDelta]:
        """Give the drawn tokens to the sequences that go on, and end those whose last one it was. What their prompts
        `scored` is told with them, and taken out."""
        deltas: list[TokenDelta] = []
        num_drawn, logprobs, any_held_back = 0, output.logprobs, self._requests.holds_back
        for place, (sequence, token_id) in enumerate(zip(step.drawing, output.tokens, strict=True)):
            if sequence.ended:
                continue
            sequence.drawn = None
            prompt_logprobs = scored.pop(sequence, ()) if scored else ()
            if token_id is None:
                # Its KV may be to blame: no later request is to find it cached.
                error = InternalError("the model's output is not finite")
                deltas.append(self._fail(sequence, error, forget=True))
                continue
            num_drawn += 1
            token_ids, share = sequence.token_ids, sequence.share
            token_ids.append(token_id)
            share.served += OUTPUT_COST / share.weight
            finish = None
            if any_held_back:
                self._requests.queue_followers(sequence, sequence)
            if token_id in sequence.ends or len(token_ids) == sequence.max_tokens_total:
                finish = self._end(sequence)
            told = (logprobs[place],) if logprobs and place in logprobs else ()
            deltas.append(token_delta(sequence, token_id, told, prompt_logprobs, finish))
        self._counters["completion_tokens"] += num_drawn
        return deltas

    def _end(self, sequence: Sequence) -> FinishReason | None:
        """A sequence has its last token."""
        finish = finish_reason(sequence, self._limits.eos_token_ids)
        self._finish(sequence)
        return finish

    def _finish(self, sequence: Sequence) -> None:
        """A sequence's caller has all of it."""
        self._requests.drop(sequence)
        self._counters["finished_requests"] += sequence.request_id not in self._requests

    def _fail(self, sequence: Sequence, error: LorasrvError, *, forget: bool = False) -> TokenDelta:
        """End a sequence's request, all its samples."""
        for each in self._requests[sequence.request_id]:
            self._requests.drop(each, forget=forget)
        failure = Failure(reason=error.reason, message=str(error))
        return TokenDelta(request_id=sequence.request_id, failure=failure)

    def _drop_discarded(self) -> None:
        if self._ledger.has_discarded:
            used = {sequence.digest for sequence in self._requests.sequences if sequence.digest is not None}
            self._ledger.drop_discarded(used | {warm.digest for warm in self._warms.waiting})

    def _want_nothing_for_nobody(self) -> None:
        """Where no step may follow to say so."""
        if not (self._waiting or self._warms.waiting):
            self._ledger.want(())


def _past_deadline(too_soon: bool) -> DeadlineExceeded:
    return DeadlineExceeded("the call's deadline cannot be met" if too_soon else "the call's deadline has passed")
