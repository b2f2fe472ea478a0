"""The engine's loop, turned by hand: a script of messages, a fake core, a fake clock."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

import fake_core
from fake_core import FakeCore
from lorasrv.engine.loop import HEARTBEAT_S, serve_loop
from lorasrv.engine.messages import (
    Cancel,
    CancelWarm,
    FromEngine,
    GetStatus,
    Heartbeat,
    Message,
    Ready,
    Shutdown,
    StatusReply,
    Step,
    Submit,
)
from lorasrv.engine.outbox import Outbox
from lorasrv.types import EngineRequest, Failure, FinishReason, Tier, TokenDelta, Warm, Warmed


class Host:
    """Feeds one list of messages per turn of the loop, then Shutdown. A wait moves the clock."""

    def __init__(self, turns: Sequence[Sequence[Message]]) -> None:
        self._turns = [list(turn) for turn in turns]
        self.now_s = 100.0
        self.sent: list[FromEngine] = []
        self.waits: list[float] = []
        self._in_turn = False

    def receive(self, timeout_s: float) -> Message | None:
        if not self._in_turn:
            self.waits.append(timeout_s)
            if not self._turns:
                return Shutdown()
        self._in_turn = True
        if self._turns[0]:
            return self._turns[0].pop(0)
        self._turns.pop(0)
        self._in_turn = False
        self.now_s += timeout_s
        return None

    def run(self, core: FakeCore) -> list[FromEngine]:
        serve_loop(core, self.receive, self.sent.append, lambda: self.now_s)
        return [message for message in self.sent if not isinstance(message, Heartbeat)]


def request(request_id: str, kind: int = fake_core.COUNT, max_tokens: int = 2) -> EngineRequest:
    return EngineRequest(request_id=request_id, token_ids=(kind,), adapter=None, max_tokens=max_tokens, seed=0)


def delta(request_id: str, token_id: int, finish: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(request_id=request_id, token_ids=(token_id,), finish=finish)


def test_a_step_sends_all_its_deltas_in_one_message() -> None:
    host = Host([[Submit(request("a")), Submit(request("b", max_tokens=1))], [], []])
    assert host.run(FakeCore()) == [
        Step((delta("a", 0), delta("b", 0, FinishReason.LENGTH))),
        Step((delta("a", 1, FinishReason.LENGTH),)),
    ]


def test_the_loop_waits_when_idle_and_polls_when_busy() -> None:
    host = Host([[], [Submit(request("a"))], [], []])
    host.run(FakeCore())
    assert host.waits == [HEARTBEAT_S, HEARTBEAT_S, 0.0, HEARTBEAT_S, HEARTBEAT_S]


def test_a_refused_request_fails_alone() -> None:
    host = Host([[Submit(request("bad", fake_core.REFUSE)), Submit(request("good", max_tokens=1))], []])
    refused = TokenDelta(request_id="bad", failure=Failure(reason="QUEUE_FULL", message="0 requests may wait"))
    assert host.run(FakeCore()) == [Step((refused, delta("good", 0, FinishReason.LENGTH)))]


def test_a_refusal_is_sent_when_there_is_no_step() -> None:
    host = Host([[Submit(request("bad", fake_core.REFUSE))], []])
    assert [type(message) for message in host.run(FakeCore())] == [Step]


def test_cancel_and_status_reach_the_core() -> None:
    core = FakeCore()
    host = Host([[Submit(request("a", fake_core.FOREVER))], [GetStatus(7), Cancel("a")], [GetStatus(8)]])
    replies = [message for message in host.run(core) if isinstance(message, StatusReply)]
    assert [(reply.query_id, reply.status.running) for reply in replies] == [(7, 1), (8, 0)]
    assert core.cancelled == ["a"]


def test_warms_reach_the_core_and_their_ends_come_back() -> None:
    core = FakeCore()
    warms = [
        Warm(warm_id=number, digest=digest, tier=Tier.HOST, deadline_s=1.0)
        for number, digest in enumerate(("a", "never", "damaged"))
    ]
    host = Host([warms, [GetStatus(7)], [CancelWarm(1)], [GetStatus(8)]])
    sent = host.run(core)
    first, second, *_ = (message for message in sent if isinstance(message, Warmed))
    assert (first.warm_id, first.tier, second.warm_id) == (0, Tier.DEVICE, 2)
    assert second.failure is not None and second.failure.reason == "ADAPTER_CORRUPT"
    assert [message.status.waiting for message in sent if isinstance(message, StatusReply)] == [1, 0]


def test_the_heart_beats_when_idle_and_when_busy() -> None:
    idle = Host([[]] * 3)
    idle.run(FakeCore())
    assert idle.sent == [Heartbeat(0)] * 3
    busy = Host([[Submit(request("a", fake_core.FOREVER))], *[[]] * 9])
    core = FakeCore()
    core_step = core.step

    def slow_step() -> tuple[TokenDelta, ...]:
        busy.now_s += HEARTBEAT_S / 2
        return core_step()

    core.step = slow_step
    busy.run(core)
    assert [message.steps for message in busy.sent if isinstance(message, Heartbeat)] == [1, 3, 5, 7, 9]


class Reader:
    """Takes what the outbox sends while it has room."""

    def __init__(self) -> None:
        self.room = 0
        self.got: list[FromEngine] = []

    def try_send(self, message: FromEngine) -> bool:
        if self.room == 0:
            return False
        self.room -= 1
        self.got.append(message)
        return True


def test_a_reader_that_stalls_delays_no_step_and_no_cancel_and_gets_one_message() -> None:
    core, reader = FakeCore(), Reader()
    outbox = Outbox(reader.try_send)
    a = replace(request("a", max_tokens=3), n=2)
    turns = [[Submit(a), Submit(request("b", fake_core.FOREVER))], [], [], [Cancel("b"), GetStatus(1)]]
    host = Host(turns)
    serve_loop(core, host.receive, outbox.send, lambda: host.now_s)
    assert (core.cancelled, core.requests) == (["b"], {})
    assert not reader.got and not outbox.is_empty
    reader.room = 2
    outbox.flush()
    assert outbox.is_empty
    assert isinstance(reader.got[0], StatusReply)
    assert reader.got[1:] == [
        Step(
            (
                TokenDelta(request_id="a", token_ids=(0, 1, 2), finish=FinishReason.LENGTH),
                TokenDelta(request_id="a", sample=1, token_ids=(10, 11, 12), finish=FinishReason.LENGTH),
                TokenDelta(request_id="b", token_ids=(0, 1, 2)),
            )
        )
    ]
    reader.room = 9
    outbox.send(Heartbeat(7))
    assert reader.got[2:] == [Heartbeat(7)]


def test_what_waits_for_a_stalled_reader_is_what_the_requests_may_produce() -> None:
    core, reader = FakeCore(), Reader()
    outbox = Outbox(reader.try_send)
    host = Host([[Submit(request(f"r{n}", max_tokens=50))] for n in range(20)] + [[]] * 1000)
    serve_loop(core, host.receive, outbox.send, lambda: host.now_s)
    reader.room = 2
    outbox.flush()
    assert outbox.is_empty
    (step,) = reader.got
    assert isinstance(step, Step)
    assert [delta.token_ids for delta in step.deltas] == [tuple(range(50))] * 20


def test_a_reply_is_not_put_off_by_deltas_that_keep_coming() -> None:
    reader = Reader()
    outbox = Outbox(reader.try_send)
    outbox.send(Step((delta("a", 0),)))
    outbox.send(StatusReply(1, FakeCore().status()))
    for token_id in (1, 2):
        reader.room = 1
        outbox.send(Step((delta("a", token_id),)))
    assert {type(message) for message in reader.got} == {Step, StatusReply}


def test_what_waits_is_not_overtaken() -> None:
    """Room that comes up between two looks is for what came first."""
    got: list[FromEngine] = []
    rooms = iter([False, False, True, True])

    def try_send(message: FromEngine) -> bool:
        has_room = next(rooms)
        got.extend([message] * has_room)
        return has_room

    outbox = Outbox(try_send)
    for token_id in range(3):
        outbox.send(Step((delta("a", token_id),)))
    assert got == [Step((TokenDelta(request_id="a", token_ids=(0, 1)),)), Step((delta("a", 2),))]


def test_a_failure_merges_behind_the_tokens_before_it() -> None:
    reader = Reader()
    outbox = Outbox(reader.try_send)
    for each in (delta("a", 1), TokenDelta(request_id="a", failure=Failure(reason="INTERNAL", message="m"))):
        outbox.send(Step((each,)))
    reader.room = 1
    outbox.flush()
    assert reader.got == [
        Step((TokenDelta(request_id="a", token_ids=(1,), failure=Failure(reason="INTERNAL", message="m")),))
    ]


def test_a_failure_leaves_the_end_of_a_sample_before_it() -> None:
    reader = Reader()
    outbox = Outbox(reader.try_send)
    failure = Failure(reason="INTERNAL", message="of another sample")
    for each in (delta("a", 1, FinishReason.EOS), TokenDelta(request_id="a", failure=failure)):
        outbox.send(Step((each,)))
    reader.room = 1
    outbox.flush()
    ended = TokenDelta(request_id="a", token_ids=(1,), finish=FinishReason.EOS, failure=failure)
    assert reader.got == [Step((ended,))]


def test_shutdown_ends_the_loop_at_once() -> None:
    core = FakeCore()
    host = Host([[Submit(request("a")), Shutdown(), Submit(request("b"))]])
    assert host.run(core) == []
    assert list(core.requests) == ["a"]


def test_an_exception_from_a_step_is_fatal() -> None:
    with pytest.raises(RuntimeError, match="broken on request"):
        Host([[Submit(request("a", fake_core.BREAK))]]).run(FakeCore())


def test_a_message_from_the_wrong_side_is_a_defect() -> None:
    with pytest.raises(TypeError, match="Ready"):
        Host([[Ready(fake_core.INFO)]]).run(FakeCore())
