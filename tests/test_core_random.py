"""The engine under 10,000 random steps: equal to a brute-force reference, nothing lost, nobody served another's KV."""

import codecs
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from core_rig import NUM_PAGES, make_core, make_request
from fakes import EOS, VOCAB, expected_scores, expected_tokens
from lorasrv.engine.core import EngineCore
from lorasrv.engine.output import OutputStream
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.errors import DeadlineExceeded
from lorasrv.types import AdapterUse, EngineRequest, FinishReason, Priority, Tier, TokenDelta, Warm, Warmed

MAX_PROMPT = 30
MAX_TOKENS = 20
FETCH_STEPS = 10
HOWS = ("cancelled", "finished", "failed", "stopped", "samples", "overdue", "told")
WARM_HOWS = ("warm", "warm-host", "warm-cancelled", "warm-failed", "warm-overdue")
TENANTS = ("acme", "umbrella")
SHARED_PREFIXES = ((), (), tuple(range(1, 14)), tuple(range(1, 9)))
STOPS = (("€",), ("ab", "é"), ("a€", "bca"), ("😀", "cd"))

# Half of a character here and there: € is three tokens, é two, 😀 four.
BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in "€é😀".encode()}
WORDS = ["a", "b", "c", "d", "e", "ab", "bc", "ca", "cd", "a€", "éb", "abc", "€€", "dd", "ee"]
PIECES = ["</s>", *BYTES, *WORDS, *(f"w{index}" for index in range(VOCAB - 1 - len(BYTES) - len(WORDS)))]


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(PIECES)}, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@dataclass(frozen=True)
class Result:
    text: str
    token_ids: list[int]
    finish: FinishReason


def expected_result(request: EngineRequest, stop: Sequence[str], sample: int) -> Result:
    """All tokens at once, their bytes to text, and the text cut at the stop string that is complete first."""
    digest = request.adapter.digest if request.adapter else None
    ends = {*request.stop_token_ids, *(() if request.ignore_eos else (EOS,))}
    tokens = expected_tokens(
        request.token_ids, digest, request.max_tokens, ends=ends, min_tokens=request.min_tokens, sample=sample
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held, free = "", ""
    for count, token_id in enumerate(tokens, 1):
        if token_id in ends:
            break
        piece = PIECES[token_id]
        text = "" if token_id == EOS else decoder.decode(BYTES.get(piece, piece.encode()))
        if count <= request.min_tokens:
            held += text
            continue
        free += text
        cuts = [(at + len(each), at) for each in stop if (at := free.find(each)) >= 0]
        if cuts:
            return Result(held + free[: min(cuts)[1]], tokens[:count], FinishReason.STOP)
    free += decoder.decode(b"", final=True)
    finish = FinishReason.LENGTH
    if tokens[-1] in ends:
        finish = FinishReason.EOS if tokens[-1] == EOS else FinishReason.STOP
    return Result(held + free, tokens, finish)


@dataclass
class Live:
    """A request that runs, and what its samples have got."""

    request: EngineRequest
    stop: tuple[str, ...]
    late_after: float
    outputs: dict[int, OutputStream]
    texts: dict[int, str] = field(default_factory=dict[int, str])
    tokens: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    scores: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])


