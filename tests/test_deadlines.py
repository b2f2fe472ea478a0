"""Deadlines in the engine: dead work is never started, running work ends within a step, nobody else notices."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from core_rig import make_core, make_request, run_all, tokens_of
from fakes import expected_tokens
from lorasrv.engine.core import EngineCore
from lorasrv.engine.deadlines import Deadlines
from lorasrv.errors import DeadlineExceeded
from lorasrv.types import Failure

PASSED = Failure(reason="DEADLINE_EXCEEDED", message="the call's deadline has passed")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_queued_work_with_a_dead_deadline_is_never_started() -> None:
    clock = Clock()
    core, runner = make_core({}, clock=clock, max_running=1)
    core.add(make_request("running", max_tokens=8))
    core.add(replace(make_request("queued", (4, 5, 6)), deadline_s=101.0))
    core.add(make_request("behind", (7, 8, 9)))
    core.step()
    clock.now_s = 101.0
    deltas = run_all(core)
    assert [delta.failure for delta in deltas["queued"]] == [PASSED]
    alone, _ = make_core({}, max_running=1)
    alone.add(make_request("running", max_tokens=8))
    alone.add(make_request("behind", (7, 8, 9)))
    run_all(alone)
    assert core.status().counters == alone.status().counters
    assert tokens_of(deltas["behind"]) == expected_tokens((7, 8, 9), None, 5)
    assert runner.num_forwards == alone.status().counters.steps


@pytest.mark.parametrize("run_ahead", [False, True])
def test_running_work_ends_within_a_step_and_gives_back(run_ahead: bool) -> None:
    clock = Clock()
    core, _ = make_core({"a": 2}, clock=clock, run_ahead=run_ahead)
    core.add(replace(make_request("late", digest="a", max_tokens=50), deadline_s=101.0, n=2, ignore_eos=True))
    core.add(make_request("neighbour", max_tokens=20))
    deltas = [delta for _ in range(8) for delta in core.step()]
    assert {delta.request_id for delta in deltas} == {"late", "neighbour"}
    clock.now_s = 101.5
    last = core.step()
    assert [delta.failure for delta in last if delta.request_id == "late"] == [PASSED]
    core.check()
    assert core.status().pins == 0
    deltas += [*last, *(delta for each in run_all(core).values() for delta in each)]
    assert tokens_of([d for d in deltas if d.request_id == "neighbour"]) == expected_tokens((1, 2, 3), None, 20)
    assert core.status().pool.sequences == 0


def test_what_comes_too_late_is_refused_and_leaves_nothing() -> None:
    clock = Clock()
    core, _ = make_core({}, clock=clock)
    with pytest.raises(DeadlineExceeded):
        core.add(replace(make_request("r"), deadline_s=100.0))
    assert not core.has_work()
    core.check()


def known_core(clock: Clock, **config: Any) -> EngineCore:
    """That has seen a decode step take 0.1 s, and a token of a prompt 0.01 s."""
    core, _ = make_core({}, clock=clock, **config)
    for _ in range(300):
        core._ledger.costs.step_ended(2, 2, clock.now_s, clock.now_s + 0.1)
        clock.now_s += 1
        core._ledger.costs.step_ended(2, 12, clock.now_s, clock.now_s + 0.2)
        clock.now_s += 1
    return core


def test_what_cannot_meet_its_deadline_is_refused_when_it_comes() -> None:
    """Even on an engine twice as fast: 20 tokens of prompt are 0.1 s, 30 steps 1.5 s."""
    clock = Clock()
    core = known_core(clock)
    prompt = tuple(range(1, 21))
    for request, least_s in (
        (make_request("p", prompt), 0.1),
        (replace(make_request("m", prompt, max_tokens=40), min_tokens=30), 1.6),
        (replace(make_request("i", prompt, max_tokens=30), ignore_eos=True), 1.6),
        (replace(make_request("s", prompt, max_tokens=30), ignore_eos=True, stop_token_ids=(3,)), 0.1),
    ):
        with pytest.raises(DeadlineExceeded, match="cannot be met"):
            core.add(replace(request, deadline_s=clock.now_s + 0.95 * least_s))
        core.check()
        core.add(replace(request, deadline_s=clock.now_s + 1.05 * least_s))
        core.cancel(request.request_id)


def test_a_cached_prompt_takes_no_time() -> None:
    clock = Clock()
    core = known_core(clock)
    prompt = tuple(range(1, 21))
    core.add(make_request("first", prompt))
    run_all(core)
    core.add(replace(make_request("again", prompt), deadline_s=clock.now_s + 0.03))
    with pytest.raises(DeadlineExceeded):
        core.add(replace(make_request("stranger", prompt, tenant="other"), deadline_s=clock.now_s + 0.03))


def test_what_has_waited_too_long_to_meet_its_deadline_never_starts() -> None:
    clock = Clock()
    core = known_core(clock, max_running=1)
    core.add(replace(make_request("running", max_tokens=50), ignore_eos=True, deadline_s=clock.now_s + 2.7))
    core.add(replace(make_request("waits", max_tokens=10), ignore_eos=True, deadline_s=clock.now_s + 1.0))
    core.step()
    clock.now_s += 0.6
    (failed,) = [delta for delta in core.step() if delta.failure]
    assert failed.request_id == "waits" and failed.failure is not None
    assert failed.failure.message == "the call's deadline cannot be met"
    # What has begun has until its deadline, however slow it is.
    clock.now_s += 2.0
    assert not [delta for delta in core.step() if delta.failure]
    clock.now_s += 0.2
    assert [delta.failure for delta in core.step()] == [PASSED]
    core.check()


def test_a_deadline_that_is_met_changes_nothing() -> None:
    clock = Clock()
    core, _ = make_core({}, clock=clock)
    core.add(replace(make_request("r"), deadline_s=101.0))
    assert tokens_of(run_all(core)["r"]) == expected_tokens((1, 2, 3), None, 5)
    clock.now_s = 200.0
    core.add(make_request("r"))  # the same id, without one
    assert tokens_of(run_all(core)["r"]) == expected_tokens((1, 2, 3), None, 5)


def test_deadlines_are_as_a_look_at_all_of_them_says() -> None:
    random, deadlines = Random(3), Deadlines()
    live: dict[str, float] = {}
    for now in range(3000):
        for number in range(random.randint(0, 2)):
            live[f"{now}/{number}"] = now + random.choice((0.5, 20, 1e9))
            deadlines.add(f"{now}/{number}", live[f"{now}/{number}"])
        for request_id in random.sample(sorted(live), min(len(live), random.randint(0, 2))):
            deadlines.discard(request_id)
            del live[request_id]
        passed = sorted(request_id for request_id, deadline_s in live.items() if deadline_s <= now)
        assert sorted(deadlines.passed(now)) == passed
        for request_id in passed:
            del live[request_id]
        deadlines.check(set(live))
    deadlines.discard("never added")
