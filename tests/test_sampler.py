"""Drawn tokens against exact probabilities, and the independence of a row from its batch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasrv.engine.batch import SampleInput
from lorasrv.model.sampler import sample_tokens
from lorasrv_kernels.reference import philox

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.7, -3.0, 0.0, 1.2, 0.5, -0.4, 1.69])
NUM_DRAWS = 20000


def row(**settings: Any) -> SampleInput:
    defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "seed": 0, "position": 0}
    return SampleInput(**(defaults | settings))


def exact_probs(temperature: float, top_p: float, top_k: int | None) -> list[float]:
    """Worked out token by token, without tensors."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(LOGITS.tolist())}
    likely = sorted(weights, key=lambda token: (-weights[token], token))[:top_k]
    total, share, kept = sum(weights[token] for token in likely), 0.0, []
    for token in likely:
        if share < top_p:
            kept.append(token)
        share += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(LOGITS))]


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, None),
        (0.5, 1.0, None),
        (3.0, 1.0, None),
        (1.0, 1.0, 3),
        (1.0, 0.6, None),
        (0.8, 0.7, 5),
        (1.0, 1.0, 6),
    ],
)
def test_frequencies_fit_the_exact_probabilities(
    vary: str, temperature: float, top_p: float, top_k: int | None
) -> None:
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    rows = [row(**settings, **{vary: 1000 + index}) for index in range(NUM_DRAWS)]
    counts = torch.tensor(sample_tokens(LOGITS.expand(NUM_DRAWS, -1), rows)).bincount(minlength=len(LOGITS)).tolist()
    probs = exact_probs(temperature, top_p, top_k)
    assert all(count == 0 for count, prob in zip(counts, probs, strict=True) if prob == 0)
    kept = [(count, NUM_DRAWS * prob) for count, prob in zip(counts, probs, strict=True) if prob > 0]
    statistic = sum((count - want) ** 2 / want for count, want in kept)
    degrees = len(kept) - 1
    assert degrees >= 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees) + 4  # beyond the 0.9999 quantile for 1 to 10 degrees


def test_temperature_zero_takes_the_largest_and_of_equal_ones_the_first() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -0.5, -0.6]])
    assert sample_tokens(logits, [row(temperature=0.0, seed=seed) for seed in (1, 2, 3)]) == (1, 0, 2)


def test_equal_logits_at_the_border_keep_the_lowest_ids() -> None:
    """Tokens 2, 3 and 8 are equal and rank 5 to 7: top_k 5 keeps token 2 of them."""
    rows = [row(top_k=5, temperature=5.0, seed=seed) for seed in range(2000)]
    assert set(sample_tokens(LOGITS.expand(2000, -1), rows)) == {0, 4, 10, 7, 2}


def test_top_k_one_and_a_tiny_top_p_are_greedy() -> None:
    rows = [row(top_k=1, seed=seed) for seed in range(50)] + [row(top_p=1e-9, seed=seed) for seed in range(50)]
    assert set(sample_tokens(LOGITS.expand(100, -1), rows)) == {0}


def batch_logits(num_rows: int, vocab_size: int = 333) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(7)) * 2


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = batch_logits(40)
    rows = [
        row(
            temperature=(0.0, 0.7, 1.0, 1.5)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(None, 20, 5)[i % 3],
            seed=i // 2,
            position=i,
        )
        for i in range(40)
    ]
    together = sample_tokens(logits, rows)
    assert len(set(together)) > 10
    assert tuple(sample_tokens(logits[i : i + 1], [rows[i]])[0] for i in range(40)) == together
    backwards = list(reversed(range(40)))
    assert sample_tokens(logits[backwards], [rows[i] for i in backwards]) == tuple(reversed(together))


def test_seed_and_position_both_matter_to_the_last_bit() -> None:
    logits = torch.zeros(1, 1 << 14)
    seeds = (0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)
    drawn = {sample_tokens(logits, [row(seed=seed, position=at)])[0] for seed in seeds for at in range(4)}
    assert len(drawn) == 24


@pytest.mark.parametrize(
    "bad", [[float("nan"), 1.0, 2.0], [float("-inf")] * 3, [float("inf"), 0.0, 0.0], [0.0, 0.0, float("nan")]]
)
def test_a_row_that_is_not_finite_is_none_and_its_neighbours_are_as_before(bad: list[float]) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5], bad, [0.3, 0.2, 0.1], bad])
    rows = [row(seed=1), row(seed=2, top_p=0.5), row(temperature=0.0), row(temperature=0.0)]
    got = sample_tokens(logits, rows)
    assert (got[1], got[3]) == (None, None)
    assert (got[0], got[2]) == sample_tokens(logits[[0, 2]], [rows[0], rows[2]])


def test_a_masked_token_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]]).expand(500, -1)
    assert set(sample_tokens(logits, [row(temperature=2.0, seed=seed) for seed in range(500)])) == {1, 3}


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    rows = [row(temperature=1e-38, top_p=(1.0, 0.5)[seed % 2], seed=seed) for seed in range(20)]
    assert set(sample_tokens(LOGITS.flip(0).expand(20, -1), rows)) == {len(LOGITS) - 1}


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], want: tuple[int, ...]
) -> None:
    """Known answers of Random123, philox4x32 with 10 rounds."""
    assert tuple(int(word) for word in philox(counter, key)) == want