class Traffic:
    """Random arrivals, warms, cancels and discards, and what became of them. Half of the prompts begin like others."""

    def __init__(self, core: EngineCore, digests: list[str], random: Random) -> None:
        self.core = core
        self.digests = digests
        self.random = random
        self.vocabulary = Vocabulary(make_tokenizer())
        self.live: dict[str, Live] = {}
        self.warms: dict[int, Warm] = {}
        self.discarded: set[int] = set()
        self.ends: Counter[str] = Counter()
        self.count = 0
        self.users: dict[bytes, tuple[str, AdapterUse | None]] = {}
        self.step = 0

    def arrive(self) -> None:
        random = self.random
        shared = random.choice(SHARED_PREFIXES)
        prompt = shared + tuple(random.randrange(1, VOCAB) for _ in range(random.randint(1, MAX_PROMPT - len(shared))))
        max_tokens = random.randint(1, MAX_TOKENS)
        digest = random.choice([None, *self.digests])
        request = replace(
            make_request(f"r{self.count}", prompt, digest, max_tokens, tenant=random.choice(TENANTS)),
            stop_token_ids=random.choice(((), (17, 18, 19))),
            min_tokens=random.choice((0, random.randint(0, max_tokens))),
            ignore_eos=random.random() < 0.3,
            prompt_logprobs=random.choice((None, 0)),
            n=random.choice((1, 1, 1, 2, 4)),
            priority=random.choice((Priority.NORMAL, Priority.NORMAL, Priority.BATCH)),
            deadline_s=random.choice((None, None, self.step + random.randint(1, random.choice((10, 200))))),
        )
        self.count += 1
        try:
            self.core.add(request)
        except DeadlineExceeded:
            assert self.is_hopeless(request)
            self.ends["refused"] += 1
            return
        # The oldest sequence is admitted once the ones that run have ended, and is never preempted: with T tokens at
        # most each and reads of D steps, one with k older ones ends within (k + 1) * (2 T + D) steps. What gives way to
        # others has no such bound.
        num_sequences = sum(live.request.n for live in self.live.values()) + request.n
        bound = num_sequences * (2 * (MAX_PROMPT + MAX_TOKENS) + FETCH_STEPS)
        stop = random.choice(((), random.choice(STOPS)))
        self.live[request.request_id] = Live(
            request=request,
            stop=stop,
            late_after=self.step + bound if request.priority is Priority.NORMAL else math.inf,
            outputs={index: OutputStream(self.vocabulary, request, stop) for index in range(request.n)},
        )

    def cancel(self) -> None:
        if self.live:
            request_id = self.random.choice(list(self.live))
            self.core.cancel(request_id)
            self.end(request_id, "cancelled")

    def warm(self) -> None:
        self.count += 1
        self.warms[self.count] = warm = Warm(
            warm_id=self.count,
            digest=self.random.choice(self.digests),
            tier=self.random.choice((Tier.HOST, Tier.DEVICE)),
            deadline_s=self.step + self.random.choice((1, 5, 100)),
        )
        self.core.warm(warm)

    def cancel_warm(self) -> None:
        if self.warms:
            warm_id = self.random.choice(list(self.warms))
            del self.warms[warm_id]
            self.core.cancel_warm(warm_id)
            self.ends["warm-cancelled"] += 1

    def discard(self) -> None:
        digest = self.random.choice(self.digests)
        self.core.discard(digest)
        self.discarded |= {warm_id for warm_id, warm in self.warms.items() if warm.digest == digest}

    def take_warmed(self, warmed: Warmed) -> None:
        """Who is told of a tier finds the adapter there, unless it was discarded meanwhile."""
        warm = self.warms.pop(warmed.warm_id)
        if warmed.failure is not None:
            overdue = warmed.failure.reason == "DEADLINE_EXCEEDED"
            assert (warm.deadline_s == self.step) if overdue else warmed.failure.reason == "ADAPTER_LOAD_FAILED"
            self.ends["warm-overdue" if overdue else "warm-failed"] += 1
            return
        tiers = {adapter.digest: adapter.tier for adapter in self.core.status().adapters}
        there = {Tier.HOST: {Tier.HOST, Tier.COPYING}, Tier.DEVICE: {Tier.DEVICE}}[warmed.tier or Tier.DEVICE]
        assert tiers.get(warm.digest) in there or warm.warm_id in self.discarded
        assert warmed.tier in (warm.tier, Tier.DEVICE)
        self.ends["warm" if warm.tier is Tier.DEVICE else "warm-host"] += 1

    def take(self, delta: TokenDelta) -> None:
        live = self.live[delta.request_id]
        if delta.failure is not None:
            if delta.failure.reason == "DEADLINE_EXCEEDED":
                self.take_overdue(live)
                self.end(delta.request_id, "overdue")
                return
            assert delta.failure.reason == "ADAPTER_LOAD_FAILED"
            self.end(delta.request_id, "failed")
            return
        if delta.queue_position is not None:
            assert not live.outputs[0].num_tokens and not live.scores and delta.queue_position < len(self.live) * 4
            self.ends["told"] += 1
            return
        piece = live.outputs[delta.sample].take(delta)
        live.texts[delta.sample] = live.texts.get(delta.sample, "") + piece.text
        live.tokens.setdefault(delta.sample, []).extend(piece.token_ids)
        live.scores += [(each.token_id, each.logprob) for each in delta.prompt_logprobs]
        if piece.finish is None:
            return
        if delta.finish is None:
            self.core.cancel(delta.request_id, delta.sample)
            self.ends["stopped"] += 1
        got = Result(live.texts[delta.sample], live.tokens[delta.sample], piece.finish)
        assert got == expected_result(live.request, live.stop, delta.sample)
        del live.outputs[delta.sample]
        if not live.outputs:
            digest = live.request.adapter.digest if live.request.adapter else None
            wanted = [] if live.request.prompt_logprobs is None else expected_scores(live.request.token_ids, digest)
            assert live.scores == wanted
            self.end(delta.request_id, "finished")

    def take_overdue(self, live: Live) -> None:
        """Before its deadline only what has not begun and must take longer than is left; a step takes a second."""
        if live.request.deadline_s != self.step:
            assert not live.tokens and self.is_hopeless(live.request)
            self.ends["hopeless"] += 1

    def is_hopeless(self, request: EngineRequest) -> bool:
        """Whether so many tokens as it must give take longer than is left, at a step each."""
        num_steps = request.max_tokens if request.ignore_eos and not request.stop_token_ids else request.min_tokens
        return request.deadline_s is not None and 0 < request.deadline_s - self.step <= num_steps

    def end(self, request_id: str, how: str) -> None:
        self.ends[how] += 1
        self.ends["samples"] += self.live.pop(request_id).request.n > 1

    def check(self) -> None:
        """Every block that a sequence shares is named by what it asked for itself, and no name is two tenants' or two
        adapters'."""
        late = [request_id for request_id, live in self.live.items() if live.late_after < self.step]
        assert not late, f"past their bound at step {self.step}: {late}"
        prefix = self.core._ledger._prefix
        for sequence in self.core._running:
            keys = sequence.keys.first(sequence.num_keyed_blocks, sequence.token_ids)
            user = (sequence.request.tenant, sequence.request.adapter)
            for page, key in zip(sequence.block_table, keys, strict=False):
                assert self.users.setdefault(key, user) == user, "one name for two users"
                assert page not in prefix or prefix._blocks[page].key == key, "a block of another name"


