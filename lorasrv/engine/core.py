"""The engine: requests in, token deltas out, one model forward per step.

    plan = decide(state)  ->  submit(plan)  ->  apply(output of the step before)  ->  draw

While the device runs one step, the next is planned and its forward submitted; the tokens of the step before are learned
then, and what they change (penalties, masks, ends) is known in time for the next draws. So an end is learned one step
late: the surplus row is computed and dropped. Where steps do not run beside the host nothing is kept in flight.

Decisions are `sched.scheduler`'s and pure; effects on pages and pins are `engine.ledger`'s; queues and sequences change
here.
"""

import time
from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lorasrv.config import SchedulerConfig
from lorasrv.engine.admission import TokenLimits, check_tokens
from lorasrv.engine.batch import ChunkInput, Draw, PageCopy, Runner, RunningStep, StepOutput
from lorasrv.engine.deadlines import Deadlines
from lorasrv.engine.ledger import Ledger
from lorasrv.engine.positions import Positions
from lorasrv.engine.sampling import check_named_tokens, finish_reason, sample_input, score_input
from lorasrv.engine.tiers import AdapterTiers
from lorasrv.engine.warming import Warms
from lorasrv.errors import DeadlineExceeded, GenerationExists, InternalError, InvalidRequest, LorasrvError, QueueFull
from lorasrv.memory.eviction import GreedyDual, IdleAdapter, Policy
from lorasrv.sched.plan import Admission, Chunk, Plan
from lorasrv.sched.scheduler import Scheduler, View
from lorasrv.sched.sequence import Sequence
from lorasrv.types import (
    EngineCounters,
    EngineRequest,
    EngineStatus,
    Failure,
    PositionLogprobs,
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
    """A submitted step. `draws` are the numbers of the chunks behind which it draws a token, in order."""

    chunks: tuple[tuple[Sequence, Chunk], ...]
    running: RunningStep
    began_s: float
    draws: tuple[int, ...] = ()


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
        policy: Policy | None = None,
    ) -> None:
        self._config = config
        self._limits = limits
        self._runner = runner
        self._runs_ahead = runner.runs_ahead if config.run_ahead is None else config.run_ahead
        self._tiers = tiers
        self._clock = clock
        self._deadlines = Deadlines()
        self._positions = Positions(clock())
        self._scheduler = Scheduler(config=config, block_tokens=limits.block_tokens)
        self._ledger = Ledger(
            num_pages=limits.num_pages,
            page_bytes=limits.page_bytes,
            block_tokens=limits.block_tokens,
            keep_prefixes=config.prefix_cache,
            tiers=tiers,
            policy=policy or GreedyDual(),
            clock=clock,
        )
        self._warms = Warms(self._ledger, limits.num_pages)
        self._requests: dict[str, list[Sequence]] = {}
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        # Samples that wait for the first one of their request to compute the prompt, by its sequence id.
        self._followers: dict[str, list[Sequence]] = {}
        self._in_flight: _InFlight | None = None
        self._num_added = 0
        self._counters = EngineCounters()

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest, GenerationExists, QueueFull or DeadlineExceeded, and then nothing has
        changed."""
        self._validate(request)
        if request.request_id in self._requests:
            raise GenerationExists(f"generation {request.request_id!r} is running")
        if self.num_waiting + request.n > self._config.max_waiting:
            raise QueueFull(f"{self.num_waiting} sequences are waiting; the limit is {self._config.max_waiting}")
        if request.deadline_s is not None:
            if request.deadline_s <= self._clock():
                raise _past_deadline()
            self._deadlines.add(request.request_id, request.deadline_s)
        if request.adapter is not None:
            self._ledger.keep(request.adapter.digest)
        first, *followers = (self._new_sequence(request, sample) for sample in range(request.n))
        self._requests[request.request_id] = [first, *followers]
        for sequence in (first, *followers):
            self._sequences[sequence.sequence_id] = sequence
        insort(self._waiting, first, key=lambda waiting: waiting.order)
        if followers:
            self._followers[first.sequence_id] = followers

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or its sample number `index`, and give back what it holds; what has ended is no error."""
        for sequence in self._requests.get(request_id, ()):
            if index is None or sequence.sample == index:
                self._drop(sequence)
        self._want_nothing_for_nobody()

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
        return bool(self._sequences or self._warms.waiting) or self._in_flight is not None

    def step(self) -> tuple[TokenDelta, ...]:
        """Submit one step and apply the one before; with nothing to do for either, wait briefly for an adapter."""
        failures = self._ledger.poll()
        self._warms.end_hopeless(failures, self._clock())
        refused = self._fail_overdue() + self._fail_unloadable(failures)
        plan = self._scheduler.decide(self._view())
        refused += self._reject(plan)
        submitted = self._submit(plan)
        self._warms.end_arrived()
        self._drop_discarded()
        before, self._in_flight = self._in_flight, submitted
        deltas = self._apply(before)
        self._draw(submitted)
        if not self._runs_ahead:
            deltas += self._apply(submitted)
            self._in_flight = None
        if not (refused or submitted or before) and self.has_work():
            self._tiers.wait(IDLE_WAIT_S)
        return refused + deltas + self._positions.tell(self._waiting, self._clock())

    def status(self) -> EngineStatus:
        return EngineStatus(
            pool=self._ledger.pool_stats(),
            running=len(self._running),
            waiting=self.num_waiting,
            pins=self._ledger.num_pins,
            adapters=self._ledger.adapters(),
            counters=self._counters,
        )

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued."""
        return len(self._sequences) - len(self._running)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant, within a part or between parts."""
        self._ledger.check(self._running)
        held = [sequence for followers in self._followers.values() for sequence in followers]
        assert not any(sequence.block_table for sequence in (*self._waiting, *held)), "a waiting sequence holds pages"
        known = {id(sequence) for sequence in (*self._waiting, *self._running, *held)}
        assert {id(sequence) for sequence in self._sequences.values()} == known, "a sequence is lost"
        by_request = [sequence for sequences in self._requests.values() for sequence in sequences]
        assert {id(sequence) for sequence in by_request} == known, "a request's samples are lost"
        assert all(self._requests.values()), "a request without samples is kept"
        self._deadlines.check(set(self._requests))
        self._warms.check()
        assert self._followers.keys() <= self._sequences.keys(), "samples wait for one that has ended"
        for queue in (self._waiting, self._running):
            orders = [sequence.order for sequence in queue]
            assert orders == sorted(orders), "a queue is out of order"

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
        return Sequence(
            sequence_id=f"{request.request_id}/{sample}",
            # The prompt is the first sample's to score.
            request=request if sample == 0 else replace(request, prompt_logprobs=None),
            sample=sample,
            order=(request.priority, self._num_added),
            token_ids=list(request.token_ids),
            keys=self._ledger.block_keys(request),
        )

    def _view(self) -> View:
        return View(
            running=self._running,
            waiting=self._waiting,
            num_pages=self._limits.num_pages,
            free_pages=self._ledger.num_free,
            resources=self._ledger,
            warms=self._warms.waiting,
        )

    # Effects before the forward.

    def _fail_overdue(self) -> tuple[TokenDelta, ...]:
        """End the requests whose deadline has passed: what is queued never starts, what runs makes no further step."""
        overdue = self._deadlines.passed(self._clock())
        return tuple(self._fail(self._requests[request_id][0], _past_deadline()) for request_id in overdue)

    def _fail_unloadable(self, failures: Mapping[str, LorasrvError]) -> tuple[TokenDelta, ...]:
        """End the queued requests whose adapter could not be read."""
        self._drop_discarded()
        ended = {sequence.request_id: sequence for sequence in self._waiting if sequence.digest in failures}
        return tuple(self._fail(sequence, failures[sequence.digest or ""]) for sequence in ended.values())

    def _reject(self, plan: Plan) -> tuple[TokenDelta, ...]:
        rejected = {self._sequences[each.sequence_id].request_id: each.failure for each in plan.reject}
        for request_id in rejected:
            self.cancel(request_id)
        return tuple(TokenDelta(request_id=request_id, failure=failure) for request_id, failure in rejected.items())

    def _submit(self, plan: Plan) -> _InFlight | None:
        """Carry the plan out: pages change hands, adapters begin to be copied, the forward is submitted."""
        for sequence_id in plan.preempt:
            self._preempt(self._sequences[sequence_id])
        for victim in plan.evict:
            self._ledger.evict(victim)
            self._count(adapter_evictions=isinstance(victim, IdleAdapter))
        self._ledger.want(plan.want)
        for digest in plan.load:
            self._ledger.load(digest)
            self._count(adapter_loads=1)
        copies = tuple(copy for admission in plan.admit if (copy := self._admit(admission)) is not None)
        if not plan.chunks:
            assert not copies, "a copy without a step"
            return None
        chunks = tuple((self._sequences[chunk.sequence_id], chunk) for chunk in plan.chunks)
        inputs = tuple(self._chunk_input(sequence, chunk) for sequence, chunk in chunks)
        self._ledger.step += 1
        began_s = self._clock()
        return _InFlight(chunks=chunks, running=self._runner.forward(inputs, copies), began_s=began_s)

    def _preempt(self, sequence: Sequence) -> None:
        self._ledger.release(sequence)
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=lambda waiting: waiting.order)
        self._count(preemptions=1)

    def _admit(self, admission: Admission) -> PageCopy | None:
        sequence = self._sequences[admission.sequence_id]
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=lambda running: running.order)
        copy = self._ledger.admit(sequence, admission)
        self._count(cached_prompt_tokens=sequence.num_computed)
        return copy

    def _chunk_input(self, sequence: Sequence, chunk: Chunk) -> ChunkInput:
        end = chunk.start + chunk.num_tokens
        self._ledger.grow(sequence, end)
        sequence.num_computed = end
        return ChunkInput(
            token_ids=tuple(sequence.token_ids[chunk.start : end]),
            start=chunk.start,
            block_table=tuple(sequence.block_table),
            adapter=self._ledger.adapter_input(sequence.request),
            score=score_input(sequence, chunk.start, end),
            drawn=sequence.drawn if chunk.start == len(sequence.token_ids) else None,
        )

    # Effects after the step before.

    def _draw(self, step: _InFlight | None) -> None:
        """Submit the drawing of the tokens behind the last known ones, for the sequences that go on."""
        if step is None:
            return
        draws: list[Draw] = []
        for number, (sequence, chunk) in enumerate(step.chunks):
            if self._is_current(sequence) and chunk.start + chunk.num_tokens == len(sequence.token_ids):
                sequence.drawn = len(draws)
                draws.append(Draw(chunk=number, how=sample_input(sequence, self._limits.eos_token_ids)))
        step.draws = tuple(draw.chunk for draw in draws)
        step.running.draw(tuple(draws))

    def _apply(self, step: _InFlight | None) -> tuple[TokenDelta, ...]:
        """Wait for a step, advance its sequences and end those that are done."""
        if step is None:
            return ()
        output = step.running.output()
        total = sum(chunk.num_tokens for _, chunk in step.chunks)
        self._ledger.costs.step_ended(len(step.chunks), total, step.began_s, self._clock())
        self._ledger.completed += 1
        places = {chunk: place for place, chunk in enumerate(step.draws)}
        deltas: list[TokenDelta] = []
        num_prompt = 0
        for number, (sequence, chunk) in enumerate(step.chunks):
            if not self._is_current(sequence):
                continue
            end = chunk.start + chunk.num_tokens
            if sequence.block_table:
                self._ledger.share_full_blocks(sequence, end)
            num_prompt += max(0, min(end, len(sequence.request.token_ids)) - chunk.start)
            delta = self._advance(sequence, output, number, places.get(number))
            if delta is not None:
                deltas.append(delta)
        num_tokens = sum(len(delta.token_ids) for delta in deltas)
        self._count(steps=1, prompt_tokens=num_prompt, completion_tokens=num_tokens)
        return tuple(deltas)

    def _advance(self, sequence: Sequence, output: StepOutput, number: int, place: int | None) -> TokenDelta | None:
        """What chunk number `number` gave its sequence; `place` is that of its draw."""
        scored = output.prompt_logprobs.get(number, ())
        sequence.num_scored += len(scored)
        if place is None:
            return TokenDelta(request_id=sequence.request_id, prompt_logprobs=scored) if scored else None
        sequence.drawn = None
        delta = self._append(sequence, output.tokens[place], output.logprobs.get(place))
        return replace(delta, prompt_logprobs=scored) if scored else delta

    def _append(self, sequence: Sequence, token_id: int | None, logprobs: PositionLogprobs | None) -> TokenDelta:
        if token_id is None:
            # Its KV may be to blame: no later request is to find it cached.
            return self._fail(sequence, InternalError("the model's output is not finite"), forget=True)
        sequence.token_ids.append(token_id)
        self._queue_followers(sequence, sequence)
        finish = finish_reason(sequence, self._limits.eos_token_ids)
        if finish is not None:
            self._drop(sequence)
            self._count(finished_requests=sequence.request_id not in self._requests)
        return TokenDelta(
            request_id=sequence.request_id,
            index=sequence.sample,
            token_ids=(token_id,),
            logprobs=() if logprobs is None else (logprobs,),
            finish=finish,
        )

    def _fail(self, sequence: Sequence, error: LorasrvError, *, forget: bool = False) -> TokenDelta:
        """End a sequence's request, all its samples."""
        for each in self._requests[sequence.request_id]:
            self._drop(each, forget=forget)
        failure = Failure(reason=error.reason, message=str(error))
        return TokenDelta(request_id=sequence.request_id, failure=failure)

    def _drop(self, sequence: Sequence, *, forget: bool = False) -> None:
        """End a sequence, wherever it is."""
        del self._sequences[sequence.sequence_id]
        siblings = self._requests[sequence.request_id] = [
            each for each in self._requests[sequence.request_id] if each is not sequence
        ]
        if not siblings:
            del self._requests[sequence.request_id]
            self._deadlines.discard(sequence.request_id)
        if sequence in self._running:
            self._ledger.release(sequence, forget=forget)
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
            if forget:
                self._ledger.forget(sequence)
        else:
            self._forget_follower(sequence)
        self._queue_followers(sequence, None)
        self._drop_discarded()

    def _queue_followers(self, first: Sequence, sibling: Sequence | None) -> None:
        """The first sample has computed the prompt, and is the `sibling` to copy from, or it has ended."""
        for sequence in self._followers.pop(first.sequence_id, ()):
            sequence.sibling = sibling
            insort(self._waiting, sequence, key=lambda waiting: waiting.order)

    def _forget_follower(self, sequence: Sequence) -> None:
        for first, followers in self._followers.items():
            if sequence in followers:
                self._followers[first] = [each for each in followers if each is not sequence]

    def _drop_discarded(self) -> None:
        if self._ledger.has_discarded:
            used = {sequence.digest for sequence in self._sequences.values() if sequence.digest is not None}
            self._ledger.drop_discarded(used | {warm.digest for warm in self._warms.waiting})

    def _want_nothing_for_nobody(self) -> None:
        """Where no step may follow to say so."""
        if not (self._waiting or self._warms.waiting):
            self._ledger.want(())

    def _is_current(self, sequence: Sequence) -> bool:
        """Whether the sequence has not ended since the step was submitted."""
        return self._sequences.get(sequence.sequence_id) is sequence

    def _count(self, **increments: int) -> None:
        totals = {name: getattr(self._counters, name) + increment for name, increment in increments.items()}
        self._counters = replace(self._counters, **totals)


def _past_deadline() -> DeadlineExceeded:
    return DeadlineExceeded("the call's deadline has passed")
