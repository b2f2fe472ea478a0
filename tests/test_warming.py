"""Adapters brought to memory before a request asks for them, on a fake device."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from core_rig import make_core, make_request, run_all, tokens_of
from fakes import FakeTiers, expected_tokens
from lorasrv.engine.core import EngineCore
from lorasrv.engine.tiers import TierChanges
from lorasrv.engine.warming import MAX_WARMS
from lorasrv.errors import AdapterLoadFailed
from lorasrv.types import EngineRequest, Tier, TokenDelta, Warm, Warmed

PROMPT = (1, 2, 3)


class Keeping(Random):
    """With it the fake host tier drops nothing."""

    def random(self) -> float:
        return 0.5


def warm_of(digest: str, warm_id: int = 0, tier: Tier = Tier.DEVICE, deadline_s: float = 1e9) -> Warm:
    return Warm(warm_id=warm_id, digest=digest, tier=tier, deadline_s=deadline_s)


def tier_of(core: EngineCore, digest: str) -> Tier | None:
    return next((each.tier for each in core.status().adapters if each.digest == digest), None)


def settle(core: EngineCore, max_steps: int = 100) -> dict[int, Warmed]:
    """Step until nothing is to be done; what became of the warms."""
    ended: dict[int, Warmed] = {}
    for _ in range(max_steps):
        ended |= {warmed.warm_id: warmed for warmed in core.take_warmed()}
        if not core.has_work():
            return ended
        core.step()
        core.check()
    raise AssertionError(f"work is left after {max_steps} steps")


def reason_of(warmed: Warmed) -> str | None:
    return None if warmed.failure is None else warmed.failure.reason


def assert_nothing_left(core: EngineCore, tiers: FakeTiers, *resident: str) -> None:
    core.check()
    assert not core.has_work()
    assert tiers.wanted == set()
    status = core.status()
    assert (status.pins, status.pool.sequences) == (0, 0)
    assert {each.digest for each in status.adapters if each.tier is Tier.DEVICE} == set(resident)


def test_a_warm_adapter_is_there_when_a_request_asks_for_it() -> None:
    core, runner = make_core({"a": 3})
    core.warm(warm_of("a", 7))
    assert settle(core) == {7: Warmed(warm_id=7, tier=Tier.DEVICE)}
    assert_nothing_left(core, runner.tiers, "a")
    core.add(make_request("r", PROMPT, "a"))
    first = core.step()
    assert tokens_of(list(first)) == expected_tokens(PROMPT, "a", 5)[:1], "it had to wait"
    run_all(core)
    assert core.status().counters.adapter_loads == 1


def test_host_memory_is_enough_for_those_who_ask_for_no_more() -> None:
    core, runner = make_core({"a": 3})
    core.warm(warm_of("a", 1, Tier.HOST))
    assert settle(core) == {1: Warmed(warm_id=1, tier=Tier.HOST)}
    assert core.status().pool.adapters == 0
    core.warm(warm_of("a", 2))
    settle(core)
    core.warm(warm_of("a", 3, Tier.HOST))
    assert settle(core) == {3: Warmed(warm_id=3, tier=Tier.DEVICE)}
    assert_nothing_left(core, runner.tiers, "a")


def test_warms_and_requests_of_one_adapter_share_a_load() -> None:
    core, runner = make_core({"a": 3, "b": 3})
    for warm_id in range(5):
        core.warm(warm_of("a", warm_id))
    core.add(make_request("r", PROMPT, "a"))
    core.warm(warm_of("a", 5, Tier.HOST))
    assert settle(core).keys() == set(range(6))
    assert core.status().counters.adapter_loads == 1
    assert_nothing_left(core, runner.tiers, "a")


def test_they_are_read_one_at_a_time_and_within_the_look_ahead() -> None:
    sizes = {f"a{index}": 1 for index in range(10)}
    core, runner = make_core(sizes, lookahead=2, max_loads_per_step=1)
    want, wanted = runner.tiers.want, list[tuple[str, ...]]()
    runner.tiers.want = lambda digests: (wanted.append(tuple(digests)), want(digests))[1]
    for index, digest in enumerate(sizes):
        core.warm(warm_of(digest, index))
    for index in range(3):
        core.add(make_request(f"r{index}", PROMPT, f"a{9 - index}"))
    assert all(warmed.tier is Tier.DEVICE for warmed in settle(core, 200).values())
    assert wanted[0] == ("a9", "a8"), "requests come first"
    assert max(len(digests) for digests in wanted) == 2
    assert max(len(set(digests) - {"a9", "a8", "a7"}) for digests in wanted) == 1


def test_the_queue_goes_first() -> None:
    core, _ = make_core({"a": 3}, max_running=1)
    core.add(replace(make_request("first", PROMPT, max_tokens=20), ignore_eos=True))
    core.add(replace(make_request("second", PROMPT, max_tokens=20), ignore_eos=True))
    core.warm(warm_of("a"))
    while core.status().waiting:
        core.step()
        core.check()
        assert tier_of(core, "a") is not Tier.DEVICE
    settle(core)
    assert tier_of(core, "a") is Tier.DEVICE


def test_a_queued_request_that_waits_for_its_own_read_holds_up_nobody() -> None:
    core, runner = make_core({"a": 3, "slow": 3})
    runner.tiers.want(("slow",))
    runner.tiers._reading["slow"] = 50
    core.add(make_request("r", PROMPT, "slow"))
    core.warm(warm_of("a"))
    ended: list[Warmed] = []
    while not ended:
        core.step()
        ended += core.take_warmed()
    assert core.status().waiting == 1
    settle(core, 200)


def hold_copies(tiers: FakeTiers) -> None:
    """From now on no copy to the device ends."""
    poll: Callable[[], TierChanges] = tiers.poll
    tiers.poll = lambda: replace(poll(), loaded=())


@pytest.mark.parametrize(("size", "loads"), [(8, True), (9, False)])
def test_nobody_is_preempted_for_a_copy(size: int, loads: bool) -> None:
    """Four requests of eight pages, which will need twelve, in a pool of twenty."""
    core, runner = make_core({"a": size}, num_pages=20, prefix_cache=False)
    core.warm(warm_of("a", 0, Tier.HOST))
    settle(core)
    requests = {f"r{index}": make_request(f"r{index}", (1, 2, 3, 4), max_tokens=8) for index in range(4)}
    for request in requests.values():
        core.add(replace(request, ignore_eos=True))
    core.step()
    core.step()
    assert core.status().pool.sequences == 8
    hold_copies(runner.tiers)
    core.warm(warm_of("a", 1))
    while core.status().running:
        core.step()
        core.check()
        assert core.status().running in (0, 4)
        if core.status().running:
            assert (core.status().pool.adapters > 0) == loads
    assert core.status().counters.preemptions == 0


def test_nothing_is_taken_from_a_request_that_waits_for_pages() -> None:
    """It needs nineteen of twenty pages, and two are in use."""
    core, runner = make_core({"a": 3}, num_pages=20, prefix_cache=False)
    core.warm(warm_of("a", 0, Tier.HOST))
    settle(core)
    core.add(replace(make_request("first", PROMPT, max_tokens=10), ignore_eos=True))
    core.step()
    core.step()
    core.add(make_request("big", (1,) * 76, max_tokens=1))
    hold_copies(runner.tiers)
    core.warm(warm_of("a", 1))
    while core.status().waiting:
        core.step()
        core.check()
        assert core.status().pool.adapters == 0
    assert core.status().running == 1


def test_two_that_need_each_others_pages_come_one_after_the_other() -> None:
    core, runner = make_core({"a": 12, "b": 12}, num_pages=20)
    runner.tiers.random = Keeping(0)
    core.warm(warm_of("a", 3, Tier.HOST))
    core.warm(warm_of("b", 4, Tier.HOST))
    settle(core)
    core.warm(warm_of("a", 1))
    core.warm(warm_of("b", 2))
    assert {warm_id: warmed.tier for warm_id, warmed in settle(core).items()} == {1: Tier.DEVICE, 2: Tier.DEVICE}
    assert core.status().counters.adapter_loads == 2


def test_a_step_begins_a_bounded_number_of_copies() -> None:
    sizes = {f"a{index}": 1 for index in range(6)}
    core, _ = make_core(sizes, max_loads_per_step=2)
    for index, digest in enumerate(sizes):
        core.warm(warm_of(digest, index, Tier.HOST))
    settle(core)
    for index, digest in enumerate(sizes):
        core.warm(warm_of(digest, index))
    core.step()
    assert core.status().counters.adapter_loads == 2


def arrivals(seed: int) -> list[list[EngineRequest]]:
    random = Random(seed)
    return [
        [
            make_request(
                f"r{step}",
                tuple(random.randrange(1, 50) for _ in range(random.randint(1, 20))),
                max_tokens=random.randint(1, 30),
            )
        ]
        if random.random() < 0.3
        else []
        for step in range(400)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_warming_changes_no_step_of_a_request(seed: int) -> None:
    """A pool that requests of the base model outgrow; in one of two engines adapters are warmed all the time."""
    sizes = {f"a{index}": 1 + index % 9 for index in range(30)}

    def run(*, warming: bool) -> tuple[list[tuple[TokenDelta, ...]], EngineCore]:
        core, _ = make_core(sizes, num_pages=24, prefix_cache=False)
        random = Random(seed)
        steps: list[tuple[TokenDelta, ...]] = []
        for step, requests in enumerate(arrivals(seed)):
            for request in requests:
                core.add(request)
            if warming:
                core.warm(warm_of(random.choice(list(sizes)), step))
            steps.append(core.step())
            core.check()
        return steps, core

    alone, _ = run(warming=False)
    beside, core = run(warming=True)
    assert beside == alone
    counters = core.status().counters
    assert min(counters.adapter_loads, counters.adapter_evictions, counters.preemptions) > 10


def test_an_adapter_that_never_fits_is_refused() -> None:
    core, runner = make_core({"a": 20, "b": 19}, num_pages=20)
    core.warm(warm_of("a", 1))
    core.warm(warm_of("a", 2, Tier.HOST))
    core.warm(warm_of("b", 3))
    ended = settle(core)
    assert reason_of(ended[1]) == "RESOURCE_EXHAUSTED"
    assert ended[1].failure and "needs 20 pages, and a request one; the pool has 20" in ended[1].failure.message
    assert (ended[2].tier, ended[3].tier) == (Tier.HOST, Tier.DEVICE)
    assert_nothing_left(core, runner.tiers, "b")


def test_one_that_does_not_fit_now_waits_until_its_deadline_and_holds_up_no_smaller_one() -> None:
    now = [0.0]
    core, runner = make_core({"big": 30, "small": 5}, clock=lambda: now[0], max_running=1)
    runner.tiers.random = Keeping(0)
    core.add(replace(make_request("r", (1,) * 60, max_tokens=60), ignore_eos=True))
    core.step()
    core.warm(warm_of("big", 1, deadline_s=50.0))
    core.warm(warm_of("small", 2))
    ended: dict[int, Warmed] = {}
    for now[0] in range(49):
        core.step()
        ended |= {warmed.warm_id: warmed for warmed in core.take_warmed()}
    assert ended == {2: Warmed(warm_id=2, tier=Tier.DEVICE)}
    now[0] = 50.0
    core.step()
    (overdue,) = core.take_warmed()
    assert (overdue.warm_id, reason_of(overdue)) == (1, "DEADLINE_EXCEEDED")
    run_all(core)
    assert_nothing_left(core, runner.tiers, "small")


def test_a_dead_deadline_has_nothing_read() -> None:
    core, runner = make_core({"a": 3}, clock=lambda: 10.0)
    core.warm(warm_of("a", deadline_s=10.0))
    assert reason_of(settle(core)[0]) == "DEADLINE_EXCEEDED"
    assert runner.tiers.host_tiers() == {}
    assert_nothing_left(core, runner.tiers)


def test_a_read_that_fails_fails_those_who_wait_for_it_and_the_next_one_tries_again() -> None:
    core, runner = make_core({"a": 3, "b": 3}, failing=1.0)
    core.warm(warm_of("a", 1))
    core.warm(warm_of("a", 2, Tier.HOST))
    core.add(make_request("r", PROMPT, "a"))
    core.add(make_request("base", PROMPT))
    deltas: list[TokenDelta] = []
    ended: list[Warmed] = []
    while core.has_work():
        deltas += core.step()
        ended += core.take_warmed()
        core.check()
    assert [reason_of(warmed) for warmed in ended] == [AdapterLoadFailed.reason] * 2
    assert [each.request_id for each in deltas if each.failure] == ["r"]
    assert tokens_of(deltas) == expected_tokens(PROMPT, None, 5)
    assert_nothing_left(core, runner.tiers)
    runner.tiers.failing = 0.0
    core.warm(warm_of("a", 3))
    assert settle(core)[3].tier is Tier.DEVICE


def test_a_cancelled_one_leaves_nothing_wherever_it_is() -> None:
    for num_steps in range(8):
        core, runner = make_core({"a": 3}, seed=3, delays=Random(num_steps), run_ahead=True)
        core.warm(warm_of("a", 1))
        for _ in range(num_steps):
            core.step()
        told = core.take_warmed()
        core.cancel_warm(1)
        core.check()
        assert not core.has_work()
        assert runner.tiers.wanted == set()
        assert core.status().pins == 0
        # What was on its way arrives, and may go.
        core.add(make_request("r", tuple(range(1, 31)), max_tokens=120))
        assert len(tokens_of(run_all(core)["r"])) > 0
        assert core.take_warmed() == ()
        assert len(told) <= 1


def test_the_other_who_waits_for_it_still_gets_it() -> None:
    core, runner = make_core({"a": 3})
    core.warm(warm_of("a", 1))
    core.warm(warm_of("a", 2))
    core.step()
    core.cancel_warm(1)
    assert runner.tiers.wanted == {"a"}
    assert settle(core).keys() == {2}
    core.cancel_warm(1)
    assert_nothing_left(core, runner.tiers, "a")


def test_a_bounded_number_waits() -> None:
    core, runner = make_core({"a": 3})
    for warm_id in range(MAX_WARMS + 1):
        core.warm(warm_of("a", warm_id))
    (refused,) = core.take_warmed()
    assert (refused.warm_id, reason_of(refused)) == (MAX_WARMS, "QUEUE_FULL")
    assert len(settle(core)) == MAX_WARMS
    assert_nothing_left(core, runner.tiers, "a")


def test_warm_is_not_pinned() -> None:
    core, _ = make_core({"a": 10, "b": 35})
    core.warm(warm_of("a", 1))
    settle(core)
    core.warm(warm_of("b", 2))
    settle(core)
    assert (tier_of(core, "a"), tier_of(core, "b")) == (Tier.HOST, Tier.DEVICE)


def test_a_discarded_adapter_is_kept_for_who_waits_for_it() -> None:
    core, runner = make_core({"a": 3})
    core.warm(warm_of("a", 1))
    core.step()
    core.discard("a")
    assert runner.tiers.discarded == []
    settle(core)
    core.check()
    assert runner.tiers.discarded == ["a"]
    assert tier_of(core, "a") is not Tier.DEVICE


def test_a_warm_takes_a_discard_back() -> None:
    core, _ = make_core({"a": 3})
    core.add(make_request("r", PROMPT, "a"))
    while not core.status().running:
        core.step()
    core.discard("a")
    core.warm(warm_of("a"))
    assert settle(core)[0].tier is Tier.DEVICE
    assert tier_of(core, "a") is Tier.DEVICE
