"""Draws of a workload do not depend on one another, and what nearly has the stated distribution is told from it.

`test_workloads.py` holds each distribution by itself; a stream may have every one of them and still not be what was
asked for, if a gap says something about the next, or a length about the adapter.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

import kolmogorov
from chi_squared import ACCEPTED, REJECTED, p_value
from lorasrv_bench.workloads import Arrival, parse_workload

MANY = 20_000
CELLS = 4


def gaps_of(times: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise([0.0, *times])]


def independent(a: Sequence[float], b: Sequence[float]) -> float:
    """How likely independent values are to fall into the cells of a table of quarters as unevenly as these."""
    table = np.zeros((CELLS, CELLS), dtype=np.int64)
    np.add.at(table, (quarters(a, 0), quarters(b, 1)), 1)
    return p_value(table.ravel().tolist(), [1 / CELLS**2] * CELLS**2)


def quarters(values: Sequence[float], seed: int) -> np.ndarray:
    """By rank, so that each quarter has as many; ties are broken at random."""
    ties = np.random.default_rng(seed).random(len(values))
    order = np.lexsort((ties, np.asarray(values)))
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values))
    return ranks * CELLS // len(values)


FIGURES: dict[str, Callable[[Sequence[Arrival]], Sequence[float]]] = {
    "gaps": lambda arrivals: gaps_of([arrival.at_s for arrival in arrivals]),
    "adapters": lambda arrivals: [arrival.adapter or 0 for arrival in arrivals],
    "prompts": lambda arrivals: [arrival.prompt_tokens for arrival in arrivals],
    "outputs": lambda arrivals: [arrival.output_tokens for arrival in arrivals],
}


@pytest.mark.parametrize("text", ["slora:n=50,alpha=0.3,cv=1", "slora:n=50,cv=4", "zipf:n=50,s=1"])
def test_draws_are_independent(text: str) -> None:
    arrivals = parse_workload(f"{text},requests={MANY}", seed=3).arrivals
    figures = {name: of(arrivals) for name, of in FIGURES.items()}
    for name, values in figures.items():
        assert independent(values[:-1], values[1:]) > ACCEPTED, f"{name}, one and the next"
        for other, others in figures.items():
            assert name == other or independent(values, others) > ACCEPTED, f"{name} and {other}"


@pytest.mark.parametrize("correlation", [0.1, -0.1])
def test_gaps_that_depend_on_the_one_before_are_told(correlation: float) -> None:
    """Each gap is exponential, as asked for, so that the distribution alone would pass."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(MANY)
    for index in range(1, MANY):
        normal[index] = correlation * normal[index - 1] + math.sqrt(1 - correlation**2) * normal[index]
    gaps = [-math.log(0.5 * math.erfc(each / math.sqrt(2))) / 10 for each in normal]
    exponential = kolmogorov.p_value(torch.tensor(gaps), lambda gap: 1 - torch.exp(-10 * gap))
    assert exponential > ACCEPTED
    assert independent(gaps[:-1], gaps[1:]) < REJECTED


def test_a_length_that_depends_on_the_adapter_is_told() -> None:
    rng = np.random.default_rng(2)
    adapters = rng.integers(0, 50, MANY)
    lengths = rng.integers(8, 512, MANY) + adapters  # by at most a tenth of the range
    assert independent(adapters.tolist(), lengths.tolist()) < REJECTED


@pytest.mark.parametrize("cv", [0.5, 2.0])
def test_near_misses_of_gamma_gaps_are_told(cv: float) -> None:
    """The formula's parts confused: shape cv⁻¹ for cv⁻², a lognormal of the same mean and cv, gaps cut at
    two means, a rate a fifth too high."""
    rng, rate = np.random.default_rng(4), 10.0
    sigma = math.sqrt(math.log(1 + cv**2))
    drawn = rng.gamma(1 / cv**2, cv**2 / rate, MANY)
    near = {
        "shape": rng.gamma(1 / cv, cv / rate, MANY),
        "lognormal": rng.lognormal(-(sigma**2) / 2, sigma, MANY) / rate,
        "cut": np.minimum(drawn, 0.2),
        "rate": drawn / 1.2,
    }

    def fit(gaps: np.ndarray) -> float:
        shape = torch.tensor(1 / cv**2, dtype=torch.float64)
        return kolmogorov.p_value(torch.from_numpy(gaps), lambda gap: torch.special.gammainc(shape, gap * rate / cv**2))

    asked = parse_workload(f"slora:requests={MANY},cv={cv},rate={rate}", seed=4).arrivals
    assert fit(np.array(gaps_of([arrival.at_s for arrival in asked]))) > ACCEPTED
    for name, gaps in near.items():
        assert fit(gaps) < REJECTED, name


def test_near_misses_of_the_power_distribution_are_told() -> None:
    """U^alpha for U^(1/alpha), rounding for floor, and the exponent a tenth off."""
    alpha, n, rng = 0.5, 50, np.random.default_rng(5)
    exact = [((k + 1) / n) ** alpha - (k / n) ** alpha for k in range(n)]
    uniform = rng.random(MANY)
    near = {
        "inverse": np.floor(uniform**alpha * n),
        "rounded": np.minimum(np.round(uniform ** (1 / alpha) * n), n - 1),
        "exponent": np.floor(uniform ** (1 / (0.9 * alpha)) * n),
    }

    def fit(adapters: Sequence[int]) -> float:
        return p_value(np.bincount(adapters, minlength=n).tolist(), exact)

    drawn = parse_workload(f"slora:requests={MANY},n={n},alpha={alpha}", seed=5).arrivals
    assert fit([arrival.adapter or 0 for arrival in drawn]) > ACCEPTED
    for name, adapters in near.items():
        assert fit(adapters.astype(int).tolist()) < REJECTED, name


def test_near_misses_of_uniform_lengths_are_told() -> None:
    """The end of the range taken in, its beginning left out, and a normal of the same mean and deviation."""
    low, high, rng = 8, 72, np.random.default_rng(6)
    deviation = (high - low) / math.sqrt(12)
    normal = np.clip(np.round(rng.normal((low + high - 1) / 2, deviation, MANY)), low, high - 1)
    near = {
        "end": rng.integers(low, high + 1, MANY),
        "beginning": rng.integers(low + 1, high, MANY),
        "normal": normal.astype(np.int64),
    }

    def fit(lengths: Sequence[int]) -> float:
        """Lengths outside come into cells of their own, in which nothing is expected."""
        counts = np.bincount(np.asarray(lengths) - low + 1, minlength=high - low + 2).tolist()
        return p_value(counts, [0.0, *[1 / (high - low)] * (high - low), 0.0])

    drawn = parse_workload(f"slora:requests={MANY},in_range={low}..{high}", seed=6).arrivals
    assert fit([arrival.prompt_tokens for arrival in drawn]) > ACCEPTED
    for name, lengths in near.items():
        assert fit(lengths.tolist()) < REJECTED, name
