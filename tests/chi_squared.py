"""Many draws in one batch, and how well they fit exact probabilities."""

import math
from collections.abc import Mapping, Sequence

import torch

from drawing import sample_tokens
from exact_probs import Moment
from lorasrv.engine.batch import SampleInput
from lorasrv.engine.sampling import logit_edits

# Seeds are fixed, so a test passes always or never; among some hundred right p-values, 1e-4 is seldom.
ACCEPTED = 1e-4
# What is wrong must show far more clearly than chance could.
REJECTED = 1e-6


def draw(now: Moment, logits: Sequence[float], numbers: Sequence[Mapping[str, int]]) -> list[int]:
    """The token of `now` for each seed and position; logits are `[vocab_size]`."""
    asked = now.request
    edits = logit_edits(asked, now.tokens, now.eos)
    rows = [
        SampleInput(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            edits=edits,
            **number,
        )
        for number in numbers
    ]
    tokens = sample_tokens(torch.tensor([list(logits)]).repeat(len(rows), 1), rows)
    found = [token for token in tokens if token is not None]
    assert len(found) == len(rows)
    return found


def counted(values: Sequence[int], size: int) -> list[int]:
    return torch.tensor(values).bincount(minlength=size).tolist()


def p_value(counts: Sequence[int], probs: Sequence[float]) -> float:
    """Pearson's chi-squared test of counts; 0 where something impossible came.

    Cells are joined, the rarest first, until 5 are expected in each.
    """
    total = sum(counts)
    if any(count for count, prob in zip(counts, probs, strict=True) if prob == 0):
        return 0.0
    cells: list[tuple[int, float]] = []
    count, want = 0, 0.0
    for prob, found in sorted(zip(probs, counts, strict=True)):
        count, want = count + found, want + total * prob
        if want >= 5:
            cells.append((count, want))
            count, want = 0, 0.0
    if want:
        last_count, last_want = cells.pop()
        cells.append((last_count + count, last_want + want))
    if len(cells) == 1:
        return 1.0
    statistic = math.fsum((count - want) ** 2 / want for count, want in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()
