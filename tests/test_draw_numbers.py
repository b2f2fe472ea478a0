"""The numbers behind the draws: right to the token, independent in every direction, even over a large vocabulary."""

import math
from collections.abc import Callable, Sequence
from itertools import permutations, product

import pytest
import torch

from chi_squared import ACCEPTED, REJECTED, counted, draw, p_value
from drawing import sample_tokens
from exact_probs import exact_probs, gumbel_token, moment, softmax
from lorasrv.engine.batch import SampleInput
from lorasrv.model.logit_edits import LogitEdits

LOGITS = [0.3, -0.5, 0.8, 0.0, 0.5, -0.2, -1.0]
NUM_DRAWS = 10000
PLAIN = moment(prompt=(0,))

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63), 0x0123456789ABCDEF)
POSITIONS = (0, 1, 4095, 2**31 - 1, 2**31, 2**32 - 1)


def test_tokens_at_the_ends_of_seeds_and_positions_are_those_of_plain_integers() -> None:
    logits = torch.linspace(-1.0, 1.0, 41).tolist()
    numbers = [{"seed": seed, "position": position} for seed, position in product(SEEDS, POSITIONS)]
    want = [gumbel_token(logits, 1.5, number["seed"] % 2**64, number["position"]) for number in numbers]
    assert draw(moment(prompt=(0,), temperature=1.5), logits, numbers) == want
    assert len(set(want)) > 20


