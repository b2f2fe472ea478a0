"""The engine on a fake model: the rules of a step one by one."""

from dataclasses import replace
from random import Random

import pytest

from core_rig import BLOCK_TOKENS, NUM_PAGES, make_core, make_request, run_all, tokens_of
from fakes import EOS, VOCAB, FakeRunner, expected_scores, expected_tokens
from lorasrv.engine.core import EngineCore
from lorasrv.errors import GenerationExists, InvalidRequest, QueueFull
from lorasrv.types import EngineRequest, Failure, LogitRules, TokenDelta


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


@pytest.mark.parametrize(("pages_at_once", "steps"), [(0, 2), (2, 2), (3, 1), (4, 1)])
def test_an_adapter_that_is_copied_at_once_serves_in_the_same_step(pages_at_once: int, steps: int) -> None:
    """So does a neighbour of the same adapter; one whose copy takes longer waits on its own."""
    core, runner = make_core({"a": 3, "b": 3}, pages_at_once=pages_at_once)
    runner.tiers._host |= {"a", "b"}
    runner.tiers.want(["a", "b"])
    for request_id, digest in (("r", "a"), ("neighbour", "a"), ("late", "b"), ("base", None)):
        core.add(make_request(request_id, digest=digest, max_tokens=2))
    told: dict[str, list[int]] = {}
    for step in range(1, 5):
        for delta in core.step():
            told.setdefault(delta.request_id, []).append(step)
        core.check()
    assert told == {"r": [steps, steps + 1], "neighbour": [steps, steps + 1], "late": [2, 3], "base": [1, 2]}


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
    runner.not_finite = True
    core.add(make_request("poisoned", prompt))
    failure = run_all(core)["poisoned"][-1].failure
    assert failure is not None and failure.reason == "INTERNAL"
    assert core.status().pool.free == NUM_PAGES
    runner.not_finite = False
    core.add(make_request("again", prompt))
    assert tokens_of(run_all(core)["again"]) == expected_tokens(prompt, None, 5)
    assert core.status().counters.cached_prompt_tokens == 0


def test_nor_are_those_of_a_sequence_that_was_preempted_meanwhile() -> None:
    def make() -> tuple[EngineCore, FakeRunner]:
        core, runner = make_core({}, num_pages=12, run_ahead=True)
        for index in range(2):
            core.add(replace(make_request(f"r{index}", (index + 1, 7, 9, 11), None, 30), ignore_eos=True))
        return core, runner

    core, _ = make()
    num_steps = 0
    while core.status().counters.preemptions == 0:
        core.step()
        num_steps += 1
    core, runner = make()
    deltas: tuple[TokenDelta, ...] = ()
    for step in range(num_steps):
        runner.not_finite = step == num_steps - 2
        deltas = core.step()
    assert core.status().counters.preemptions == 1 and len(deltas) == 2
    assert all(delta.failure is not None for delta in deltas)
    assert core.status().pool.free == 12
    core.check()


def test_what_is_submitted_ahead_of_an_end_is_dropped() -> None:
    prompt = next(p for first in range(1, VOCAB) if expected_tokens(p := (first, 2, 3), None, 9)[-1] == EOS)
    core, runner = make_core({}, run_ahead=True)
    core.add(make_request("ends", prompt, None, 9))
    core.add(make_request("goes on", (1, 2, 3), None, 9))
    deltas = run_all(core)
    assert tokens_of(deltas["ends"]) == expected_tokens(prompt, None, 9)
    assert tokens_of(deltas["goes on"]) == expected_tokens((1, 2, 3), None, 9)
    assert core.status().counters.steps == runner.num_forwards


def test_nothing_is_submitted_ahead_of_the_last_token() -> None:
    core, runner = make_core({}, run_ahead=True)
    core.add(replace(make_request("r", (1, 2, 3), None, 9), ignore_eos=True))
    assert core.step() == (), "the step's token is learned one step late"
    run_all(core)
    assert runner.num_forwards == 9


