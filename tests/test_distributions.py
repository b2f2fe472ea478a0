"""Tokens drawn by every knob, alone and together, against exact probabilities.

What is nearly right (a knob one token off, stages in another order than the documented one) must be told from it by the
same draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from chi_squared import ACCEPTED, REJECTED, counted, draw, p_value
from exact_probs import (
    Moment,
    Stage,
    exact_probs,
    masks,
    min_p,
    moment,
    repetition,
    sums,
    temperature,
    top_k,
    top_p,
    transformers_probs,
)

NUM_DRAWS = 3000

# What tells one draw from the next: for an index, its seed and position.
STREAMS: dict[str, Callable[[int], dict[str, int]]] = {
    "seed": lambda index: {"seed": 1000 + index, "position": 10},
    "high bits of the seed": lambda index: {"seed": (index << 32) + 5, "position": 10},
    "position": lambda index: {"seed": 77, "position": index},
    "sample": lambda index: {"seed": 79, "position": 10, "sample": index},
    "high positions": lambda index: {"seed": 78, "position": 2**31 - NUM_DRAWS // 2 + index},
}

LOGITS = [2.0, -1.0, 0.5, 0.45, 1.7, -1.6, -0.4, 1.2, 0.7, -0.8, 1.55, 0.1]
NOW: dict[str, Any] = {"prompt": (0, 1, 1, 4, 7, 3), "generated": (4, 4, 2, 9, 4), "eos": {10}}


def drawn_counts(now: Moment) -> dict[str, list[int]]:
    """By stream, and those of all together."""
    numbers = [number(index) for number in STREAMS.values() for index in range(NUM_DRAWS)]
    tokens = draw(now, LOGITS, numbers)
    counts = {
        name: counted(tokens[at * NUM_DRAWS : (at + 1) * NUM_DRAWS], len(LOGITS)) for at, name in enumerate(STREAMS)
    }
    return counts | {"all": counted(tokens, len(LOGITS))}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings, and what must be told from them: other settings, or other stages."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    near: tuple[dict[str, Any], ...] = ()
    orders: tuple[tuple[Stage, ...], ...] = ()


PROMPT_TOO: dict[str, Any] = {"prompt": (), "generated": NOW["prompt"] + NOW["generated"]}
BIAS = ((4, -1.5), (8, 0.75), (5, 2.0))
BAD_WORDS = ((7,), (9, 4, 0), (4, 2), (2, 4, 8), (0, 1, 1, 4, 7, 3, 4, 4, 2, 9, 4, 3), (5, *range(11), 6))
ALL_KNOBS: dict[str, Any] = {
    "temperature": 1.5,
    "top_k": 5,
    "top_p": 0.7,
    "min_p": 0.5,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.3,
    "frequency_penalty": -0.25,
    "logit_bias": ((2, 1.0), (5, 2.5), (9, 2.0), (11, 1.0)),
    "bad_words": ((9, 4, 0), (6,)),
    "min_tokens": 6,
    "stop_token_ids": (11,),
}
WRONG_ORDERS: dict[str, tuple[Stage, ...]] = {
    "repetition penalty behind the sums": (sums, repetition, masks, temperature, top_k, top_p, min_p),
    "temperature before the sums": (repetition, temperature, sums, masks, top_k, top_p, min_p),
    "masks behind top_k": (repetition, sums, temperature, top_k, masks, top_p, min_p),
    "masks last": (repetition, sums, temperature, top_k, top_p, min_p, masks),
    "temperature behind top_p": (repetition, sums, masks, top_k, top_p, temperature, min_p),
    "temperature last": (repetition, sums, masks, top_k, top_p, min_p, temperature),
    "min_p before temperature": (repetition, sums, masks, min_p, temperature, top_k, top_p),
    "top_p before top_k": (repetition, sums, masks, temperature, top_p, top_k, min_p),
    "min_p before top_p": (repetition, sums, masks, temperature, top_k, min_p, top_p),
    "the model's logits narrowed": (temperature, top_k, top_p, min_p, repetition, sums, masks),
}


def all_knobs(blind_to: tuple[str, ...], spare: tuple[str, ...], **changed: Any) -> "Case":
    """All knobs at once. What top_k, top_p and min_p keep are beginnings of one list, so only the shortest shows: what
    `spare` names could be left out, and the orders in `blind_to` give the same."""
    settings = ALL_KNOBS | changed
    return Case(
        settings=settings,
        near=tuple({name: settings[name] for name in settings if name != out} for out in settings if out not in spare),
        orders=tuple(order for name, order in WRONG_ORDERS.items() if name not in blind_to),
    )


def divides_always(logits: list[float], now: Moment) -> list[float]:
    """A wrong repetition penalty."""
    return [x / now.rules.repetition_penalty if i in now.tokens else x for i, x in enumerate(logits)]


CASES = {
    "seed alone": Case(near=({"temperature": 1.1}, {"top_k": 11}, {"min_p": 0.03})),
    "temperature": Case(settings={"temperature": 0.7}, near=({}, {"temperature": 0.8}, {"temperature": 1 / 0.7})),
    "high temperature": Case(settings={"temperature": 5.0}, near=({}, {"temperature": 3.0})),
    "top_k": Case(settings={"top_k": 5}, near=({}, {"top_k": 4}, {"top_k": 6})),
    "top_p": Case(settings={"top_p": 0.75}, near=({}, {"top_p": 0.7}, {"top_p": 0.8})),
    "min_p": Case(settings={"min_p": 0.22}, near=({}, {"min_p": 0.25}, {"min_p": 0.2})),
    "repetition_penalty": Case(
        settings={"repetition_penalty": 1.7},
        near=({}, {"repetition_penalty": 1.4}, {"repetition_penalty": 1.7, "prompt": ()}),
        orders=((divides_always,),),
    ),
    "repetition_penalty below 1": Case(
        settings={"repetition_penalty": 0.6}, near=({}, {"repetition_penalty": 1 / 0.6}), orders=((divides_always,),)
    ),
    "presence_penalty": Case(
        settings={"presence_penalty": 0.8},
        near=({}, {"frequency_penalty": 0.8}, {"presence_penalty": 0.8} | PROMPT_TOO, {"presence_penalty": -0.8}),
    ),
    "frequency_penalty": Case(
        settings={"frequency_penalty": 0.4},
        near=({}, {"presence_penalty": 0.4}, {"frequency_penalty": 0.4} | PROMPT_TOO, {"frequency_penalty": 0.3}),
    ),
    "negative penalties": Case(
        settings={"frequency_penalty": -0.3, "presence_penalty": -0.7},
        near=({"frequency_penalty": -0.3}, {"presence_penalty": -0.7}),
    ),
    "logit_bias": Case(settings={"logit_bias": BIAS}, near=({}, {"logit_bias": BIAS[:2]}, {"logit_bias": BIAS[1:]})),
    "bad_words": Case(
        settings={"bad_words": BAD_WORDS},
        near=(
            {},
            *({"bad_words": BAD_WORDS[:i] + BAD_WORDS[i + 1 :]} for i in (0, 1, 4)),
            {"bad_words": (*BAD_WORDS, (8,))},
            {"bad_words": (*BAD_WORDS, (6,))},
        ),
    ),
    "min_tokens": Case(
        settings={"min_tokens": 6, "stop_token_ids": (2, 8)},
        near=({}, {"min_tokens": 6}, {"min_tokens": 6, "stop_token_ids": (2, 8), "ignore_eos": True}),
    ),
    "min_tokens reached": Case(settings={"min_tokens": 5, "stop_token_ids": (2,)}, near=({"min_tokens": 6},)),
    "min_tokens ignoring the end": Case(
        settings={"min_tokens": 6, "stop_token_ids": (2,), "ignore_eos": True},
        near=({"min_tokens": 6, "stop_token_ids": (2,)},),
    ),
    "temperature, min_p": Case(
        settings={"temperature": 2.0, "min_p": 0.4}, orders=((min_p, temperature),), near=({"min_p": 0.4},)
    ),
    "temperature, top_p": Case(settings={"temperature": 2.0, "top_p": 0.7}, orders=((top_p, temperature),)),
    "top_k, top_p": Case(settings={"top_k": 6, "top_p": 0.8}, orders=((top_p, top_k),)),
    "top_p, min_p": Case(settings={"top_p": 0.85, "min_p": 0.2}, orders=((min_p, top_p),)),
    "repetition_penalty, logit_bias": Case(
        settings={"repetition_penalty": 2.0, "logit_bias": BIAS}, orders=((sums, repetition),)
    ),
    "logit_bias, temperature": Case(settings={"logit_bias": BIAS, "temperature": 2.0}, orders=((temperature, sums),)),
    "bad_words, top_k": Case(settings={"bad_words": BAD_WORDS, "top_k": 5}, orders=((top_k, masks),)),
    "bad_words, top_p": Case(settings={"bad_words": BAD_WORDS, "top_p": 0.85}, orders=((top_p, masks),)),
    "bad_words, min_p": Case(settings={"bad_words": ((0,), (4,)), "min_p": 0.5}, orders=((min_p, masks),)),
    "min_tokens, bad_words": Case(
        settings={"min_tokens": 9, "bad_words": BAD_WORDS}, near=({"min_tokens": 9}, {"bad_words": BAD_WORDS})
    ),
    "penalties, logit_bias": Case(
        settings={"presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": BIAS},
        near=({"logit_bias": BIAS}, {"presence_penalty": 0.5, "frequency_penalty": 0.3}),
    ),
    "all, top_k shows": all_knobs(blind_to=("min_p before top_p",), spare=("top_p", "min_p")),
    "all, top_p shows": all_knobs(
        blind_to=("top_p before top_k",), spare=("top_k", "min_p"), temperature=1.2, top_k=8, top_p=0.8, min_p=0.12
    ),
    "all, min_p shows": all_knobs(
        blind_to=("top_p before top_k", "temperature behind top_p"),
        spare=("top_k", "top_p"),
        temperature=1.6,
        top_k=8,
        top_p=0.8,
        min_p=0.54,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_draws_fit_the_exact_probabilities_and_nothing_near_them(case: Case) -> None:
    now = moment(**(NOW | case.settings))
    counts = drawn_counts(now)
    probs = exact_probs(LOGITS, now)
    for stream, found in counts.items():
        assert p_value(found, probs) > ACCEPTED, stream
    for near in case.near:
        assert p_value(counts["all"], exact_probs(LOGITS, moment(**(NOW | near)))) < REJECTED, near
    for order in case.orders:
        assert p_value(counts["all"], exact_probs(LOGITS, now, order)) < REJECTED, order


HAS_NO_PROCESSOR = {"presence_penalty", "frequency_penalty"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if not HAS_NO_PROCESSOR & case.settings.keys()]
)
def test_the_exact_probabilities_are_transformers(case: Case) -> None:
    for settings in (case.settings, *case.near):
        now = moment(**(NOW | settings))
        if not HAS_NO_PROCESSOR & settings.keys():
            assert exact_probs(LOGITS, now) == pytest.approx(transformers_probs(LOGITS, now), abs=1e-12)
