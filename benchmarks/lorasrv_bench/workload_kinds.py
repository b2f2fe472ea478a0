"""How each kind of workload draws its requests; the fields of a kind are what its text takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
from numpy.random import Generator

from lorasrv.errors import ConfigurationError
from lorasrv_bench.draws import Ints, Span, arrival_times, power_choice, punica_counts, punica_lengths, zipf_shares
from lorasrv_bench.traces import read_trace
from lorasrv_bench.workload_text import bounded, one_of

MOST_REQUESTS = 10_000_000
MOST_ADAPTERS = 1_000_000
LENGTHS = Span(low=8, high=512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One request: seconds since the start, its adapter (None is the base), its tenant, and its lengths.

    `prompt_tokens` counts the `prefix_tokens` with which it begins; requests with the same `prefix` begin alike.
    """

    at_s: float
    adapter: int | None
    tenant: int
    prompt_tokens: int
    output_tokens: int
    prefix: int | None = None
    prefix_tokens: int = 0

    @property
    def service(self) -> int:
        """What fairness counts: input × 1 + output × 2."""
        return self.prompt_tokens + 2 * self.output_tokens


class Kind(Protocol):
    """A workload's values, and how they become requests."""

    def build(self, rng: Generator) -> "Drawn": ...


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a kind makes of its values."""

    arrivals: Sequence[Arrival]
    num_adapters: int
    ranks: tuple[int, ...]
    num_tenants: int = 1
    resident: range = range(0)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What open-loop kinds share: rate and burstiness of arrivals, how many there are, lengths, and ranks.

    There are `requests`, or rate × duration (60 s if neither is given). `prefix_tokens` come before every prompt, the
    same for all requests of an adapter.
    """

    rate: float = bounded(10.0, above=0, at_most=1e6)
    cv: float = bounded(1.0, at_least=0, at_most=100)
    ramp: float = bounded(0.0, at_least=0, at_most=86_400)
    duration: float | None = bounded(None, above=0, at_most=864_000)
    requests: int | None = bounded(None, at_least=1, at_most=MOST_REQUESTS)
    in_range: Span = LENGTHS
    out_range: Span = LENGTHS
    prefix_tokens: int = bounded(0, at_least=0, at_most=1_000_000)
    ranks: tuple[int, ...] = (16,)

    def __post_init__(self) -> None:
        if self.requests is not None and self.duration is not None:
            raise ConfigurationError(f"give requests={self.requests} or duration={self.duration:g}, not both")
        if self.size < 1 or self.size > MOST_REQUESTS:
            raise ConfigurationError(f"rate × duration is {self.size} requests; it must be from 1 to {MOST_REQUESTS}")

    @property
    def size(self) -> int:
        if self.requests is not None:
            return self.requests
        # Not int(): 0.1 × 30 is 3.0000000000000004, and 0.7 × 10 is just below 7.
        return math.floor(self.rate * (60.0 if self.duration is None else self.duration) + 1e-9)

    def times(self, rng: Generator) -> list[float]:
        return arrival_times(rng, size=self.size, rate=self.rate, cv=self.cv, ramp=self.ramp).tolist()

    def requests_of(
        self, rng: Generator, times: Sequence[float], adapters: Sequence[int | None], tenant: int = 0
    ) -> list[Arrival]:
        prompts, outputs = (
            span.draw(each, len(times)).tolist()
            for span, each in zip((self.in_range, self.out_range), rng.spawn(2), strict=True)
        )
        return [
            Arrival(
                at_s=at_s,
                adapter=adapter,
                tenant=tenant,
                prompt_tokens=self.prefix_tokens + prompt,
                output_tokens=output,
                # The base's requests begin alike too.
                prefix=(0 if adapter is None else adapter + 1) if self.prefix_tokens else None,
                prefix_tokens=self.prefix_tokens,
            )
            for at_s, adapter, prompt, output in zip(times, adapters, prompts, outputs, strict=True)
        ]


def _numbers(drawn: Ints) -> list[int]:
    return drawn.tolist()


