"""Workloads against their published definitions: each distribution by a statistical test that a wrong one fails."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kolmogorov
from chi_squared import ACCEPTED, REJECTED, p_value
from lorasrv.errors import ConfigurationError
from lorasrv_bench.workloads import KINDS, SETTINGS, Arrival, Workload, parse_workload

MANY = 20_000


def gamma(cv: float, rate: float) -> Callable[[Tensor], Tensor]:
    """The distribution function of gaps with shape 1/cv² and scale cv²/rate."""
    shape = torch.tensor(1 / cv**2, dtype=torch.float64)
    return lambda gaps: torch.special.gammainc(shape, gaps * rate / cv**2)


def gaps(arrivals: Sequence[Arrival]) -> Tensor:
    times = [0.0, *(arrival.at_s for arrival in arrivals)]
    return torch.tensor([b - a for a, b in pairwise(times)], dtype=torch.float64)


def shares(arrivals: Sequence[Arrival], size: int) -> list[int]:
    found = Counter(arrival.adapter for arrival in arrivals)
    assert set(found) <= set(range(size))
    return [found[adapter] for adapter in range(size)]


@pytest.mark.parametrize(("cv", "rate"), [(1, 10), (0.5, 3), (4, 10), (8, 100)])
def test_gaps_are_gamma(cv: float, rate: float) -> None:
    workload = parse_workload(f"slora:requests={MANY},cv={cv},rate={rate}", seed=1)
    found = gaps(workload.arrivals)
    # Of bursts the smallest gaps vanish in sums: above a microsecond all are compared, below it they are counted.
    tiny = torch.tensor([1e-6], dtype=torch.float64)
    num_tiny = int((found <= tiny).sum())

    def fits(cdf: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        share = cdf(tiny).item()
        above = kolmogorov.p_value(found[found > tiny], lambda gap: (cdf(gap) - share) / (1 - share))
        return p_value([num_tiny, MANY - num_tiny], [share, 1 - share]), above

    assert min(fits(gamma(cv, rate))) > ACCEPTED
    assert min(fits(gamma(cv * 1.1, rate))) < REJECTED
    assert cv > 1 or min(fits(gamma(cv, rate * 1.2))) < REJECTED
    # Bursts spread over many orders of magnitude, so a rate shows in the mean rather than in ranks.
    assert found.mean().item() * rate == pytest.approx(1, abs=5 * cv / MANY**0.5)


def test_a_clock_has_no_bursts() -> None:
    workload = parse_workload("slora:requests=100,cv=0,rate=4", seed=1)
    assert [arrival.at_s for arrival in workload.arrivals] == pytest.approx([(i + 1) / 4 for i in range(100)])


def test_a_ramp_grows_linearly_to_the_rate() -> None:
    workload = parse_workload("slora:requests=20000,rate=100,ramp=100", seed=3)
    times = [arrival.at_s for arrival in workload.arrivals]
    ramp = torch.tensor([at_s for at_s in times if at_s < 100])
    # Given their number, the times of a Poisson process with rate r·t/100 are draws of t²/100².
    assert kolmogorov.p_value(ramp, lambda t: (t / 100) ** 2) > ACCEPTED
    assert kolmogorov.p_value(ramp, lambda t: t / 100) < REJECTED
    behind = torch.tensor([b - a for a, b in pairwise(times) if a >= 100], dtype=torch.float64)
    assert kolmogorov.p_value(behind, gamma(1, 100)) > ACCEPTED


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.1])
def test_slora_adapters_follow_the_power_distribution(alpha: float) -> None:
    """floor(U^(1/alpha) · n): adapter k has the share ((k+1)/n)^alpha − (k/n)^alpha."""
    workload = parse_workload(f"slora:n=50,alpha={alpha},requests={MANY}", seed=2)
    counts = shares(workload.arrivals, 50)

    def exact(alpha: float) -> list[float]:
        return [((k + 1) / 50) ** alpha - (k / 50) ** alpha for k in range(50)]

    assert p_value(counts, exact(alpha)) > ACCEPTED
    assert p_value(counts, exact(alpha * 0.8)) < REJECTED
    assert alpha == 1.0 or counts[0] > 5 * counts[25], "smaller is more skewed"


def test_slora_lengths_are_uniform() -> None:
    workload = parse_workload(f"slora:requests={MANY},in_range=8..40,out_range=100..108", seed=2)
    for lengths, low, high in (
        ([arrival.prompt_tokens for arrival in workload.arrivals], 8, 40),
        ([arrival.output_tokens for arrival in workload.arrivals], 100, 108),
    ):
        counts = Counter(lengths)
        assert set(counts) == set(range(low, high))
        assert p_value([counts[n] for n in range(low, high)], [1 / (high - low)] * (high - low)) > ACCEPTED


def test_slora_has_as_many_requests_as_published() -> None:
    default = parse_workload("slora", seed=0)
    assert default.text == (
        "slora:rate=10,cv=1,ramp=0,in_range=8..512,out_range=8..512,prefix_tokens=0,ranks=16,n=200,alpha=1"
    )
    assert len(default.arrivals) == 600
    # 0.7 × 10 is a little less than 7 in floating point.
    assert len(parse_workload("slora:rate=0.7,duration=10", seed=0).arrivals) == 7


def test_settings_are_the_published_ones() -> None:
    assert {name: (each.base, each.ranks) for name, each in SETTINGS.items()} == {
        "S1": ("7B", (8,)),
        "S2": ("7B", (64, 32, 16, 8)),
        "S3": ("13B", (16,)),
        "S4": ("13B", (64, 32, 16)),
    }
    workload = parse_workload("slora:n=6,ranks=S2", seed=0)
    assert [workload.rank(adapter) for adapter in range(6)] == [64, 32, 16, 8, 64, 32]
    assert parse_workload("zipf:ranks=1/3", seed=0).ranks == (1, 3)


def test_no_adapters_means_the_base() -> None:
    assert {arrival.adapter for arrival in parse_workload("slora:n=0", seed=0).arrivals} == {None}


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("distinct", [1] * 20),
        ("identical", [20]),
        ("uniform", [4, 4, 4, 4, 4]),  # ⌈√20⌉ = 5
        # 1, 1.5, 2.25, 3.375, 5.0625, 7.59 rounded down, and the one that is left.
        ("skewed", [7, 5, 3, 2, 1, 1, 1]),
    ],
)
def test_punica_kinds(kind: str, counts: list[int]) -> None:
    workload = parse_workload(f"punica:kind={kind},requests=20", seed=4)
    assert shares(workload.arrivals, workload.num_adapters) == counts
    assert {arrival.at_s for arrival in workload.arrivals} == {0.0}
    again = parse_workload(f"punica:kind={kind},requests=20", seed=5)
    assert [a.prompt_tokens for a in workload.arrivals] != [a.prompt_tokens for a in again.arrivals]


@pytest.mark.parametrize("requests", [1, 2, 3, 5, 1000, 1001])
def test_punica_gives_every_request_an_adapter(requests: int) -> None:
    for kind in ("distinct", "uniform", "skewed", "identical"):
        workload = parse_workload(f"punica:kind={kind},requests={requests}", seed=0)
        assert sum(shares(workload.arrivals, workload.num_adapters)) == requests


def test_punica_orders_are_shuffled() -> None:
    adapters = [arrival.adapter for arrival in parse_workload("punica:kind=uniform,requests=400", seed=0).arrivals]
    repeats = sum(a == b for a, b in pairwise(adapters))
    assert repeats < 60, "20 adapters: 1 in 20 by chance"


def test_punica_lengths_are_lognormal_and_bounded() -> None:
    workload = parse_workload(f"punica:kind=identical,requests={MANY}", seed=4)
    prompts = torch.tensor([arrival.prompt_tokens for arrival in workload.arrivals], dtype=torch.float64)
    totals = [arrival.prompt_tokens + arrival.output_tokens for arrival in workload.arrivals]

    def share_up_to(value: int, sigma: float = 0.8) -> float:
        """Of prompts: floor(X − 1) <= value, X lognormal(0.8) · 18."""
        return 0.5 * (1 + math.erf(math.log((value + 2) / 18) / sigma / math.sqrt(2)))

    edges = [1, 3, 6, 10, 15, 20, 30, 45, 70, 100, 150]
    for sigma, fits in ((0.8, True), (0.7, False)):
        bounds = [0.0, *(share_up_to(edge, sigma) for edge in edges), 1.0]
        counts = torch.bucketize(prompts, torch.tensor(edges, dtype=torch.float64)).bincount(minlength=12).tolist()
        p = p_value(counts, [b - a for a, b in pairwise(bounds)])
        assert p > ACCEPTED if fits else p < REJECTED
    assert max(totals) < 2048 and min(arrival.output_tokens for arrival in workload.arrivals) >= 2
    # Where the prompt is short, prompt and output together are uniform below 2048.
    long = torch.tensor([total for total in totals if total > 512], dtype=torch.float64)
    assert kolmogorov.p_value(long, lambda total: (total - 512) / (2048 - 512)) > ACCEPTED


@pytest.mark.parametrize("s", [0.0, 0.9, 1.5])
def test_zipf_is_zipf(s: float) -> None:
    counts = shares(parse_workload(f"zipf:n=40,s={s},requests={MANY}", seed=6).arrivals, 40)

    def exact(s: float) -> list[float]:
        weights = [k**-s for k in range(1, 41)]
        return [weight / math.fsum(weights) for weight in weights]

    assert p_value(counts, exact(s)) > ACCEPTED
    assert p_value(counts, exact(s + 0.1)) < REJECTED


def test_zipf_churn_brings_adapters_that_nobody_has_seen() -> None:
    workload = parse_workload("zipf:n=100,s=0,churn=0.2,rate=100,duration=180,every=60", seed=7)
    assert workload.num_adapters == 100 + 2 * 20 or workload.num_adapters == 100 + 3 * 20
    minutes: list[set[int | None]] = [set() for _ in range(3)]
    for arrival in workload.arrivals:
        minutes[min(2, int(arrival.at_s // 60))].add(arrival.adapter)
    assert minutes[0] == set(range(100)), "6,000 draws of 100"
    assert minutes[1] - minutes[0] == set(range(100, 120)) and len(minutes[1]) == 100
    assert minutes[2] - minutes[1] >= set(range(120, 140))


def test_a_cold_storm_comes_at_once_beside_a_steady_stream() -> None:
    text = "cold_storm:n=30,hot=3,at=2,rate=10,duration=5,storm_in=4..5,storm_out=6..7"
    workload = parse_workload(text, seed=8)
    storm = [arrival for arrival in workload.arrivals if arrival.adapter not in workload.resident]
    steady = [arrival for arrival in workload.arrivals if arrival.adapter in workload.resident]
    assert {arrival.at_s for arrival in storm} == {2.0}
    assert [arrival.adapter for arrival in storm] == list(range(3, 33))
    assert {(arrival.prompt_tokens, arrival.output_tokens) for arrival in storm} == {(4, 6)}
    assert [arrival.at_s for arrival in steady] == pytest.approx([(i + 1) / 10 for i in range(50)])
    assert [arrival.adapter for arrival in steady] == [index % 3 for index in range(50)]
    over_base = parse_workload("cold_storm:n=2,hot=0", seed=0)
    assert Counter(a.adapter for a in over_base.arrivals) == {None: 600, 0: 1, 1: 1}


def test_one_tenant_is_greedy() -> None:
    workload = parse_workload("tenants:k=4,n=2,greedy=5,rate=10,duration=100", seed=9)
    by_tenant = {tenant: [a for a in workload.arrivals if a.tenant == tenant] for tenant in range(4)}
    assert [len(own) for own in by_tenant.values()] == [5000, 1000, 1000, 1000]
    assert workload.num_tenants == 4 and workload.num_adapters == 8
    for tenant, own in by_tenant.items():
        counts = Counter(arrival.adapter for arrival in own)
        assert set(counts) == {2 * tenant, 2 * tenant + 1}
        assert kolmogorov.p_value(gaps(own), gamma(1, 50 if tenant == 0 else 10)) > ACCEPTED
    assert Arrival(at_s=0, adapter=0, tenant=0, prompt_tokens=10, output_tokens=7).service == 24


TEXTS = (
    "slora:n=20,requests=50,prefix_tokens=16",
    "punica:kind=skewed,requests=50",
    "zipf:n=20,churn=0.5,every=1,requests=50",
    "cold_storm:n=20,requests=50",
    "tenants:k=3,requests=50",
)


@pytest.mark.parametrize("text", TEXTS)
def test_requests_are_in_order_and_repeatable(text: str) -> None:
    workload = parse_workload(text, seed=11)
    assert all(a.at_s <= b.at_s for a, b in pairwise(workload.arrivals))
    assert all(a.prompt_tokens > a.prefix_tokens and a.output_tokens >= 1 for a in workload.arrivals)
    assert all(a.adapter is None or 0 <= a.adapter < workload.num_adapters for a in workload.arrivals)
    assert all((a.prefix is None) == (a.prefix_tokens == 0) for a in workload.arrivals)
    again = parse_workload(workload.text, seed=11)
    assert again == workload and again.digest() == workload.digest()
    other = parse_workload(text, seed=12)
    assert other.digest() != workload.digest()
    assert workload.name in KINDS


def test_values_that_do_not_concern_a_draw_leave_it() -> None:
    even, skewed = (parse_workload(f"slora:alpha={alpha}", seed=1).arrivals for alpha in (1, 0.2))
    assert [a.adapter for a in even] != [a.adapter for a in skewed]
    assert [(a.at_s, a.prompt_tokens, a.output_tokens) for a in even] == [
        (a.at_s, a.prompt_tokens, a.output_tokens) for a in skewed
    ]


def test_requests_of_an_adapter_begin_alike() -> None:
    workload = parse_workload("slora:n=3,requests=90,prefix_tokens=32,in_range=1..2", seed=1)
    of_prefix = {(arrival.prefix, arrival.adapter) for arrival in workload.arrivals}
    assert len(of_prefix) == 3 and None not in {prefix for prefix, _ in of_prefix}
    assert {(arrival.prefix_tokens, arrival.prompt_tokens) for arrival in workload.arrivals} == {(32, 33)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "workload '' is none of slora, punica, zipf, cold_storm, tenants, trace"),
        ("burst:n=3", "workload 'burst' is none of"),
        ("slora:beta=1", "slora has no 'beta'; it takes rate, cv, ramp"),
        ("slora:n", "'n' must be key=value"),
        ("slora:n=1,n=2", "'n=2' must be key=value, each key once"),
        ("slora:n=1.5", "slora: n is '1.5'; it must be a whole number"),
        ("slora:n=-1", "slora: n is -1; it must be >= 0"),
        ("slora:rate=0", "slora: rate is 0; it must be > 0"),
        ("slora:rate=nan", "slora: rate is nan"),
        ("slora:rate=inf", "slora: rate is inf; it must be <= 1e"),
        ("slora:alpha=fast", "slora: alpha is 'fast'; it must be a number"),
        ("slora:in_range=8", "slora: in_range is '8'; it must be LOW..HIGH"),
        ("slora:in_range=8..8", "1 <= LOW < HIGH"),
        ("slora:in_range=0..8", "1 <= LOW < HIGH"),
        ("slora:ranks=8/0", "slora: ranks is 0; it must be >= 1"),
        ("slora:ranks=S5", "slora: ranks is 'S5'; it must be a whole number"),
        ("slora:requests=5,duration=2", "give requests=5 or duration=2, not both"),
        ("slora:rate=0.1,duration=1", "rate × duration is 0 requests; it must be from 1"),
        ("slora:rate=1e6,duration=1e5", "rate × duration is 100000000000 requests"),
        ("punica:kind=zipf", "punica: kind is 'zipf'; it must be one of distinct, uniform, skewed, identical"),
        ("zipf:churn=2", "zipf: churn is 2; it must be <= 1"),
        ("zipf:n=1000000,churn=1,every=0.001", "churn 1 makes more than 1000000 adapters"),
        ("tenants:k=1", "tenants: k is 1; it must be >= 2"),
        ("tenants:greedy=1e6,duration=600", "8 tenants send more than"),
        ("trace", "trace needs file=…"),
        ("trace:file=/nonexistent.csv", "trace '/nonexistent.csv' cannot be read"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_workload(text, seed=0)
    assert message in str(caught.value)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="seed is -1"):
        parse_workload("slora", seed=-1)


@given(st.text(alphabet="slorazipf:=,.123456789n/-", max_size=24))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parsed: Workload | None = parse_workload(text + ",requests=3" if ":" in text else text, seed=0)
    except ConfigurationError:
        parsed = None
    assert parsed is None or parsed.arrivals


BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
50,GPT-4,0,0,0,Conversation log
118,GPT-4,417,276,693,Conversation log
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9999600,110,27
"""
MOONCAKE = """\
{"timestamp": 1000, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3052, "input_length": 1600, "output_length": 7, "hash_ids": [0, 1, 3, 4]}

{"timestamp": 3052, "input_length": 100, "output_length": 2, "hash_ids": [9]}
{"timestamp": 4000, "input_length": 600, "output_length": 3, "hash_ids": [0, 5]}
"""


