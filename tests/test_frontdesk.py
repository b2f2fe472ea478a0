"""Admission: what is refused before the engine hears of it, what the engine is asked, and what is given back."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Encoding

from fake_engine import BASE_MODEL, EOS, INFO, FakeEngine
from lorasrv.engine.admission import TokenLimits, check_request, check_tokens, engine_request
from lorasrv.engine.text import load_tokenizer
from lorasrv.errors import Draining, EngineUnavailable, GenerationExists, InvalidRequest, LorasrvError
from lorasrv.requests import AdapterRef, Delta, Event, Finished, GenerationRequest, Prompt, Started
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.server.seen import SeenVersions
from lorasrv.types import (
    BASE_ID,
    AdapterUse,
    EngineRequest,
    FinishReason,
    LogitRules,
    PositionLogprobs,
    SamplingParams,
    TokenDelta,
)
from lorasrv_adapters.errors import AdapterNotFound
from lorasrv_adapters.records import ResolvedVersion

DIGEST = "ab" * 32
LIMITS = TokenLimits.of(INFO)


class FakeVersions:
    """Knows one adapter, `upper`, and counts its pins."""

    def __init__(self) -> None:
        self.pins = 0
        self.acquired = 0
        self.quarantined: list[str] = []

    def acquire(self, tenant: str, reference: str) -> ResolvedVersion:
        if reference != "upper":
            raise AdapterNotFound(f"adapter {reference!r} not found")
        self.pins += 1
        self.acquired += 1
        return ResolvedVersion(tenant=tenant, adapter_id="upper", digest=DIGEST, rank_max=4)

    def unpin(self, digest: str) -> None:
        assert digest == DIGEST
        self.pins -= 1

    def quarantine(self, digest: str) -> None:
        self.quarantined.append(digest)


class SlowTokenizer:
    """The base model's; a prompt that begins with "slow" takes until `gate` is set."""

    def __init__(self) -> None:
        self._tokenizer = load_tokenizer(BASE_MODEL)
        self.gate = threading.Event()
        self.num_waiting = 0

    def encode(self, text: str) -> Encoding:
        if text.startswith("slow"):
            self.num_waiting += 1
            assert self.gate.wait(60)
        return self._tokenizer.encode(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Desk:
    """A front desk with its surroundings."""

    def __init__(self, workers: ThreadPoolExecutor, pinning: ThreadPoolExecutor) -> None:
        self.engine = FakeEngine()
        self.versions = FakeVersions()
        self.tokenizer = SlowTokenizer()
        self.seen = SeenVersions()
        self.desk = FrontDesk(
            engine=self.engine,
            limits=LIMITS,
            versions=self.versions,
            tokenizer=self.tokenizer,
            chat_template=None,
            workers=workers,
            pinning=pinning,
            seen=self.seen,
        )

    async def events(self, request: GenerationRequest) -> list[Event]:
        return [event async for event in self.desk.generate(request)]

    def check_idle(self) -> None:
        assert self.desk.num_running == 0
        assert self.versions.pins == 0
        assert not self.engine.running


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    with ThreadPoolExecutor(2) as workers, ThreadPoolExecutor(2) as pinning:
        desk = Desk(workers, pinning)
        yield desk
        desk.tokenizer.gate.set()
    desk.check_idle()


def asked(
    prompt: str | tuple[int, ...] | None = "hé>",
    adapter: str = "upper",
    *,
    scale: float | None = None,
    **sampling: object,
) -> GenerationRequest:
    return GenerationRequest(
        tenant="default",
        adapters=(AdapterRef(name=adapter, scale=scale),),
        prompt=prompt,
        sampling=SamplingParams(**sampling),  # pyright: ignore[reportArgumentType]
    )


def of_sample(events: Sequence[Event], index: int) -> list[Event]:
    return [event for event in events if isinstance(event, Delta | Finished) and event.index == index]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_one_started_then_deltas_then_one_finished(desk: Desk) -> None:
    started, *deltas, finished = await desk.events(asked())
    assert isinstance(started, Started)
    assert started.version_digest == DIGEST
    assert started.prompt_tokens == 5  # <s> included
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert text_of(deltas) == "hé>"
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.stop) == (FinishReason.EOS, None)
    assert (finished.prompt_tokens, finished.completion_tokens) == (5, 5)
    assert finished.time_to_first_token_s is not None
    assert 0 <= finished.time_to_first_token_s <= finished.total_s


