"""The engine on a fake model: 10,000 seeded steps, and the rules of a step one by one."""

from dataclasses import replace
from random import Random

import pytest

from fakes import EOS, VOCAB, FakeDevice, FakeRunner, FakeTiers, expected_scores, expected_tokens
from lorasrv.config import SchedulerConfig
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.errors import GenerationExists, InvalidRequest, QueueFull
from lorasrv.types import AdapterUse, EngineRequest, Failure, FinishReason, LogitRules, TokenDelta

BLOCK_TOKENS = 4
NUM_PAGES = 40
MAX_PROMPT = 30
MAX_TOKENS = 20
FETCH_STEPS = 8
SHARED_PREFIXES = ((), (), tuple(range(1, 14)), tuple(range(1, 9)))


def make_core(
    sizes: dict[str, int], *, num_pages: int = NUM_PAGES, seed: int = 0, failing: float = 0.0, **config: int
) -> tuple[EngineCore, FakeRunner]:
    device = FakeDevice(block_tokens=BLOCK_TOKENS)
    tiers = FakeTiers(device, sizes, Random(seed), failing)
    runner = FakeRunner(device, tiers)
    limits = Limits(
        num_pages=num_pages,
        block_tokens=BLOCK_TOKENS,
        context_tokens=200,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
    )
    scheduler = SchedulerConfig(**({"max_step_tokens": 32, "max_running": 8} | config))
    return EngineCore(config=scheduler, limits=limits, runner=runner, tiers=tiers), runner


def make_request(
    request_id: str,
    prompt: tuple[int, ...] = (1, 2, 3),
    digest: str | None = None,
    max_tokens: int = 5,
    *,
    scale: float = 1.0,
    tenant: str = "",
) -> EngineRequest:
    adapter = AdapterUse(digest=digest, scale=scale) if digest else None
    return EngineRequest(
        request_id=request_id, token_ids=prompt, adapter=adapter, max_tokens=max_tokens, seed=0, cache_salt=tenant
    )


def run_all(core: EngineCore, max_steps: int = 1000) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {}
    for _ in range(max_steps):
        if not core.has_work():
            return deltas
        for delta in core.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        core.check()
    raise AssertionError(f"work is left after {max_steps} steps")


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


class Traffic:
    """Random arrivals and cancels, and what became of them. Half of the prompts begin like others."""

    def __init__(self, core: EngineCore, digests: list[str], random: Random) -> None:
        self.core = core
        self.digests = digests
        self.random = random
        self.live: dict[str, EngineRequest] = {}
        self.deadline: dict[str, int] = {}
        self.tokens: dict[str, list[int]] = {}
        self.scores: dict[str, list[tuple[int, float]]] = {}
        self.ends: dict[str, int] = {}
        self.count = 0

    def arrive(self, step: int) -> None:
        digest = self.random.choice([None, *self.digests])
        shared = self.random.choice(SHARED_PREFIXES)
        own = self.random.randint(1, MAX_PROMPT - len(shared))
        prompt = shared + tuple(self.random.randrange(1, VOCAB) for _ in range(own))
        max_tokens = self.random.randint(1, MAX_TOKENS)
        request = replace(
            make_request(f"r{self.count}", prompt, digest, max_tokens),
            stop_token_ids=self.random.choice(((), (7, 8, 9))),
            min_tokens=self.random.choice((0, self.random.randint(0, max_tokens))),
            ignore_eos=self.random.random() < 0.3,
            prompt_logprobs=self.random.choice((None, 0)),
        )
        self.count += 1
        self.core.add(request)
        # The oldest request is admitted once the ones that run have ended, and is never preempted: with T tokens at
        # most each and reads of D steps, a request with k older ones ends within (k + 1) * (2 T + D) steps.
        bound = (len(self.live) + 1) * (2 * (MAX_PROMPT + MAX_TOKENS) + FETCH_STEPS)
        self.live[request.request_id] = request
        self.deadline[request.request_id] = step + bound
        self.tokens[request.request_id] = []
        self.scores[request.request_id] = []

    def cancel(self) -> None:
        if self.live:
            request_id = self.random.choice(list(self.live))
            self.core.cancel(request_id)
            self.end(request_id, "cancelled")

    def take(self, delta: TokenDelta) -> None:
        request = self.live[delta.request_id]
        self.tokens[delta.request_id] += delta.token_ids
        self.scores[delta.request_id] += [(each.token_id, each.logprob) for each in delta.prompt_logprobs]
        if delta.failure is not None:
            assert delta.failure.reason == "ADAPTER_LOAD_FAILED"
            self.end(delta.request_id, "failed")
        elif delta.finish is not None:
            self.check_result(request, delta.finish)
            self.end(delta.request_id, "finished")

    def check_result(self, request: EngineRequest, finish: FinishReason) -> None:
        digest = request.adapter.digest if request.adapter else None
        ends = {*request.stop_token_ids, *(() if request.ignore_eos else (EOS,))}
        expected = expected_tokens(
            request.token_ids, digest, request.max_tokens, ends=ends, min_tokens=request.min_tokens
        )
        assert self.tokens[request.request_id] == expected
        reason = FinishReason.LENGTH
        if expected[-1] in ends:
            reason = FinishReason.EOS if expected[-1] == EOS else FinishReason.STOP
        assert finish == reason
        wanted = [] if request.prompt_logprobs is None else expected_scores(request.token_ids, digest)
        assert self.scores[request.request_id] == wanted

    def end(self, request_id: str, how: str) -> None:
        del self.live[request_id]
        self.ends[how] = self.ends.get(how, 0) + 1


