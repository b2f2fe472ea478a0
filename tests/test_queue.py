"""The engine's queue: classes before arrival, and where a request is told that it stands."""

from dataclasses import replace

from core_rig import make_core, make_request, run_all, tokens_of
from fakes import expected_tokens
from lorasrv.engine.core import EngineCore
from lorasrv.engine.positions import INTERVAL_S
from lorasrv.engine.routing import Mailbox
from lorasrv.sched.queue import MAX_SLOW_READS
from lorasrv.types import EngineRequest, Priority, TokenDelta


def batch(request_id: str, max_tokens: int = 5) -> EngineRequest:
    return replace(make_request(request_id, max_tokens=max_tokens), priority=Priority.BATCH)


def test_a_class_goes_before_arrival_and_arrival_decides_within_it() -> None:
    core, _ = make_core({}, max_running=1)
    for request in (batch("b1"), batch("b2"), make_request("n1"), make_request("n2")):
        core.add(request)
    assert list(run_all(core)) == ["n1", "n2", "b1", "b2"]


def test_what_runs_goes_on_when_a_better_class_arrives() -> None:
    core, _ = make_core({}, max_running=1)
    core.add(batch("b", 6))
    core.step()
    core.add(make_request("n"))
    deltas = run_all(core)
    assert list(deltas) == ["b", "n"]
    assert core.status().counters.preemptions == 0


def test_batch_work_is_preempted_first_however_old_and_gives_the_same_tokens() -> None:
    core, _ = make_core({}, num_pages=12)
    requests = [replace(make_request("b", (1, 7, 9, 11), None, 30), priority=Priority.BATCH)]
    requests += [make_request(f"n{index}", (index + 2, 7, 9, 11), None, 30) for index in range(3)]
    for request in requests:
        core.add(request)
    preempted: set[str] = set()
    begun: set[str] = set()
    deltas: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while core.has_work():
        for delta in core.step():
            begun.add(delta.request_id)
            deltas[delta.request_id] += delta.token_ids
        preempted |= begun & {sequence.request_id for sequence in core._waiting}
        core.check()
    assert preempted and next(iter(sorted(preempted))) == "b"
    for request in requests:
        assert deltas[request.request_id] == expected_tokens(request.token_ids, None, 30)


def test_a_tenant_whose_reads_hang_has_no_others_begun() -> None:
    core, _ = make_core({})
    for number in range(9):
        core.add(make_request(f"hangs{number}", digest=f"h{number}", tenant="acme"))
    core.add(make_request("well", digest="w", tenant="umbrella"))
    all_wanted = {*(f"h{number}" for number in range(9)), "w"}
    hung = [f"h{number}" for number in range(MAX_SLOW_READS)]
    look_ahead = core._waiting.next_away
    core._waiting.note_reads({digest: digest != "h0" for digest in hung})
    assert look_ahead(99, 99).keys() == all_wanted
    core.cancel("hangs0")
    core._waiting.note_reads(dict.fromkeys(hung, True))
    held_back = look_ahead(99, 99, is_read=lambda digest: digest == "h8")
    assert held_back.keys() == {*hung[1:], "h8", "w"}, "what is being read or is in host memory is wanted still"
    core.add(make_request("other", digest="h1", tenant="umbrella"))
    core.add(make_request("one more", digest="x", tenant="umbrella"))
    assert look_ahead(99, 99).keys() == {*hung[1:], "w", "x"}, "one slow read is not many"
    core._waiting.note_reads(dict.fromkeys(hung[1:], True))
    assert look_ahead(99, 99).keys() == (all_wanted | {"x"}) - {"h0"}


class Told:
    """A core with one place and a clock, and the positions that it tells."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.core: EngineCore = make_core({}, max_running=1, clock=lambda: self.now_s)[0]

    def step(self) -> dict[str, int]:
        deltas = [delta for delta in self.core.step() if delta.queue_position is not None]
        assert all(not delta.token_ids and delta.finish is None for delta in deltas)
        return {delta.request_id: delta.queue_position for delta in deltas if delta.queue_position is not None}


def test_positions_are_told_when_they_change_and_at_most_once_an_interval() -> None:
    told = Told()
    told.core.add(replace(make_request("running", max_tokens=100), ignore_eos=True))
    told.step()
    for name in ("a", "b", "c"):
        told.core.add(make_request(name))
    assert told.step() == {}
    told.now_s = INTERVAL_S
    assert told.step() == {"a": 0, "b": 1, "c": 2}
    told.core.cancel("a")
    assert told.step() == {}
    told.now_s = 2 * INTERVAL_S
    assert told.step() == {"b": 0, "c": 1}
    told.now_s = 3 * INTERVAL_S
    assert told.step() == {}
    told.core.add(replace(make_request("urgent"), n=3))
    told.core.add(batch("patient"))
    told.now_s = 4 * INTERVAL_S
    assert told.step() == {"urgent": 2, "patient": 3}


def test_a_long_queue_is_told_a_few_a_step_and_all_of_it() -> None:
    """Some leave meanwhile: nobody is told a place that is not its own by then."""
    told = Told()
    told.core.add(replace(make_request("running", max_tokens=100), ignore_eos=True))
    told.step()
    for number in range(300):
        told.core.add(make_request(str(number)))
    told.now_s, places = INTERVAL_S, dict[str, int]()
    for step in range(6):
        of_step = told.step()
        assert len(of_step) <= 64
        assert all(place == int(name) - step for name, place in of_step.items())
        places |= of_step
        told.core.cancel(str(step))
    assert places.keys() == {str(number) for number in range(300)}
    assert told.step() == {}


def test_what_has_begun_is_told_nothing() -> None:
    """A preempted request is queued again, but its caller has tokens by then."""
    now = [0.0]
    core, _ = make_core({}, num_pages=12, clock=lambda: now[0])
    for index in range(4):
        core.add(make_request(f"r{index}", (index + 1, 7, 9, 11), None, 30))
    begun: set[str] = set()
    while core.has_work():
        now[0] += INTERVAL_S
        for delta in core.step():
            assert delta.queue_position is None or delta.request_id not in begun
            begun |= {delta.request_id} if delta.token_ids else set()
    assert core.status().counters.preemptions > 0
    assert not core.has_work()


async def test_a_lagging_reader_gets_the_last_position_and_none_once_there_are_tokens() -> None:
    mailbox = Mailbox(1)
    told = TokenDelta(request_id="r", queue_position=7)
    mailbox.put(told)
    assert await mailbox.take() == told
    for position in (6, 5):
        mailbox.put(told._replace(queue_position=position))
    assert await mailbox.take() == told._replace(queue_position=5)
    mailbox.put(told)
    mailbox.put(TokenDelta(request_id="r", token_ids=(1,)))
    assert await mailbox.take() == TokenDelta(request_id="r", token_ids=(1,))


def test_positions_leave_the_tokens_alone() -> None:
    told = Told()
    for name in ("a", "b"):
        told.core.add(make_request(name))
    deltas: dict[str, list[int]] = {"a": [], "b": []}
    while told.core.has_work():
        told.now_s += INTERVAL_S
        for delta in told.core.step():
            deltas[delta.request_id] += tokens_of([delta])
    assert deltas == {"a": expected_tokens((1, 2, 3), None, 5), "b": expected_tokens((1, 2, 3), None, 5)}