async def test_the_engine_is_asked_for_the_pinned_version(desk: Desk) -> None:
    await desk.events(asked(scale=0.5, top_k=3, seed=7, max_tokens=2))
    (request,) = desk.engine.requests
    assert request.adapter == AdapterUse(digest=DIGEST, scale=0.5)
    assert (request.top_k, request.seed, request.max_tokens) == (3, 7, 2)
    assert desk.seen.name("default", DIGEST) == "upper"
    assert desk.seen.name("other", DIGEST) is None


async def test_base_needs_no_version(desk: Desk) -> None:
    started, *_ = await desk.events(asked(adapter=BASE_ID))
    assert isinstance(started, Started)
    assert started.version_digest is None
    assert desk.versions.acquired == 0
    assert desk.engine.requests[0].adapter is None


async def test_an_unset_seed_is_drawn_and_told(desk: Desk) -> None:
    seeds: set[int] = set()
    for _ in range(3):
        started, *_ = await desk.events(asked())
        assert isinstance(started, Started)
        assert started.seed == desk.engine.requests[-1].seed
        seeds.add(started.seed)
    assert len(seeds) == 3


async def test_token_ids_are_used_as_they_are(desk: Desk) -> None:
    events = await desk.events(asked((71, 72)))
    assert desk.engine.requests[0].token_ids == (71, 72)
    assert text_of(events) == "i"


async def test_tokenizing_holds_up_nobody_who_needs_none(desk: Desk) -> None:
    """Two prompts fill the worker threads; a running neighbour goes on, and prompts of tokens are admitted."""
    alone = await desk.events(asked("neighbour"))
    async with aclosing(desk.desk.generate(asked("neighbour"))) as neighbour:
        seen = [await anext(neighbour), await anext(neighbour)]
        slow = [asyncio.create_task(desk.events(asked("slow"))) for _ in range(4)]
        while desk.tokenizer.num_waiting < 2:
            await asyncio.sleep(0.001)
        async with asyncio.timeout(30):
            seen += [event async for event in neighbour]
            assert text_of(await desk.events(asked((71, 72)))) == "i"
        assert not any(task.done() for task in slow)
    desk.tokenizer.gate.set()
    assert [text_of(events) for events in await asyncio.gather(*slow)] == ["slow"] * 4
    assert [event.token_ids for event in seen if isinstance(event, Delta)] == [
        event.token_ids for event in alone if isinstance(event, Delta)
    ]


async def test_unset_max_tokens_is_what_is_left_of_the_context(desk: Desk) -> None:
    await desk.events(asked((71,) * 60))
    assert desk.engine.requests[0].max_tokens == 4


async def test_a_stop_string_across_tokens_ends_the_generation_and_the_engines_work(desk: Desk) -> None:
    events = await desk.events(asked("ab stop cd", stop=("stop",)))
    assert text_of(events) == "ab "
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.stop) == (FinishReason.STOP, "stop")
    assert finished.completion_tokens == len("ab stop")
    assert len(desk.engine.ended_early) == 1


async def test_samples_come_side_by_side_and_each_ends_once(desk: Desk) -> None:
    started, *events = await desk.events(asked("abc", n=3, seed=7))
    assert isinstance(started, Started) and started.seed == 7
    assert [request.n for request in desk.engine.requests] == [3]
    for index, text in enumerate(("abc", "bc", "c")):
        *deltas, finished = of_sample(events, index)
        assert text_of(deltas) == text
        assert isinstance(finished, Finished) and finished.completion_tokens == len(text) + 1
    assert [event.index for event in events[:3] if isinstance(event, Delta)] == [0, 1, 2]
    assert not desk.engine.ended_early and not desk.engine.cancelled


async def test_a_stop_string_ends_its_sample_alone(desk: Desk) -> None:
    _, *events = await desk.events(asked("ab xyz", n=3, stop=("b",)))
    (request,) = desk.engine.requests
    # The third sample begins behind the "b".
    texts = [text_of(of_sample(events, index)) for index in range(3)]
    assert texts == ["a", "", " xyz"]
    assert sorted(desk.engine.cancelled) == [(request.request_id, 0), (request.request_id, 1)]
    ends = [event for event in events if isinstance(event, Finished)]
    assert [(end.index, end.stop) for end in ends] == [(1, "b"), (0, "b"), (2, None)]


