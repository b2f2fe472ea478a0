"""Knobs at their ends and logits that tie, against the exact probabilities; how rows of one batch do not mix."""

import math
from typing import Any

import pytest
import torch

from chi_squared import ACCEPTED, REJECTED, counted, draw, p_value
from drawing import sample_tokens
from exact_probs import exact_probs, moment
from lorasrv.engine.batch import SampleInput
from lorasrv.engine.sampling import logit_edits
from lorasrv.model.logit_edits import LogitEdits

NUM_DRAWS = 2500
MASKED = -math.inf
TIES = [1.0, 0.0, 1.0, 2.0, 1.0, -1.0, 1.0, 2.0]
EQUAL = [0.5] * 8  # shares of exactly 1/8
HUGE = 3.0e38  # near the largest float32


def fine(step: float) -> list[float]:
    """Logits `step` apart, as float32 holds them."""
    return torch.tensor([step * (index % 5) for index in range(11)]).tolist()


EDGES: dict[str, tuple[list[float], dict[str, Any]]] = {
    "top_k among equals keeps the lowest ids": (EQUAL, {"top_k": 3}),
    "top_k cuts through a tie": (TIES, {"top_k": 4}),
    "top_k 1 of a tied best": (TIES, {"top_k": 1}),
    "top_k is the vocabulary": (TIES, {"top_k": 8}),
    "top_k above the vocabulary": (TIES, {"top_k": 2**31}),
    "top_k above what is not masked": (TIES, {"top_k": 6, "bad_words": ((3,), (7,), (0,), (2,))}),
    "top_p reached exactly": (EQUAL, {"top_p": 0.5}),
    "top_p passed by little": (EQUAL, {"top_p": 0.51}),
    "top_p cuts through a tie": (TIES, {"top_p": 0.7}),
    "top_p tiny": (TIES, {"top_p": 1e-30}),
    "top_p just below 1": (EQUAL, {"top_p": 1 - 2**-24}),
    "top_p of what top_k left, in a tie": (EQUAL, {"top_k": 4, "top_p": 0.75}),
    "min_p 1 keeps every best": (TIES, {"min_p": 1.0}),
    "min_p 1 behind temperature": (TIES, {"min_p": 1.0, "temperature": 0.3}),
    "min_p of a tie that top_k cut": (TIES, {"min_p": 1.0, "top_k": 1}),
    "min_p tiny": (TIES, {"min_p": 1e-45}),
    "min_p when the best is masked": (TIES, {"min_p": 0.9, "bad_words": ((3,), (7,))}),
    "temperature tiny": (fine(1e-4), {"temperature": 1e-4}),
    "temperature tiny is greedy": (TIES[:4], {"temperature": 1e-4}),
    "temperature tiny of a tied best": (TIES, {"temperature": 1e-40}),
    "temperature huge": (fine(100.0), {"temperature": 100.0}),
    "temperature huge, min_p": (fine(50.0), {"temperature": 100.0, "min_p": 0.3}),
    "temperature 0 of a tied best": (TIES, {"temperature": 0.0}),
    "bias +100": (TIES, {"logit_bias": ((5, 100.0),)}),
    "bias +100 on two, min_p": (TIES, {"logit_bias": ((5, 100.0), (0, 99.0)), "min_p": 0.1}),
    "bias -100": (TIES, {"logit_bias": ((3, -100.0), (7, -100.0))}),
    "bias -100 on all but one, min_p 0": (TIES, {"logit_bias": tuple((token, -100.0) for token in range(7))}),
    "bias -100 on all is none": (TIES, {"logit_bias": tuple((token, -100.0) for token in range(8)), "min_p": 0.2}),
    "bias of a masked token": (TIES, {"logit_bias": ((3, 100.0),), "bad_words": ((3,),)}),
    "bias +100 against penalties": (
        TIES,
        {"logit_bias": ((1, 1.5),), "presence_penalty": 2.0, "frequency_penalty": 2.0, "generated": (1, 1, 3)},
    ),
    "presence penalty of many": (TIES, {"presence_penalty": 2.0, "generated": (3,) * 50}),
    "repetition penalty at its ends, 64": (TIES, {"repetition_penalty": 64.0, "prompt": (3, 5, 0)}),
    "repetition penalty at its ends, 1/64": (TIES, {"repetition_penalty": 1 / 64, "prompt": (5, 1)}),
    "repetition penalty of logit 0": ([0.0, -0.0, 1.0, -1.0], {"repetition_penalty": 3.0, "prompt": (0, 1, 2, 3)}),
    "one token is left": (TIES, {"bad_words": tuple((token,) for token in range(7))}),
    "bad word over prompt and output": (TIES, {"bad_words": ((2, 1, 3),), "prompt": (2,), "generated": (1,)}),
    "bad word longer than the tokens": (TIES, {"bad_words": ((0, 1, 2, 2, 3),), "prompt": (1, 2)}),
    "bad word of one token over and over": (TIES, {"bad_words": ((3, 3, 3),), "prompt": (3, 3, 3)}),
    "the model itself says never": ([MASKED, 0.0, MASKED, 0.4, -0.2], {"top_k": 4, "top_p": 0.9}),
    "never, penalised and biased": (
        [MASKED, 0.0, 0.4, -0.2],
        {"repetition_penalty": 2.0, "logit_bias": ((0, 100.0),), "prompt": (0, 2)},
    ),
    "logits near the largest float": ([HUGE, HUGE, -HUGE, 0.0], {"temperature": 0.5, "min_p": 0.5}),
    "one token": ([0.3], {"temperature": 2.0, "top_p": 0.5}),
    "vocabulary of 5, of no whole word of four": ([0.0, 0.1, 0.2, 0.3, 0.4], {}),
}