# For an index, two draws that have nothing to do with each other: seed, position, and sample if not 0.
Pair = Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]
PAIRS: dict[str, Pair] = {
    "successive positions": lambda i: ((5, 2 * i), (5, 2 * i + 1)),
    "positions 4 apart": lambda i: ((6, i + i // 4 * 4), (6, i + i // 4 * 4 + 4)),
    "positions 2^16 apart": lambda i: ((7, i), (7, i + 2**16)),
    "positions 2^31 apart": lambda i: ((7, i), (7, i + 2**31)),
    "adjacent seeds": lambda i: ((2 * i, 9), (2 * i + 1, 9)),
    "seeds that differ in bit 32": lambda i: ((i, 9), (i + 2**32, 9)),
    "seeds that differ in the last bit": lambda i: ((i, 8), (i + 2**63, 8)),
    "halves of the seed changed over": lambda i: ((i + 1, 9), ((i + 1) << 32, 9)),
    "successive samples": lambda i: ((5, 7, 2 * i), (5, 7, 2 * i + 1)),
    "sample and position changed over": lambda i: ((6, i, i + 40000), (6, i + 40000, i)),
    "sample up, position down": lambda i: ((7, 50000 - 2 * i, 2 * i), (7, 50000 - 2 * i - 1, 2 * i + 1)),
    "seed and position changed over": lambda i: ((i, i + 40000), (i + 40000, i)),
    "seed up, position down": lambda i: ((2 * i, 50000 - 2 * i), (2 * i + 1, 50000 - 2 * i - 1)),
}


def pair_counts(pair: Pair) -> list[int]:
    """By (first token, second token)."""
    names = ("seed", "position", "sample")
    numbers = [dict(zip(names, draw, strict=False)) for i in range(NUM_DRAWS) for draw in pair(i)]
    tokens = draw(PLAIN, LOGITS, numbers)
    return counted([a * len(LOGITS) + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)], len(LOGITS) ** 2)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_draws_of_other_seeds_positions_or_samples_are_independent(pair: Pair) -> None:
    probs = exact_probs(LOGITS, PLAIN)
    assert p_value(pair_counts(pair), [a * b for a, b in product(probs, probs)]) > ACCEPTED


def test_draws_that_share_their_numbers_are_seen() -> None:
    """One pair in twenty drawn with the same numbers shows."""
    probs = exact_probs(LOGITS, PLAIN)
    mixed = pair_counts(lambda i: ((i, 3), (i + (NUM_DRAWS if i % 20 else 0), 3)))
    assert p_value(mixed, [a * b for a, b in product(probs, probs)]) < REJECTED


def winners(orders: Sequence[tuple[int, ...]], places: int) -> list[int]:
    """How often each of `orders` are the best `places` tokens of a draw, best first.

    The winner is masked and drawn again with the same numbers, so every token keeps its noise.
    """
    rows = [{"seed": index, "position": index % 3} for index in range(NUM_DRAWS)]
    best: list[tuple[int, ...]] = [()] * NUM_DRAWS
    for _ in range(places):
        tokens = sample_tokens(
            torch.tensor([LOGITS]).repeat(NUM_DRAWS, 1),
            [
                SampleInput(temperature=1.0, top_p=1.0, top_k=None, edits=LogitEdits(masked=masked), **row)
                for row, masked in zip(rows, best, strict=True)
            ],
        )
        best = [(*before, token) for before, token in zip(best, tokens, strict=True) if token is not None]
    places_of = {order: at for at, order in enumerate(orders)}
    return counted([places_of[order] for order in best], len(orders))


@pytest.mark.parametrize("places", [2, 3])
def test_the_noise_of_token_ids_is_independent(places: int) -> None:
    """Independent Gumbel noise ranks tokens like drawing without replacement (Plackett and Luce); shared or correlated
    noise, between neighbours or between ids four apart, would not."""
    orders = list(permutations(range(len(LOGITS)), places))
    weights = softmax(LOGITS)

    def prob(order: tuple[int, ...]) -> float:
        result, left = 1.0, 1.0
        for token in order:
            result, left = result * weights[token] / left, left - weights[token]
        return result

    counts = winners(orders, places)
    assert p_value(counts, [prob(order) for order in orders]) > ACCEPTED
    twice = [weights[order[0]] / len(orders) * len(LOGITS) for order in orders]  # what follows is drawn evenly
    assert p_value(counts, twice) < REJECTED


@pytest.mark.parametrize(
    ("counts", "probs", "want"),
    [
        ([60, 40], [0.5, 0.5], math.erfc(2**0.5)),  # 4 at one degree of freedom
        ([50, 30, 20, 0], [0.4, 0.4, 0.2, 0.0], math.exp(-2.5)),  # 5 at two
        ([97, 1, 2], [0.94, 0.03, 0.03], math.erfc(math.sqrt((9 / 94 + 9 / 6) / 2))),  # the rare ones joined
        ([99, 1], [1.0, 0.0], 0.0),
    ],
)
def test_the_p_value_is_that_of_the_closed_forms(counts: list[int], probs: list[float], want: float) -> None:
    assert p_value(counts, probs) == pytest.approx(want)


def test_p_values_of_many_batches_are_even() -> None:
    """Draws that fit too well would show here, as draws that do not."""
    probs = exact_probs(LOGITS, PLAIN)
    numbers = [{"seed": 31 + index // 50, "position": index % 50} for index in range(200 * 300)]
    tokens = draw(PLAIN, LOGITS, numbers)
    found = [p_value(counted(tokens[at : at + 300], len(LOGITS)), probs) for at in range(0, len(tokens), 300)]
    assert p_value(counted([int(10 * p) for p in found], 10), [0.1] * 10) > ACCEPTED


def test_a_large_vocabulary_in_bins_of_every_kind() -> None:
    """A noise that knows only some bits of a token's id, or ends early, shows in one of them."""
    vocab_size, num_bins, num_draws = 50_003, 20, 800
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    tokens: list[int] = []
    for start in range(0, num_draws, 50):
        numbers = [{"seed": 7, "position": start + index} for index in range(50)]
        tokens += draw(moment(prompt=(0,), temperature=1.2), logits.tolist(), numbers)
    likely = logits.argsort(descending=True).argsort()
    ids = torch.arange(vocab_size)
    kinds = {
        "neighbours": ids * num_bins // vocab_size,
        "last bits": ids % num_bins,
        "word of the four": ids % 4,
        "likely and unlikely": (likely.double() / vocab_size).sqrt().mul(num_bins).long(),
    }
    for name, bins in kinds.items():
        counts = counted(bins[tokens].tolist(), num_bins)

        def probs(at: float, bins: torch.Tensor = bins) -> list[float]:
            weights = (logits.double() / at).softmax(-1)
            return torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, weights).tolist()

        assert p_value(counts, probs(1.2)) > ACCEPTED, name
        if name == "likely and unlikely":
            assert p_value(counts, probs(1.4)) < REJECTED
