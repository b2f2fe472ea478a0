"""What workloads draw: times of arrival, lengths, and which adapter. Every draw comes from the generator handed in."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Whole numbers from `low` to below `high`."""

    low: int
    high: int

    def draw(self, rng: Generator, size: int) -> Ints:
        return rng.integers(self.low, self.high, size)


def arrival_times(rng: Generator, *, size: int, rate: float, cv: float, ramp: float = 0.0) -> Floats:
    """Seconds of `size` arrivals: gaps Gamma(shape 1/cv², scale cv²/rate), mean 1/rate (S-LoRA, arXiv 2311.03285).

    cv 1 is a Poisson process, above it bursts come, cv 0 is a clock. In the first `ramp` seconds the rate grows
    linearly from 0: time is stretched there so that the mean number of arrivals by t is rate · t²/2ramp.
    """
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, size) if cv > 0 else np.full(size, 1 / rate)
    times = np.cumsum(gaps)
    return np.where(times < ramp / 2, np.sqrt(2 * ramp * times), times + ramp / 2) if ramp else times


def power_choice(rng: Generator, *, size: int, n: int, alpha: float) -> Ints:
    """floor(U^(1/alpha) · n): alpha 1 is uniform, a smaller one prefers low numbers (S-LoRA)."""
    return np.minimum((rng.power(alpha, size) * n).astype(np.int64), n - 1)


def zipf_shares(n: int, s: float) -> Floats:
    """The probability of each of `n`: the k-th, from 1, has a share in proportion to k^-s; `[n]`."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -s
    return weights / weights.sum()


def punica_counts(kind: str, num_requests: int) -> list[int]:
    """How many requests each adapter gets (Punica, arXiv 2310.18547), the most popular first; they sum to all.

    distinct: one each. uniform: ⌈√n⌉ adapters share alike. skewed: each has 1.5 times the requests of the next, whole
    numbers, and what is left goes to one more. identical: one adapter has all.
    """
    if kind == "distinct":
        return [1] * num_requests
    if kind == "identical":
        return [num_requests]
    if kind == "uniform":
        adapters = int(np.ceil(np.sqrt(num_requests)))
        least, more = divmod(num_requests, adapters)
        return [least + (index < more) for index in range(adapters)]
    counts: list[int] = []
    share = 1.0
    while sum(counts) + int(share) < num_requests:
        counts.append(int(share))
        share *= 1.5
    return sorted([*counts, num_requests - sum(counts)], reverse=True)


def punica_lengths(rng: Generator, *, size: int, max_tokens: int) -> tuple[Ints, Ints]:
    """Prompt and output lengths of Punica's text generation benchmark.

    Prompts are lognormal (sigma 0.8, scale 18, moved by −1), at most max_tokens − 2 long; prompt and output together
    are uniform below max_tokens, and the output has two tokens at least. Where the published draw rounds to an empty
    prompt, ours has one token.
    """
    drawn = rng.lognormal(np.log(18.0), 0.8, size) - 1.0
    prompts = np.clip(drawn, 1, max_tokens - 2).astype(np.int64)
    totals = np.maximum(prompts + 2, rng.integers(0, max_tokens, size))
    return prompts, totals - prompts
