"""The offline face over a core of a few lines: several samples, failures, room, and what the core does late."""

import gc
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
import torch

from lorasrv.engine.admission import TokenLimits
from lorasrv.engine.text import load_tokenizer
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.errors import AdapterLoadFailed, InvalidRequest, QueueFull
from lorasrv.memory.packing import PackedAdapter
from lorasrv.offline.driver import Driver
from lorasrv.offline.prompts import RunMaker, make_asks
from lorasrv.offline.results import Delta, Generation
from lorasrv.offline.runs import Run
from lorasrv.offline.stream import Stream
from lorasrv.offline.versions import Version, Versions
from lorasrv.types import (
    EngineRequest,
    EngineStatus,
    Failure,
    FinishReason,
    PositionLogprobs,
    SamplingParams,
    TokenDelta,
)

TOKENIZER = load_tokenizer(Path(__file__).parent.parent / "adapters" / "samples" / "base")
VOCABULARY = Vocabulary(TOKENIZER)
LIMITS = TokenLimits(vocab_size=300, context_tokens=1000, pool_tokens=1000)
LETTERS = {letter: TOKENIZER.encode(letter).ids[-1] for letter in "abcdefgh"}
ONE, TWO = (Version(digest=digest, image=cast(PackedAdapter, object())) for digest in ("one", "two"))


@dataclass
class LateCore:
    """Sample i of a request begins i steps late and says the prompt's letters from the i-th on, one a step, round and
    round. With `late`, what was cancelled gives one more delta, and the last end leaves a step to be made.

    An `h` first in a prompt fails its request in the second step.
    """

    late: bool = False
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    open: dict[str, set[int]] = field(default_factory=dict)
    in_flight: list[TokenDelta] = field(default_factory=list)
    most_samples: int = 0
    max_waiting: int = 1000
    discarded: list[str] = field(default_factory=list)

    def add(self, request: EngineRequest) -> None:
        if len(self.requests) >= self.max_waiting:
            raise QueueFull("full")
        self.requests[request.request_id] = request
        self.steps[request.request_id] = 0
        self.open[request.request_id] = set(range(request.n))
        self.most_samples = max(self.most_samples, sum(map(len, self.open.values())))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        if request_id not in self.requests:
            return
        for sample in list(self.open[request_id]) if index is None else [index]:
            if self.late:
                self.in_flight.append(TokenDelta(request_id=request_id, sample=sample, token_ids=(LETTERS["g"],)))
            self._close(request_id, sample)

    def has_work(self) -> bool:
        return bool(self.requests or self.in_flight)

    def step(self) -> tuple[TokenDelta, ...]:
        assert self.has_work()
        deltas, self.in_flight = self.in_flight, []
        for request in list(self.requests.values()):
            step = self.steps[request.request_id]
            self.steps[request.request_id] += 1
            if request.token_ids[0] == LETTERS["h"] and step == 1:
                self.cancel(request.request_id)
                failure = Failure(reason=AdapterLoadFailed.reason, message="no such file")
                deltas.append(TokenDelta(request_id=request.request_id, failure=failure))
                continue
            deltas += [self._say(request, index, step - index) for index in sorted(self.open[request.request_id])]
        return tuple(delta for delta in deltas if delta.token_ids or delta.failure)

    def _say(self, request: EngineRequest, index: int, number: int) -> TokenDelta:
        delta = TokenDelta(request_id=request.request_id, sample=index)
        if number < 0:
            return delta
        token_id = request.token_ids[(number + index) % len(request.token_ids)]
        logprobs = () if request.logprobs is None else (PositionLogprobs(token_id=token_id, logprob=-float(index)),)
        finish = None
        if number + 1 == request.max_tokens:
            finish = FinishReason.LENGTH
            self._close(request.request_id, index)
        return delta._replace(token_ids=(token_id,), logprobs=logprobs, finish=finish)

    def _close(self, request_id: str, index: int) -> None:
        self.open[request_id].discard(index)
        if not self.open[request_id]:
            del self.requests[request_id], self.open[request_id]

    def discard(self, digest: str) -> None:
        assert all(request.adapter is None or request.adapter.digest != digest for request in self.requests.values())
        self.discarded.append(digest)

    def status(self) -> EngineStatus:
        raise NotImplementedError("nobody asks")

    def check(self) -> None:
        assert self.requests.keys() == self.open.keys()

    def close(self) -> None:
        self.requests.clear()
        self.open.clear()