@pytest.mark.parametrize(("logits", "settings"), EDGES.values(), ids=EDGES.keys())
def test_edges_fit_the_exact_probabilities(logits: list[float], settings: dict[str, Any]) -> None:
    now = moment(**({"prompt": (0,)} | settings))
    numbers = [{"seed": index * 0x9E3779B97F4A7C15, "position": index % 7} for index in range(NUM_DRAWS)]
    tokens = draw(now, logits, numbers)
    assert p_value(counted(tokens, len(logits)), exact_probs(logits, now)) > ACCEPTED


@pytest.mark.parametrize(
    "neutral",
    [
        {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        {"logit_bias": tuple((token, 0.0) for token in range(8))},
        {"logit_bias": tuple((token, 64.0) for token in range(8))},  # the same for all
        {"bad_words": ((6, 6, 6),)},
        {"min_tokens": 1, "stop_token_ids": (3,)},
        {"min_p": 0.0, "top_p": 1.0, "top_k": 8},
        {"min_p": 1e-30},
        {"top_p": 1 - 2**-24},
    ],
)
def test_neutral_settings_draw_the_same_tokens_as_none(neutral: dict[str, Any]) -> None:
    numbers = [{"seed": index, "position": 3} for index in range(1000)]
    state: dict[str, Any] = {"prompt": (0, 3, 5), "generated": (3, 3)}
    assert draw(moment(**state, **neutral), TIES, numbers) == draw(moment(**state), TIES, numbers)


def test_rows_that_are_not_finite_leave_the_others_their_distribution() -> None:
    """Every other row cannot be drawn from; all have edits and every knob."""
    settings: dict[str, Any] = {"temperature": 1.3, "top_k": 6, "top_p": 0.95, "min_p": 0.05}
    rules: dict[str, Any] = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": ((5, 1.0),)}
    now = moment(prompt=(0, 1), generated=(3, 3), bad_words=((2,),), **settings, **rules)
    edits = logit_edits(now.request, now.tokens, now.eos)
    broken = [[math.nan] * 8, [MASKED] * 8, [0.0] * 6 + [math.inf, 0.0], [0.0] * 7 + [math.nan]]
    logits = torch.tensor([row for index in range(NUM_DRAWS) for row in (TIES, broken[index % 4])])
    rows = [SampleInput(seed=index // 2, position=4, edits=edits, **settings) for index in range(2 * NUM_DRAWS)]
    tokens = sample_tokens(logits, rows)
    assert set(tokens[1::2]) == {None}
    found = [token for token in tokens[::2] if token is not None]
    assert found == draw(now, TIES, [{"seed": index, "position": 4} for index in range(NUM_DRAWS)])
    assert p_value(counted(found, 8), exact_probs(TIES, now)) > ACCEPTED


def test_rows_of_all_kinds_in_one_batch_each_fit_their_own() -> None:
    """The edges side by side, as they come: a row's knobs, and no others, are its own."""
    named = {name: (logits, moment(**({"prompt": (0,)} | settings))) for name, (logits, settings) in EDGES.items()}
    names, kinds = zip(*((name, kind) for name, kind in named.items() if len(kind[0]) == 8), strict=True)
    rounds = 400
    order = torch.randperm(rounds * len(kinds), generator=torch.Generator().manual_seed(2)).tolist()
    edits: list[LogitEdits | None] = [logit_edits(now.request, now.tokens, now.eos) for _, now in kinds]
    rows: list[SampleInput] = []
    for index in order:
        asked = kinds[index % len(kinds)][1].request
        knobs = {name: getattr(asked, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        rows.append(SampleInput(**knobs, edits=edits[index % len(kinds)], seed=index, position=2))
    tokens = sample_tokens(torch.tensor([kinds[index % len(kinds)][0] for index in order]), rows)
    by_kind: list[list[int]] = [[] for _ in kinds]
    for index, token in zip(order, tokens, strict=True):
        assert token is not None
        by_kind[index % len(kinds)].append(token)
    for name, (logits, now), found in zip(names, kinds, by_kind, strict=True):
        assert p_value(counted(found, 8), exact_probs(logits, now)) > ACCEPTED, name
    told = sum(p_value(counted(found, 8), exact_probs(*kinds[at - 1])) < REJECTED for at, found in enumerate(by_kind))
    assert told > len(kinds) / 2, "the kinds are too alike for this to show anything"