@pytest.mark.parametrize("seed", [1, 2])
def test_ten_thousand_random_steps(seed: int) -> None:
    random = Random(seed)
    sizes = {f"a{index}": random.randint(2, 8) for index in range(60)}
    core, runner = make_core(sizes, seed=seed, failing=0.02)
    traffic = Traffic(core, list(sizes), random)
    for step in range(10_000):
        if random.random() < 0.25 and len(traffic.live) < 30:
            traffic.arrive(step)
        if random.random() < 0.02:
            traffic.cancel()
        for delta in core.step():
            traffic.take(delta)
        core.check()
        late = [request_id for request_id in traffic.live if traffic.deadline[request_id] < step]
        assert not late, f"past their bound at step {step}: {late}"
    for request_id in list(traffic.live):
        core.cancel(request_id)
    core.check()
    status = core.status()
    assert (status.running, status.waiting, status.pins, status.pool.sequences) == (0, 0, 0, 0)
    assert status.pool.free + status.pool.adapters + status.pool.prefix == NUM_PAGES
    assert status.counters.cached_prompt_tokens > 1000
    assert status.counters.steps == runner.num_forwards
    assert min(traffic.ends[how] for how in ("cancelled", "finished", "failed")) > 20
    assert min(status.counters.adapter_evictions, status.counters.preemptions) > 20


def test_one_forward_serves_all_adapters() -> None:
    sizes = {f"a{index}": 1 for index in range(8)}
    core, runner = make_core(sizes, max_loads_per_step=8)
    for index, digest in enumerate(sizes):
        core.add(make_request(f"r{index}", (index + 1,), digest, 3))
    run_all(core)
    assert core.status().counters.steps == runner.num_forwards


def test_decodes_go_before_prefill() -> None:
    core, _ = make_core({}, max_step_tokens=8, max_running=4)
    core.add(make_request("short", (1,), None, 12))
    first = core.step()
    assert [delta.request_id for delta in first] == ["short"]
    core.add(make_request("long", tuple([3] * 60), None, 1))
    finished: list[list[str]] = []
    while core.has_work():
        finished.append([delta.request_id for delta in core.step()])
    expected = expected_tokens((1,), None, 12)
    assert sum("short" in ids for ids in finished) == len(expected) - 1
    assert all("short" in ids for ids in finished[: len(expected) - 1]), "a long prompt stalled a running stream"


def test_preempted_requests_give_the_same_tokens() -> None:
    core, _ = make_core({}, num_pages=12)
    requests = [make_request(f"r{index}", (index + 1, 7, 9, 11), None, 30) for index in range(4)]
    for request in requests:
        core.add(request)
    deltas = run_all(core)
    assert core.status().counters.preemptions > 0
    for request in requests:
        assert tokens_of(deltas[request.request_id]) == expected_tokens(request.token_ids, None, 30)


def test_cold_adapter_does_not_hold_up_others() -> None:
    core, runner = make_core({"cold": 2})
    runner.tiers._reading["cold"] = 50
    core.add(make_request("cold", digest="cold", max_tokens=1))
    core.add(make_request("base", max_tokens=1))
    ended = [delta.request_id for _ in range(5) for delta in core.step()]
    assert ended == ["base"]
    assert "cold" in run_all(core)