def make_driver(core: LateCore, max_open: int = 100) -> Driver:
    return Driver(core, Versions(), max_open)


MAKER = RunMaker(TOKENIZER, None, LIMITS)


def make_runs(prompts: Sequence[str], *, streamed: bool = False, n: int = 1, **sampling: object) -> list[Run]:
    params = SamplingParams(**{"max_tokens": 4, **sampling})
    token_ids = [[LETTERS[letter] for letter in prompt] for prompt in prompts]
    runs = MAKER.make(make_asks(token_ids, "base", None, params), {}, streamed=streamed)
    return [Run(replace(run.request, n=n), params.stop, VOCABULARY, streamed=streamed) for run in runs]


def run_all(driver: Driver, runs: Sequence[Run]) -> list[Generation]:
    waiting = deque(runs)
    for _ in range(1000):
        driver.advance(waiting)
        driver.check()
        if all(run.ended for run in runs):
            return [run.result() for run in runs]
    raise AssertionError("no end")


@pytest.mark.parametrize("late", [False, True])
def test_several_samples_of_a_prompt(late: bool) -> None:
    core = LateCore(late=late)
    driver = make_driver(core)
    (output,) = run_all(driver, make_runs(["abcd"], n=3, logprobs=0))
    assert [sample.text for sample in output.samples] == ["abcd", "bcda", "cdab"]
    assert [sample.logprobs[0].logprob for sample in output.samples if sample.logprobs] == [0.0, -1.0, -2.0]
    with pytest.raises(InvalidRequest, match="there are 3"):
        _ = output.text
    assert repr(output) == "Generation(3 samples)"
    assert not core.has_work()


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_string_ends_its_own_sample(late: bool) -> None:
    core = LateCore(late=late)
    driver = make_driver(core)
    (output,) = run_all(driver, make_runs(["abcd"], n=3, stop=("ab",), max_tokens=5))
    assert [sample.text for sample in output.samples] == ["", "bcd", "cd"]
    assert [(sample.finish, sample.stop) for sample in output.samples] == [(FinishReason.STOP, "ab")] * 3
    assert not core.has_work()


def test_a_stream_of_several_samples() -> None:
    driver = make_driver(LateCore(late=True))
    (run,) = make_runs(["abcd"], streamed=True, n=2, stop=("d",))
    stream = Stream(driver, run)
    deltas = list(stream)
    texts = ["".join(delta.text for delta in deltas if delta.index == index) for index in range(2)]
    assert texts == ["abc", "bc"] == [sample.text for sample in stream.result().samples]
    ends = [delta for delta in deltas if delta.finish is not None]
    assert ends == [
        Delta(index=0, text="", token_ids=(LETTERS["d"],), finish=FinishReason.STOP, stop="d"),
        Delta(index=1, text="", token_ids=(LETTERS["d"],), finish=FinishReason.STOP, stop="d"),
    ]


def test_a_request_that_fails_fails_alone() -> None:
    driver = make_driver(LateCore(late=True))
    good, failed, also = run_all(driver, make_runs(["abcd", "hab", "ba"]))
    assert (good.text, also.text, failed.samples) == ("abcd", "baba", ())
    for field_name in ("text", "token_ids", "finish", "stop", "logprobs"):
        with pytest.raises(AdapterLoadFailed, match="no such file"):
            getattr(failed, field_name)
    assert repr(failed) == "Generation(AdapterLoadFailed: no such file)"
    stream = Stream(driver, *make_runs(["hab"], streamed=True))
    assert next(stream).text == "h"
    with pytest.raises(AdapterLoadFailed):
        next(stream)
    assert stream.result().error is not None