def trace(tmp_path: Path, text: str, suffix: str = "csv", values: str = "") -> Workload:
    path = tmp_path / f"trace.{suffix}"
    path.write_text(text)
    return parse_workload(f"trace:file={path}{values}", seed=3)


def rows(workload: Workload) -> list[tuple[float, int, int]]:
    return [(round(a.at_s, 6), a.prompt_tokens, a.output_tokens) for a in workload.arrivals]


def test_burstgpt_columns(tmp_path: Path) -> None:
    assert rows(trace(tmp_path, BURSTGPT)) == [(0, 472, 18), (40, 1087, 230), (113, 417, 276)]
    scaled = trace(tmp_path, BURSTGPT, values=",speed=10,max_in=500,max_out=100,requests=2")
    assert rows(scaled) == [(0, 472, 18), (4, 500, 100)]


def test_burstgpt_sessions_keep_their_adapter(tmp_path: Path) -> None:
    lines = ["Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    lines += [f"{second},{second % 7},1.5,GPT-4,10,10,20,Conversation log" for second in range(70)]
    lines += [f"{second},,1.5,GPT-4,10,10,20,API log" for second in range(70, 140)]
    arrivals = trace(tmp_path, "\n".join(lines), values=",n=50").arrivals
    adapters = [{a.adapter for a in arrivals[:70][session::7]} for session in range(7)]
    assert all(len(own) == 1 for own in adapters) and len(set.union(*adapters)) > 1
    assert len({a.adapter for a in arrivals[70:]}) > 10


def test_azure_columns(tmp_path: Path) -> None:
    # 100 ns ticks; lines out of order are put in order.
    assert rows(trace(tmp_path, AZURE)) == [(0, 4808, 10), (0.02, 110, 27), (0.052, 3180, 8)]


def test_mooncake_columns(tmp_path: Path) -> None:
    workload = trace(tmp_path, MOONCAKE, "jsonl", ",n=100")
    assert rows(workload) == [(0, 1200, 5), (2.052, 1600, 7), (2.052, 100, 2), (3, 600, 3)]
    assert [(a.prefix, a.prefix_tokens) for a in workload.arrivals] == [(1, 1024), (1, 1024), (None, 0), (0, 512)]
    assert workload.arrivals[0].adapter == workload.arrivals[1].adapter


def test_adapters_of_a_trace_have_a_seeded_popularity(tmp_path: Path) -> None:
    lines = [f"{second},ChatGPT,10,10,20,API log" for second in range(MANY)]
    text = "\n".join([BURSTGPT.splitlines()[0], *lines])
    workload = trace(tmp_path, text, values=",n=10,s=1")
    weights = [1 / k for k in range(1, 11)]
    exact = [weight / math.fsum(weights) for weight in weights]
    assert p_value(shares(workload.arrivals, 10), exact) > ACCEPTED
    assert {a.adapter for a in trace(tmp_path, BURSTGPT, values=",n=0").arrivals} == {None}


@pytest.mark.parametrize(
    ("text", "suffix", "message"),
    [
        ("a,b\n1,2\n", "csv", "has columns ['a', 'b']: of no known layout"),
        ("", "csv", "has columns []"),
        (BURSTGPT.splitlines()[0], "csv", "has no request with tokens both ways"),
        (BURSTGPT + "x,ChatGPT,1,1,2,\n", "csv", "line 6: could not convert"),
        (AZURE + "yesterday,1,1\n", "csv", "line 5: Invalid isoformat"),
        (AZURE + "2023-11-16\n", "csv", "line 5: int()"),
        ('{"timestamp": 0}\n', "jsonl", "line 1: KeyError('input_length')"),
        ("[1]\n", "jsonl", "line 1: AttributeError"),
        ("{\n", "jsonl", "line 1: JSONDecodeError"),
        ("\udcff", "csv", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_trace_is_named(tmp_path: Path, text: str, suffix: str, message: str) -> None:
    path = tmp_path / f"trace.{suffix}"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError) as caught:
        parse_workload(f"trace:file={path}", seed=0)
    assert message in str(caught.value)