def test_failed_adapter_fails_its_own_requests_once() -> None:
    core, runner = make_core({"bad": 1, "good": 1}, failing=1.0)
    core.add(make_request("r", digest="bad"))
    core.add(make_request("neighbour"))
    deltas = run_all(core)
    assert deltas["r"][-1].failure == Failure(reason="ADAPTER_LOAD_FAILED", message="adapter bad could not be read")
    assert tokens_of(deltas["neighbour"]) == expected_tokens((1, 2, 3), None, 5)
    runner.tiers.failing = 0.0
    core.add(make_request("again", digest="bad"))
    assert tokens_of(run_all(core)["again"]) == expected_tokens((1, 2, 3), "bad", 5)


def test_adapter_that_can_never_fit_is_rejected() -> None:
    core, _ = make_core({"big": NUM_PAGES, "small": 1})
    core.add(make_request("r", digest="big"))
    core.add(make_request("neighbour", digest="small"))
    deltas = run_all(core)
    failure = deltas["r"][-1].failure
    assert failure is not None and failure.reason == "RESOURCE_EXHAUSTED" and str(NUM_PAGES) in failure.message
    assert tokens_of(deltas["neighbour"]) == expected_tokens((1, 2, 3), "small", 5)


def test_prompt_logprobs_are_told_once_whatever_is_preempted() -> None:
    core, _ = make_core({}, num_pages=12, max_step_tokens=9)
    requests = [replace(make_request(f"r{i}", tuple(range(1, 12 + i)), None, 20), prompt_logprobs=0) for i in range(4)]
    for request in requests:
        core.add(request)
    deltas = run_all(core)
    assert core.status().counters.preemptions > 0
    for request in requests:
        scores = [(each.token_id, each.logprob) for d in deltas[request.request_id] for each in d.prompt_logprobs]
        assert scores == expected_scores(request.token_ids, None)


def test_a_cached_prompt_is_computed_again_for_its_logprobs_only() -> None:
    core, _ = make_core({})
    prompt = tuple(range(1, 31))
    for name, num_top, num_cached in (("first", None, 0), ("scored", 0, 0), ("again", None, 28)):
        before = core.status().counters.cached_prompt_tokens
        core.add(replace(make_request(name, prompt), prompt_logprobs=num_top))
        deltas = run_all(core)[name]
        assert core.status().counters.cached_prompt_tokens - before == num_cached
        assert tokens_of(deltas) == expected_tokens(prompt, None, 5)
        scores = [(each.token_id, each.logprob) for delta in deltas for each in delta.prompt_logprobs]
        assert scores == ([] if num_top is None else expected_scores(prompt, None))


def test_what_could_mask_every_token_is_refused() -> None:
    core, _ = make_core({})
    words = tuple((token,) for token in range(1, VOCAB))
    rules = LogitRules(bad_words=words)
    core.add(replace(make_request("fine", max_tokens=3), rules=rules))
    assert tokens_of(run_all(core)["fine"]) == [EOS]
    with pytest.raises(InvalidRequest, match="mask all 50"):
        core.add(replace(make_request("r", max_tokens=3), rules=rules, min_tokens=1))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (make_request("r", ()), "prompt"),
        (make_request("r", (VOCAB,)), "prompt.tokens"),
        (make_request("r", (-1,)), "prompt.tokens"),
        (replace(make_request("r"), stop_token_ids=(VOCAB,)), "stop_token_ids"),
        (replace(make_request("r"), rules=LogitRules(logit_bias=((VOCAB, 1.0),))), "logit_bias"),
        (replace(make_request("r"), rules=LogitRules(bad_words=((1, -1),))), "bad_words"),
        (make_request("r", max_tokens=0), "sampling.max_tokens"),
        (make_request("r", max_tokens=198), "sampling.max_tokens"),
        (make_request("r", max_tokens=NUM_PAGES * BLOCK_TOKENS - 2), "sampling.max_tokens"),
    ],
)
def test_bad_requests_change_nothing(request_: EngineRequest, field: str) -> None:
    core, _ = make_core({})
    with pytest.raises(InvalidRequest) as error:
        core.add(request_)
    assert error.value.field == field
    assert not core.has_work()


def test_duplicate_id_and_full_queue() -> None:
    core, _ = make_core({}, max_waiting=2)
    core.add(make_request("a"))
    with pytest.raises(GenerationExists):
        core.add(make_request("a"))
    core.add(make_request("b"))
    with pytest.raises(QueueFull):
        core.add(make_request("c"))
    core.cancel("nobody")
    assert set(run_all(core)) == {"a", "b"}