def test_the_core_is_given_no_more_than_there_is_room_for() -> None:
    core = LateCore()
    driver = make_driver(core, max_open=5)
    outputs = run_all(driver, [*make_runs(["ab"] * 7, n=2), *make_runs(["cd"], n=9), *make_runs(["ef"] * 7)])
    assert [len(output.samples) for output in outputs] == [2] * 7 + [9] + [1] * 7
    assert core.most_samples == 9, "what exceeds the room goes alone"
    run_all(driver, make_runs(["ab"] * 30, n=2))
    assert core.most_samples == 9


def test_streams_count_in_the_room_and_are_served_by_every_step() -> None:
    core = LateCore()
    driver = make_driver(core, max_open=2)
    streams = [Stream(driver, run) for run in make_runs(["ab", "cd", "ef"], streamed=True)]
    assert [output.text for output in run_all(driver, make_runs(["gh"] * 3))] == ["ghgh"] * 3
    assert core.most_samples == 3
    assert ["".join(delta.text for delta in stream) for stream in streams] == ["abab", "cdcd", "efef"]


def test_a_full_queue_refuses_a_stream() -> None:
    core = LateCore(max_waiting=1)
    driver = make_driver(core)
    first, second = make_runs(["ab", "cd"], streamed=True)
    stream = Stream(driver, first)
    with pytest.raises(QueueFull):
        Stream(driver, second)
    driver.check()
    assert stream.result().text == "abab"


def test_what_is_dropped_in_the_middle_of_a_step_is_taken_back_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    core = LateCore()
    driver = make_driver(core)
    cycle: list[object] = [Stream(driver, run) for run in make_runs(["ab", "cd"], streamed=True)]
    cycle.append(cycle)
    del cycle
    step = core.step

    def collecting() -> tuple[TokenDelta, ...]:
        gc.collect()
        return step()

    monkeypatch.setattr(core, "step", collecting)
    assert run_all(driver, make_runs(["ef"]))[0].text == "efef"
    assert not core.requests


def test_the_core_rests_when_the_last_request_is_taken_back() -> None:
    core = LateCore(late=True)
    driver = make_driver(core)
    stream = Stream(driver, *make_runs(["abcd"], streamed=True, n=2))
    next(stream)
    stream.close()
    assert not core.has_work()
    stream = Stream(driver, *make_runs(["abcd"], streamed=True, n=2))
    next(stream)
    del stream
    assert core.has_work()
    driver.check()
    assert not core.has_work()


def with_adapter(run: Run, driver: Driver, name: str) -> Run:
    with driver.holding([name]) as versions:
        (made,) = MAKER.make(make_asks([[*run.request.token_ids]], name, 0.5, SamplingParams(max_tokens=4)), versions)
        assert made.request.adapter is not None and made.request.adapter.scale == 0.5
        driver.advance(deque([made]))
    return made


def test_a_version_is_discarded_when_its_last_use_ends() -> None:
    core = LateCore()
    driver = make_driver(core)
    (plain,) = make_runs(["abcd"])
    driver.publish("x", ONE)
    run = with_adapter(plain, driver, "x")
    driver.publish("x", ONE)
    driver.publish("y", TWO)
    driver.publish("x", TWO)
    assert core.discarded == []
    again = with_adapter(plain, driver, "x")
    while not run.ended:
        driver.wait_for(run)
    assert core.discarded == ["one"]
    driver.unpublish("x")
    driver.unpublish("y")
    assert core.discarded == ["one"]
    driver.check()
    driver.end([again])
    driver.end([again])
    assert core.discarded == ["one", "two"]
    driver.check()
    with pytest.raises(InvalidRequest, match="'x'"), driver.holding(["x"]):
        pass
    driver.publish("x", ONE)
    with driver.holding(["x"]):
        driver.unpublish("x")
        assert core.discarded == ["one", "two"]
    assert core.discarded == ["one", "two", "one"]


def test_token_ids_come_from_whatever_holds_integers() -> None:
    ids = [LETTERS["a"], LETTERS["b"]]
    asks = make_asks([ids, tuple(ids), torch.tensor(ids)], "base", None, None)
    assert [ask.prompt for ask in asks] == [tuple(ids)] * 3
    with pytest.raises(InvalidRequest, match="list is neither"):
        make_asks([[1.5]], "base", None, None)