async def test_when_every_sample_has_met_its_stop_string_nothing_runs(desk: Desk) -> None:
    events = await desk.events(asked("abab", n=2, stop=("b",)))
    assert [event.index for event in events if isinstance(event, Finished)] == [1, 0]
    assert text_of(events) == "a"
    assert len(desk.engine.cancelled) == 2
    desk.check_idle()


async def test_tokens_behind_a_stop_string_in_one_delta_are_dropped(desk: Desk) -> None:
    def all_at_once(request: EngineRequest) -> list[TokenDelta]:
        tokens = (*request.token_ids[1:], EOS)
        return [TokenDelta(request_id=request.request_id, token_ids=tokens, finish=FinishReason.EOS)]

    desk.engine.script = all_at_once  # pyright: ignore[reportAttributeAccessIssue]
    _, delta, finished = await desk.events(asked("abcd", stop=("b",)))
    assert isinstance(delta, Delta)
    assert isinstance(finished, Finished)
    assert (delta.text, len(delta.token_ids)) == ("a", 2)
    assert (finished.reason, finished.completion_tokens) == (FinishReason.STOP, 2)


async def test_the_engine_is_asked_for_every_knob(desk: Desk) -> None:
    knobs = {"stop_token_ids": (5,), "min_tokens": 2, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 3}
    rules = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "bad_words": ((1, 2),)}
    await desk.events(asked(**knobs, **rules, logit_bias={7: -3.0}, min_p=0.25))
    await desk.events(asked())
    request, plain = desk.engine.requests
    assert {name: getattr(request, name) for name in knobs} == knobs
    assert request.min_p == 0.25
    assert request.rules == LogitRules(**rules, logit_bias=((7, -3.0),))
    assert plain.rules is None


async def test_echo_gives_text_as_it_was_and_tokens_as_their_text(desk: Desk) -> None:
    started = [(await desk.events(replace(asked(given), echo=True)))[0] for given in ("hé", (256, 71, 72))]
    echoed = [event.prompt for event in started if isinstance(event, Started)]
    assert echoed == [
        Prompt(text="hé", token_ids=desk.engine.requests[0].token_ids),
        Prompt(text="hi", token_ids=(256, 71, 72)),
    ]
    (silent, *_) = await desk.events(asked())
    assert isinstance(silent, Started) and silent.prompt is None


async def test_a_stop_token_counts_and_is_not_text(desk: Desk) -> None:
    desk.engine.script = (
        lambda request: [  # pyright: ignore[reportAttributeAccessIssue]
            TokenDelta(request_id=request.request_id, token_ids=request.token_ids[1:3], finish=FinishReason.STOP)
        ]
    )
    _, delta, finished = await desk.events(asked("ab"))
    assert isinstance(delta, Delta) and isinstance(finished, Finished)
    assert (delta.text, len(delta.token_ids)) == ("a", 2)
    assert (finished.reason, finished.stop, finished.completion_tokens) == (FinishReason.STOP, delta.token_ids[1], 2)


async def test_logprobs_follow_their_tokens_up_to_a_stop_string(desk: Desk) -> None:
    def script(request: EngineRequest) -> Iterator[TokenDelta]:
        tokens = request.token_ids[1:]
        scores = tuple(PositionLogprobs(token_id=token, logprob=-float(token)) for token in tokens)
        yield TokenDelta(request_id=request.request_id, prompt_logprobs=scores[:2])
        yield TokenDelta(
            request_id=request.request_id, token_ids=tokens, logprobs=scores, prompt_logprobs=scores[2:], finish=None
        )

    desk.engine.script = script  # pyright: ignore[reportAttributeAccessIssue]
    _, first, second, finished = await desk.events(asked("abcd", stop=("c",)))
    assert isinstance(first, Delta) and isinstance(second, Delta) and isinstance(finished, Finished)
    assert (first.text, first.token_ids, len(first.prompt_logprobs)) == ("", (), 2)
    assert second.text == "ab"
    assert tuple(each.token_id for each in second.logprobs) == second.token_ids
    assert (len(second.token_ids), len(second.prompt_logprobs), finished.completion_tokens) == (3, 2, 3)
    assert finished.time_to_first_token_s is not None


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "a"), (2, "ab"), (3, "aba"), (4, "ababc")])
async def test_stop_strings_begin_behind_min_tokens(desk: Desk, min_tokens: int, text: str) -> None:
    events = await desk.events(asked("ababc", stop=("ab", "ba", "b"), min_tokens=min_tokens))
    assert text_of(events) == text


