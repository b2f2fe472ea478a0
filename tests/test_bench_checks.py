"""A server with wrong output gets no score: each check against servers that are wrong in one way."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from fake_backend import FakeBackend, ask, refuse
from lorasrv_bench.asks import Ask
from lorasrv_bench.checks import (
    Verdict,
    check_calls,
    check_differ,
    check_repeats,
    check_scores,
    sampled,
)
from lorasrv_bench.load import Call, End, send
from virtual_loop import run_virtually

NAMES = ("a", "b", "c")
ASKS = {index: ask(index, name=NAMES[index % 3], adapter=index % 3) for index in range(12)}
VERSIONS = {name: name for name in NAMES}


def calls_of(backend: FakeBackend, asks: Sequence[Ask] = tuple(ASKS.values())) -> tuple[Call, ...]:
    return run_virtually(send(asks, backend, start_s=0.0, concurrency=4)).calls


def scores(under_load: FakeBackend, alone: FakeBackend) -> Verdict:
    sample = sampled(calls_of(under_load), seed=0)
    return asyncio.run(check_scores(alone, sample, ASKS, lambda asked: "b" if asked.name == "a" else "a", 0.5))


def other(name: str) -> str:
    return NAMES[(NAMES.index(name) + 1) % 3]


def test_a_right_server_passes_all() -> None:
    backend = FakeBackend()
    calls = calls_of(backend)
    told = check_calls(calls, ASKS, VERSIONS)
    assert told == Verdict(wrong=(), done=("12 lengths", "12 versions"))
    assert scores(backend, backend) == Verdict(
        wrong=(), done=("32 tokens scored alone", "8 of 8 answers told from other weights'")
    )
    assert asyncio.run(check_differ(backend, NAMES, [(1, 2), (3,)], 0)).wrong == ()
    repeated = asyncio.run(check_repeats(backend, calls, ASKS, exact=True))
    assert repeated == Verdict(wrong=(), done=("12 of 12 answers repeated to the letter",))


def test_a_sample_has_as_many_adapters_as_there_are() -> None:
    calls = calls_of(FakeBackend())
    sample = sampled(calls, seed=1)
    assert len(sample) == len({call.index for call in sample}) == 8
    assert {call.adapter for call in sampled(calls, seed=1, size=3)} == {0, 1, 2}
    assert sampled(calls, seed=1) == sample != sampled(calls, seed=2)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (FakeBackend(told=lambda a, n, token: token if n < 3 else None), "3 tokens came, 4 were asked for"),
        (
            FakeBackend(end=lambda a, n: End(prompt_tokens=2, output_tokens=n, version=a.name)),
            "the server read 2 tokens of a prompt of 3",
        ),
        (
            FakeBackend(end=lambda a, n: End(prompt_tokens=3, output_tokens=n, version="")),
            "a was served by version base",
        ),
        (FakeBackend(at_start=refuse), "no request succeeded; the first failed with UNAVAILABLE: gone"),
    ],
)
def test_what_an_answer_says_of_itself_is_checked(backend: FakeBackend, message: str) -> None:
    assert message in check_calls(calls_of(backend), ASKS, VERSIONS).wrong[0]


def test_known_answers_are_compared_to_the_letter() -> None:
    known = [ask(prompt="hi", exact_tokens=False, answer="?")]
    (call,) = calls_of(FakeBackend(), known)
    assert check_calls([call], {0: replace(known[0], answer=call.text)}, {}).done == ("1 answers to the letter",)
    assert "not '?'" in check_calls([call], {0: known[0]}, {}).wrong[0]


@pytest.mark.parametrize(
    "wrong",
    [
        FakeBackend(weights=lambda a: other(a.name) if a.index % 2 else a.name),  # adapters swapped in a batch
        FakeBackend(weights=lambda a: "base"),  # adapters ignored in a batch
        FakeBackend(told=lambda a, n, token: (token + 1) % 50 if n == 3 else token),  # one token of each
    ],
)
def test_wrong_tokens_under_load_are_found_alone(wrong: FakeBackend) -> None:
    assert "nats from the likeliest when scored alone" in scores(wrong, FakeBackend()).wrong[0]


def test_a_server_that_ignores_adapters_always_is_found() -> None:
    base_only = FakeBackend(weights=lambda a: "base")
    assert scores(base_only, base_only).wrong == (
        "8 answers pass as well under other weights: adapters make no difference",
    )
    assert asyncio.run(check_differ(base_only, NAMES, [(1, 2), (3,)], 0)).wrong == (
        "a and b give the same 16 tokens to each of 2 prompts",
        "a and c give the same 16 tokens to each of 2 prompts",
    )


def test_repeating_is_demanded_of_exact_servers_only() -> None:
    calls = calls_of(FakeBackend(told=lambda a, n, token: (token + (a.index == 5)) % 50))
    strict, lax = (asyncio.run(check_repeats(FakeBackend(), calls, ASKS, exact=exact)) for exact in (True, False))
    assert strict.wrong == ("request 5: c gives another answer when asked alone",)
    assert lax == Verdict(wrong=(), done=("11 of 12 answers repeated to the letter",))


def test_models_may_agree_on_a_prompt() -> None:
    backend = FakeBackend(weights=lambda asked: "base" if asked.prompt == (1, 2) else asked.name)
    assert asyncio.run(check_differ(backend, NAMES, [(1, 2), (3,)], 0)).wrong == ()
    assert asyncio.run(check_differ(backend, NAMES, [(1, 2)], 0)).wrong