def test_small_requests_do_not_starve_a_large_one() -> None:
    core, _ = make_core({}, num_pages=10)
    ended: set[str] = set()
    core.add(make_request("first", (1,), None, 8))
    core.add(make_request("large", tuple([2] * 32), None, 4))
    for step in range(100):
        core.add(make_request(f"small{step}", (3,), None, 8))
        ended |= {delta.request_id for delta in core.step() if delta.finish is not None}
        core.check()
    assert "large" in ended


def test_a_prompt_that_begins_alike_is_computed_from_where_it_differs() -> None:
    core, _ = make_core({})
    prompt = tuple(range(1, 31))
    core.add(make_request("first", prompt))
    run_all(core)
    computed = core.status().counters.prompt_tokens
    core.add(make_request("second", (*prompt[:29], 40, 41)))
    assert tokens_of(run_all(core)["second"]) == expected_tokens((*prompt[:29], 40, 41), None, 5)
    counters = core.status().counters
    assert counters.cached_prompt_tokens == 28
    assert counters.prompt_tokens - computed == 3


def test_a_full_hit_still_computes_its_last_token() -> None:
    core, _ = make_core({})
    for request_id in ("first", "second"):
        core.add(make_request(request_id, tuple(range(1, 9)), None, 1))
        assert tokens_of(run_all(core)[request_id]) == expected_tokens(tuple(range(1, 9)), None, 1)
    assert core.status().counters.cached_prompt_tokens == 4


def test_only_the_same_weights_for_the_same_tenant_hit() -> None:
    core, _ = make_core({"a": 2, "b": 2})
    prompt = tuple(range(1, 20))
    others = [
        make_request("adapter", prompt, "a"),
        make_request("another", prompt, "b"),
        make_request("scaled", prompt, "a", scale=0.5),
        make_request("base", prompt),
        make_request("tenant", prompt, tenant="x"),
        make_request("tenant and adapter", prompt, "a", tenant="x"),
    ]
    for request in others:
        core.add(request)
        run_all(core)
        assert core.status().counters.cached_prompt_tokens == 0, request
    core.add(make_request("again", prompt, "a", scale=0.5))
    run_all(core)
    assert core.status().counters.cached_prompt_tokens == 16


def test_what_was_preempted_goes_on_from_the_cache() -> None:
    core, _ = make_core({}, num_pages=14)
    for index in range(4):
        core.add(make_request(f"r{index}", (index + 1, 7, 9, 11), None, 30))
    run_all(core)
    counters = core.status().counters
    assert counters.preemptions > 0 and counters.cached_prompt_tokens > 0


def test_cached_blocks_make_room_for_adapters_and_back() -> None:
    core, _ = make_core({"big": NUM_PAGES - 4})
    for index in range(12):
        core.add(make_request(f"r{index}", tuple(range(index + 1, index + 17)), None, 4))
    run_all(core)
    assert core.status().pool.prefix > 30
    core.add(make_request("adapter", (1, 2, 3), "big"))
    assert tokens_of(run_all(core)["adapter"]) == expected_tokens((1, 2, 3), "big", 5)
    assert core.status().pool.adapters == NUM_PAGES - 4
    core.add(make_request("long", tuple(range(1, 31)), None, 10))
    run_all(core)
    assert core.status().pool.adapters == 0


def test_without_the_cache_nothing_is_kept() -> None:
    core, _ = make_core({}, prefix_cache=False)
    for request_id in ("first", "second"):
        core.add(make_request(request_id, tuple(range(1, 30))))
        run_all(core)
    assert core.status().pool.free == NUM_PAGES
    assert core.status().counters.cached_prompt_tokens == 0


def test_blocks_behind_logits_that_are_not_finite_are_not_found_again() -> None:
    core, runner = make_core({})
    prompt = tuple(range(1, 20))
    run, runner.run = runner.run, lambda chunks: replace(run(chunks), tokens=(None,))  # type: ignore[method-assign]
    core.add(make_request("poisoned", prompt))
    failure = run_all(core)["poisoned"][-1].failure
    assert failure is not None and failure.reason == "INTERNAL"
    assert core.status().pool.free == NUM_PAGES
    runner.run = run  # type: ignore[method-assign]
    core.add(make_request("again", prompt))
    assert tokens_of(run_all(core)["again"]) == expected_tokens(prompt, None, 5)
    assert core.status().counters.cached_prompt_tokens == 0