async def test_held_back_text_comes_with_the_end(desk: Desk) -> None:
    events = await desk.events(asked("ab st", stop=("stop",)))
    assert text_of(events) == "ab st"
    assert events[-1].reason is FinishReason.EOS  # pyright: ignore[reportAttributeAccessIssue]


async def test_closing_early_cancels_and_gives_back(desk: Desk) -> None:
    desk.engine.gate.clear()
    async with aclosing(desk.desk.generate(asked())) as events:
        async for event in events:
            if isinstance(event, Delta):
                break
        assert desk.versions.pins == 1
        assert len(desk.engine.running) == 1
    desk.check_idle()
    assert len(desk.engine.ended_early) == 1


async def test_cancelling_at_any_await_gives_back(desk: Desk) -> None:
    for num_turns in range(12):
        desk.engine.gate.clear()
        task = asyncio.create_task(desk.events(asked()))
        for _ in range(num_turns):
            await asyncio.sleep(0.001 if num_turns > 6 else 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        desk.check_idle()


async def test_a_running_generation_id_is_refused(desk: Desk) -> None:
    desk.engine.gate.clear()
    request = replace(asked(), generation_id="g-1")
    async with aclosing(desk.desk.generate(request)) as events:
        await anext(events)
        with pytest.raises(GenerationExists, match="g-1"):
            await desk.events(request)
        other = replace(request, tenant="other")
        async with aclosing(desk.desk.generate(other)) as others:
            assert isinstance(await anext(others), Started)
    desk.engine.gate.set()
    assert isinstance((await desk.events(request))[0], Started)


async def test_an_unknown_adapter_is_not_found_and_nothing_stays(desk: Desk) -> None:
    with pytest.raises(AdapterNotFound, match="nope"):
        await desk.events(asked(adapter="nope"))
    assert not desk.engine.requests


async def test_an_engine_failure_comes_through(desk: Desk) -> None:
    desk.engine.script = lambda request: [  # pyright: ignore[reportAttributeAccessIssue]
        TokenDelta(request_id=request.request_id, token_ids=(71,)),
        EngineUnavailable("gone"),
    ]
    with pytest.raises(EngineUnavailable, match="gone"):
        await desk.events(asked())


async def test_a_stream_that_just_ends_is_an_error(desk: Desk) -> None:
    desk.engine.script = lambda request: []
    with pytest.raises(EngineUnavailable, match="without a result"):
        await desk.events(asked())


async def test_draining_waits_and_admits_nothing(desk: Desk) -> None:
    desk.engine.gate.clear()
    running = asyncio.create_task(desk.events(asked()))
    while not desk.engine.running:
        await asyncio.sleep(0)
    assert not await desk.desk.drain(0.01)
    with pytest.raises(Draining, match="shutting down"):
        await desk.events(asked())
    desk.engine.gate.set()
    assert await desk.desk.drain(5)
    assert isinstance((await running)[-1], Finished)


NAN = float("nan")
BAD_KNOBS: dict[str, tuple[object, ...]] = {
    "min_p": (-0.1, 1.1, NAN),
    "repetition_penalty": (0.0, 0.01, -1.0, 65.0, NAN),
    "presence_penalty": (-2.1, 2.1, NAN),
    "frequency_penalty": (-2.1, 2.1, NAN),
    "logit_bias": ({1: 101.0}, {1: NAN}, dict.fromkeys(range(301), 1.0)),
    "bad_words": (((),), ((1,) * 17,), ((1,),) * 65),
    "stop_token_ids": ((1,) * 65,),
    "min_tokens": (-1,),
    "logprobs": (-1, 21),
    "prompt_logprobs": (-1, 21),
    "n": (0, -1, 65),
}
REFUSED: list[tuple[GenerationRequest, str]] = [
    (asked(None), "prompt"),
    (asked(""), "prompt"),
    (asked(()), "prompt"),
    (asked(adapter=""), "adapter.name"),
    (replace(asked(), adapters=()), "adapter"),
    (replace(asked(), adapters=(AdapterRef(name="a"), AdapterRef(name="b"))), "adapter"),
    (asked(scale=float("nan")), "adapter.scale"),
    (asked(scale=1e9), "adapter.scale"),
    (asked(adapter=BASE_ID, scale=2.0), "adapter.scale"),
    (replace(asked(), generation_id="a b"), "generation_id"),
    (replace(asked(), generation_id="x" * 129), "generation_id"),
    (asked(temperature=float("nan")), "sampling.temperature"),
    (asked(temperature=float("inf")), "sampling.temperature"),
    (asked(temperature=-0.1), "sampling.temperature"),
    (asked(top_p=0.0), "sampling.top_p"),
    (asked(top_p=1.01), "sampling.top_p"),
    (asked(top_p=float("nan")), "sampling.top_p"),
    (asked(top_k=-1), "sampling.top_k"),
    (asked(max_tokens=0), "sampling.max_tokens"),
    (asked(seed=-1), "sampling.seed"),
    (asked(seed=2**64), "sampling.seed"),
    *((asked(**{field: value}), f"sampling.{field}") for field, values in BAD_KNOBS.items() for value in values),
    (asked(stop=("x",) * 17), "sampling.stop"),
    (asked(stop=("",)), "sampling.stop"),
    (asked(stop=("x" * 257,)), "sampling.stop"),
]


@pytest.mark.parametrize(("request_", "field"), REFUSED, ids=[f"{i}-{field}" for i, (_, field) in enumerate(REFUSED)])
def test_bad_requests_name_their_field(request_: GenerationRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_request(request_)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"logit_bias": {260: 1.0}}, "logit_bias"),
        ({"bad_words": ((1, 260),)}, "bad_words"),
        ({"stop_token_ids": (260,)}, "stop_token_ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        ({"min_tokens": 62}, "min_tokens"),
    ],
)
def test_what_the_model_bounds_is_checked_with_its_numbers(sampling: dict[str, object], field: str) -> None:
    request = asked(**sampling)
    check_request(request)
    with pytest.raises(InvalidRequest, match=r"260|-1|max_tokens 3|max_tokens 61") as refused:
        engine_request("r", (1, 2, 3), adapter=None, sampling=request.sampling, limits=LIMITS)
    assert refused.value.field == f"sampling.{field}"