def test_a_cancel_while_the_step_runs() -> None:
    core, _ = make_core({}, run_ahead=True)
    core.add(make_request("r"))
    core.add(make_request("neighbour"))
    core.step()
    core.cancel("r")
    core.check()
    core.add(make_request("r", (4, 5, 6)))
    deltas = run_all(core)
    assert tokens_of(deltas["r"]) == expected_tokens((4, 5, 6), None, 5)
    assert tokens_of(deltas["neighbour"]) == expected_tokens((1, 2, 3), None, 5)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 29])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_samples_share_the_prompt(run_ahead: bool, num_prompt: int, prefix_cache: bool) -> None:
    core, _ = make_core({"a": 2}, run_ahead=run_ahead, prefix_cache=prefix_cache)
    prompt = tuple(range(1, num_prompt + 1))
    core.add(replace(make_request("r", prompt, "a", 9), n=4, ignore_eos=True))
    samples: dict[int, list[int]] = {}
    most_pages = 0
    while core.has_work():
        for delta in core.step():
            samples.setdefault(delta.sample, []).extend(delta.token_ids)
        core.check()
        pool = core.status().pool
        most_pages = max(most_pages, pool.sequences + pool.prefix)
    for index in range(4):
        assert samples[index] == expected_tokens(prompt, "a", 9, ends=(), sample=index)
    # The others compute the prompt's last token again, for its logits.
    assert core.status().counters.prompt_tokens == num_prompt + 3
    shared = (num_prompt - 1) // BLOCK_TOKENS
    own = -(-(num_prompt + 9) // BLOCK_TOKENS) - shared
    assert most_pages <= shared + 4 * own
    if not prefix_cache:
        assert core.status().pool.prefix == 0


def test_samples_go_on_without_those_that_ended() -> None:
    for cancelled in range(3):
        for num_steps in range(6):
            core, _ = make_core({}, run_ahead=True)
            core.add(replace(make_request("r", tuple(range(1, 7)), None, 9), n=3, ignore_eos=True))
            samples: dict[int, list[int]] = {index: [] for index in range(3)}
            before = 0
            for step in range(40):
                if step == num_steps:
                    core.cancel("r", cancelled)
                    core.check()
                    before = len(samples[cancelled])
                for delta in core.step():
                    samples[delta.sample] += delta.token_ids
                core.check()
            assert not core.has_work() and len(samples[cancelled]) == before
            for index in {0, 1, 2} - {cancelled}:
                assert samples[index] == expected_tokens(tuple(range(1, 7)), None, 9, ends=(), sample=index)


def test_what_counts_as_finished() -> None:
    """Ended by the engine or by whoever reads the text, but neither dropped nor failed; a request of samples once."""
    core, runner = make_core({}, max_running=8)
    long = replace(make_request("r", max_tokens=50), ignore_eos=True)
    core.add(replace(long, request_id="length", max_tokens=2))
    core.add(replace(long, request_id="stops"))
    core.add(replace(long, request_id="samples", n=3))
    core.add(replace(long, request_id="half", n=2))
    core.add(replace(long, request_id="dropped"))
    for _ in range(3):
        core.step()
    assert core.status().counters.finished_requests == 1
    core.cancel("stops", 0)
    core.cancel("stops", 0)
    assert core.status().counters.finished_requests == 2
    for index in (2, 0, 1):
        assert core.status().counters.finished_requests == 2
        core.cancel("samples", index)
    assert core.status().counters.finished_requests == 3
    core.cancel("half", 1)
    core.cancel("half")
    core.cancel("dropped")
    core.check()
    assert not core.has_work() and core.status().counters.finished_requests == 3
    core.add(long)
    runner.not_finite = True
    run_all(core)
    assert core.status().counters.finished_requests == 3


def test_a_failure_ends_all_samples() -> None:
    core, runner = make_core({"bad": 1}, failing=1.0)
    core.add(replace(make_request("r", digest="bad"), n=3))
    core.add(make_request("neighbour"))
    deltas = run_all(core)
    assert [delta.failure is not None for delta in deltas["r"]] == [True]
    assert tokens_of(deltas["neighbour"]) == expected_tokens((1, 2, 3), None, 5)
    core.add(replace(make_request("again"), n=3))
    core.step()
    core.step()
    runner.not_finite = True
    assert [delta.failure is not None for delta in core.step()] == [True]
    assert not core.has_work() and core.status().pool.free + core.status().pool.prefix == NUM_PAGES


def test_only_the_first_sample_scores_the_prompt() -> None:
    core, _ = make_core({})
    core.add(replace(make_request("r", tuple(range(1, 7))), n=3, prompt_logprobs=0))
    scored = [delta for delta in run_all(core)["r"] if delta.prompt_logprobs]
    assert {delta.sample for delta in scored} == {0}
    scores = [(each.token_id, each.logprob) for delta in scored for each in delta.prompt_logprobs]
    assert scores == expected_scores(tuple(range(1, 7)), None)


def test_a_discarded_adapter_goes_when_its_last_request_has_ended() -> None:
    core, runner = make_core({"old": 3, "new": 3}, max_running=1, run_ahead=True)
    for index in range(2):
        core.add(make_request(f"r{index}", (1, 2, 3), "old", 4))
    core.add(make_request("other", (1, 2, 3), "new", 4))
    for _ in range(8):
        core.step()
    core.discard("old")
    assert core.status().pool.adapters == 3 and not runner.tiers.discarded
    deltas = run_all(core)
    assert tokens_of(deltas["r1"]) == expected_tokens((1, 2, 3), "old", 4)
    assert runner.tiers.discarded == ["old"]
    assert [adapter.digest for adapter in core.status().adapters if adapter.num_pages] == ["new"]
    core.discard("new")
    assert core.status().pool.adapters == 0


def test_a_plan_may_evict_what_the_request_that_it_rejects_was_the_last_to_use() -> None:
    core, runner = make_core({"old": 4}, num_pages=10)
    core.add(make_request("small", (1, 2, 3), "old", 1))
    run_all(core)
    core.add(make_request("too large", (3,) * 8, "old", 30))
    core.add(make_request("next", (2,) * 30, None, 8))
    core.discard("old")
    deltas = run_all(core)
    assert deltas["too large"][0].failure is not None and tokens_of(deltas["next"])
    assert runner.tiers.discarded == ["old"] and core.status().pool.adapters == 0


def test_cached_prompt_tokens_are_prompts() -> None:
    """What a preempted sequence has generated is found in the cache too, and no prompt."""
    core, _ = make_core({}, num_pages=8)
    for index in range(3):
        core.add(replace(make_request(f"r{index}", (index + 1,), None, 24), ignore_eos=True))
    run_all(core)
    counters = core.status().counters
    assert counters.preemptions
    assert counters.prompt_tokens + counters.cached_prompt_tokens == 3 + counters.preemptions


def test_an_adapter_that_is_being_copied_is_not_discarded_yet() -> None:
    core, runner = make_core({"a": 3}, delays=Random(1), run_ahead=True)
    core.add(make_request("r", digest="a"))
    while core.status().pool.adapters == 0:
        core.step()
    core.cancel("r")
    core.discard("a")
    assert core.status().pool.adapters == 3, "its pages are still being written"
    runner.device.timeline.advance(100.0)
    core.step()
    core.check()
    assert core.status().pool.free == NUM_PAGES and runner.tiers.discarded == ["a"]


def test_nothing_is_wanted_for_a_rejected_request() -> None:
    core, runner = make_core({"big": NUM_PAGES})
    core.add(make_request("r", digest="big"))
    assert run_all(core)["r"][-1].failure is not None
    assert not runner.tiers.wanted