@pytest.mark.parametrize(
    ("seed", "run_ahead", "prefix_cache", "pages_at_once"),
    [(1, False, True, 0), (2, True, True, 0), (3, True, True, 0), (4, True, False, 0), (5, False, True, 9)],
)
def test_ten_thousand_random_steps(seed: int, run_ahead: bool, prefix_cache: bool, pages_at_once: int) -> None:
    random = Random(seed)
    sizes = {f"a{index}": random.randint(2, 8) for index in range(60)}
    delays = Random(seed) if run_ahead else None
    steps = [0]  # one takes a second
    core, runner = make_core(
        sizes,
        seed=seed,
        failing=0.05,
        delays=delays,
        pages_at_once=pages_at_once,
        clock=lambda: steps[0],
        run_ahead=run_ahead,
        prefix_cache=prefix_cache,
    )
    traffic = Traffic(core, list(sizes), random)
    for step in range(10_000):
        steps[0] = traffic.step = step
        if random.random() < 0.2 and len(traffic.live) < 25:
            traffic.arrive()
        if random.random() < 0.02:
            traffic.cancel()
        if random.random() < 0.01:
            traffic.discard()
        if random.random() < 0.15:
            traffic.warm()
        if random.random() < 0.02:
            traffic.cancel_warm()
        for delta in core.step():
            traffic.take(delta)
        for warmed in core.take_warmed():
            traffic.take_warmed(warmed)
        core.check()
        traffic.check()
    for request_id in list(traffic.live):
        core.cancel(request_id)
    for warm_id in traffic.warms:
        core.cancel_warm(warm_id)
    while core.has_work():
        assert not core.step()
    core.check()
    status = core.status()
    assert (status.running, status.waiting, status.pins, status.pool.sequences) == (0, 0, 0, 0)
    assert status.pool.free + status.pool.adapters + status.pool.prefix == NUM_PAGES
    assert status.counters.cached_prompt_tokens > (1000 if prefix_cache else 0)
    assert status.counters.steps == runner.num_forwards
    assert min(traffic.ends[how] for how in (*HOWS, *WARM_HOWS)) > 20
    # One at a time, steps take no time: nothing is hopeless.
    assert bool(traffic.ends["refused"]) == run_ahead
    assert min(status.counters.adapter_evictions, status.counters.preemptions) > 20
    assert len(runner.tiers.discarded) > 50


def test_a_copy_that_does_not_wait_for_the_steps_is_noticed() -> None:
    random = Random(2)
    sizes = {f"a{index}": random.randint(2, 8) for index in range(60)}
    core, runner = make_core(sizes, seed=2, delays=Random(2), run_ahead=True)
    runner.tiers.waits_for_steps = False
    traffic = Traffic(core, list(sizes), random)
    with pytest.raises(AssertionError, match="overwritten"):
        for _ in range(1000):
            if random.random() < 0.2 and len(traffic.live) < 25:
                traffic.arrive()
            for delta in core.step():
                traffic.take(delta)