def test_the_edges_of_the_knobs_are_inside() -> None:
    edges = asked(
        min_p=1.0,
        repetition_penalty=1 / 64,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=dict.fromkeys(range(260), -100.0),
        bad_words=((259,) * 16,) * 64,
        stop_token_ids=(259,) * 64,
        min_tokens=3,
        max_tokens=3,
        logprobs=20,
        prompt_logprobs=0,
        temperature=0.0,
        n=64,
    )
    check_request(edges)
    assert engine_request("r", (1,), adapter=None, sampling=edges.sampling, limits=LIMITS).min_tokens == 3


def test_the_edges_of_the_limits_are_inside() -> None:
    edges = asked(temperature=0.0, top_p=1.0, top_k=1, max_tokens=1, seed=2**64 - 1, stop=("x" * 256,) * 16)
    assert check_request(edges).name == "upper"


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "field", "limit"),
    [
        ((), None, "prompt", "at least one"),
        ((260,), None, "prompt.tokens", "260"),
        ((-1,), None, "prompt.tokens", "260"),
        ((1,) * 64, None, "prompt", "64"),
        ((1,) * 60, 5, "sampling.max_tokens", "64"),
        ((260,) * 64, None, "prompt", "64"),
    ],
)
def test_tokens_over_a_limit_are_refused_with_it(
    token_ids: tuple[int, ...], max_tokens: int | None, field: str, limit: str
) -> None:
    with pytest.raises(InvalidRequest, match=limit) as refused:
        check_tokens(token_ids, max_tokens, LIMITS)
    assert refused.value.field == field


def test_the_pool_bounds_a_sequence_too() -> None:
    small = replace(LIMITS, pool_tokens=32)
    assert check_tokens((1,) * 30, 2, small) == 2
    with pytest.raises(LorasrvError, match="pool 32"):
        check_tokens((1,) * 30, 3, small)
    assert check_tokens((1,), None, replace(LIMITS, context_tokens=4096, pool_tokens=4096)) == 256