@dataclass(frozen=True, kw_only=True)
class SLora(Stream):
    """S-LoRA's synthetic workload (arXiv 2311.03285): adapters by a power distribution, Gamma gaps, uniform lengths.

    `n=0` asks the base alone. The published settings are `ranks=S1` to `ranks=S4`.
    """

    n: int = bounded(200, at_least=0, at_most=MOST_ADAPTERS)
    alpha: float = bounded(1.0, above=0, at_most=1000)

    def build(self, rng: Generator) -> Drawn:
        when, which, how_long = rng.spawn(3)
        adapters: Sequence[int | None] = [None] * self.size
        if self.n:
            adapters = _numbers(power_choice(which, size=self.size, n=self.n, alpha=self.alpha))
        arrivals = self.requests_of(how_long, self.times(when), adapters)
        return Drawn(arrivals=arrivals, num_adapters=self.n, ranks=self.ranks)


@dataclass(frozen=True, kw_only=True)
class Punica:
    """Punica's text generation benchmark (arXiv 2310.18547): all requests are there at the start, in a fixed order."""

    KINDS: ClassVar = ("distinct", "uniform", "skewed", "identical")

    kind: str = one_of("distinct", KINDS)
    requests: int = bounded(1000, at_least=1, at_most=MOST_REQUESTS)
    max_tokens: int = bounded(2048, at_least=4, at_most=1_000_000)
    ranks: tuple[int, ...] = (16,)

    def build(self, rng: Generator) -> Drawn:
        order, how_long = rng.spawn(2)
        counts = punica_counts(self.kind, self.requests)
        adapters = np.repeat(np.arange(len(counts)), counts)
        order.shuffle(adapters)
        prompts, outputs = punica_lengths(how_long, size=self.requests, max_tokens=self.max_tokens)
        arrivals = [
            Arrival(at_s=0.0, adapter=adapter, tenant=0, prompt_tokens=prompt, output_tokens=output)
            for adapter, prompt, output in zip(adapters.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        ]
        return Drawn(arrivals=arrivals, num_adapters=len(counts), ranks=self.ranks)


@dataclass(frozen=True, kw_only=True)
class Zipf(Stream):
    """True Zipf popularity: the k-th of n adapters is asked for in proportion to k^-s.

    Every `every` seconds a `churn` of the n places, drawn anew, goes to adapters that were never seen before.
    """

    n: int = bounded(200, at_least=1, at_most=MOST_ADAPTERS)
    s: float = bounded(1.0, at_least=0, at_most=10)
    churn: float = bounded(0.0, at_least=0, at_most=1)
    every: float = bounded(60.0, above=0, at_most=86_400)

    def build(self, rng: Generator) -> Drawn:
        when, which, how_long, leaving = rng.spawn(4)
        times = self.times(when)
        places = _numbers(which.choice(self.n, size=self.size, p=zipf_shares(self.n, self.s)))
        holders = list(range(self.n))
        unseen, turn = self.n, 0
        num_leaving = round(self.churn * self.n)
        adapters: list[int | None] = []
        for at_s, place in zip(times, places, strict=True):
            while num_leaving and at_s >= (turn + 1) * self.every:
                turn += 1
                for leaver in leaving.choice(self.n, size=num_leaving, replace=False).tolist():
                    holders[leaver] = unseen
                    unseen += 1
                if unseen > MOST_ADAPTERS:
                    raise ConfigurationError(
                        f"churn {self.churn:g} makes more than {MOST_ADAPTERS} adapters by {at_s:g} s"
                    )
            adapters.append(holders[place])
        return Drawn(arrivals=self.requests_of(how_long, times, adapters), num_adapters=unseen, ranks=self.ranks)


@dataclass(frozen=True, kw_only=True)
class ColdStorm(Stream):
    """A steady stream over `hot` resident adapters (0: over the base), and at `at` seconds n that nobody has asked for.

    The stream's adapters come first in number and in turn; each cold one is asked once, all at the same moment, with
    prompts and outputs of `storm_in` and `storm_out` tokens.
    """

    n: int = bounded(100, at_least=1, at_most=MOST_ADAPTERS)
    hot: int = bounded(4, at_least=0, at_most=MOST_ADAPTERS)
    at: float = bounded(5.0, at_least=0, at_most=86_400)
    cv: float = bounded(0.0, at_least=0, at_most=100)
    storm_in: Span = LENGTHS
    storm_out: Span = LENGTHS

    def build(self, rng: Generator) -> Drawn:
        when, steady, storm = rng.spawn(3)
        turns: Sequence[int | None] = [index % self.hot if self.hot else None for index in range(self.size)]
        stream = self.requests_of(steady, self.times(when), turns)
        prompts, outputs = (
            _numbers(span.draw(each, self.n))
            for span, each in zip((self.storm_in, self.storm_out), storm.spawn(2), strict=True)
        )
        cold = [
            Arrival(at_s=self.at, adapter=self.hot + index, tenant=0, prompt_tokens=prompt, output_tokens=output)
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
        return Drawn(
            arrivals=sorted([*stream, *cold], key=lambda arrival: arrival.at_s),
            num_adapters=self.hot + self.n,
            ranks=self.ranks,
            resident=range(self.hot),
        )


@dataclass(frozen=True, kw_only=True)
class Tenants(Stream):
    """k tenants with n adapters each: tenant 0 sends `greedy` times what each of the modest others sends.

    `rate` and the number of requests are those of one modest tenant; each tenant's arrivals are a stream of their own.
    Tenant t has adapters t·n to below (t+1)·n, and asks for them alike.
    """

    k: int = bounded(8, at_least=2, at_most=100_000)
    n: int = bounded(1, at_least=1, at_most=MOST_ADAPTERS)
    greedy: float = bounded(10.0, at_least=1, at_most=1e6)
    rate: float = bounded(1.0, above=0, at_most=1e6)

    def build(self, rng: Generator) -> Drawn:
        if self.size * (self.greedy + self.k - 1) > MOST_REQUESTS:
            raise ConfigurationError(f"{self.k} tenants send more than {MOST_REQUESTS} requests")
        arrivals: list[Arrival] = []
        for tenant, own in enumerate(rng.spawn(self.k)):
            when, which, how_long = own.spawn(3)
            share = self.greedy if tenant == 0 else 1.0
            size = math.floor(self.size * share + 1e-9)
            times = arrival_times(when, size=size, rate=self.rate * share, cv=self.cv, ramp=self.ramp).tolist()
            adapters = _numbers(tenant * self.n + which.integers(0, self.n, size))
            arrivals += self.requests_of(how_long, times, adapters, tenant)
        arrivals.sort(key=lambda arrival: arrival.at_s)
        return Drawn(arrivals=arrivals, num_adapters=self.k * self.n, ranks=self.ranks, num_tenants=self.k)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Recorded traffic (see `traces.read_trace`), its adapters drawn from a Zipf popularity over n.

    Requests of one session, or that share a prefix, ask the same adapter. Time passes `speed` times as fast as it was
    recorded; prompts and outputs are cut to `max_in` and `max_out` tokens.
    """

    file: str
    n: int = bounded(200, at_least=0, at_most=MOST_ADAPTERS)
    s: float = bounded(1.0, at_least=0, at_most=10)
    speed: float = bounded(1.0, above=0, at_most=1e6)
    requests: int | None = bounded(None, at_least=1, at_most=MOST_REQUESTS)
    max_in: int | None = bounded(None, at_least=1)
    max_out: int | None = bounded(None, at_least=1)
    ranks: tuple[int, ...] = (16,)

    def build(self, rng: Generator) -> Drawn:
        rows = read_trace(Path(self.file), self.requests)
        drawn = _numbers(rng.choice(self.n, size=len(rows), p=zipf_shares(self.n, self.s))) if self.n else []
        of_session: dict[str, int] = {}
        arrivals: list[Arrival] = []
        for index, row in enumerate(rows):
            adapter = drawn[index] if self.n else None
            if adapter is not None and row.session is not None:
                adapter = of_session.setdefault(row.session, adapter)
            prompt_tokens = min(row.prompt_tokens, self.max_in or row.prompt_tokens)
            arrivals.append(
                Arrival(
                    at_s=row.at_s / self.speed,
                    adapter=adapter,
                    tenant=0,
                    prompt_tokens=prompt_tokens,
                    output_tokens=min(row.output_tokens, self.max_out or row.output_tokens),
                    prefix=row.prefix,
                    prefix_tokens=min(row.prefix_tokens, prompt_tokens),
                )
            )
        return Drawn(arrivals=arrivals, num_adapters=self.n, ranks=self.ranks)
