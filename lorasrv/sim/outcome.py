"""What a replayed workload came to: times, goodput, hits, bytes, and the pool over time."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from lorasrv.sim.replay import PoolSample, Record, Replica
from lorasrv.sim.slo import Slo
from lorasrv.types import PoolStats, Tier


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds; a percentile is the smallest value that as many are not above."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, counts: Mapping[float, int]) -> Self | None:
        """None of nothing."""
        total = sum(counts.values())
        if not total:
            return None
        values = sorted(counts)
        reached: list[int] = []
        so_far = 0
        for value in values:
            so_far += counts[value]
            reached.append(so_far)

        def percentile(share: float) -> float:
            return values[bisect_right(reached, math.ceil(share * total - 1e-9) - 1)]

        return cls(
            count=total,
            mean=sum(value * count for value, count in counts.items()) / total,
            p50=percentile(0.5),
            p90=percentile(0.9),
            p99=percentile(0.99),
        )


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What the engines counted, added up. `device_busy` is the share of the time in which the devices computed."""

    steps: int
    prompt_tokens: int
    cached_prompt_tokens: int
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    disk_bytes: int
    copied_bytes: int
    device_busy: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A workload on `num_engines` equal engines.

    `ttft_warm` is of requests for the base or an adapter that was on the device when they came, `ttft_cold` of all
    others. Good are requests that ended with their first token and their mean time between tokens within the SLO.
    `hits` are the shares of requests that found their adapter on a tier. `keeps_slo` is None where not all was run.
    """

    num_engines: int
    slo: Slo
    keeps_slo: bool
    requests: int
    done: int
    refused: Mapping[str, int]
    duration_s: float
    output_tokens: int
    ttft: Times | None
    ttft_warm: Times | None
    ttft_cold: Times | None
    itl: Times | None
    e2e: Times | None
    ttft_by_tenant: Mapping[int, Times | None]
    good: int
    hits: Mapping[Tier, float]
    traffic: Traffic
    pool: tuple[PoolSample, ...]

    @property
    def requests_per_s(self) -> float:
        return self.done / self.duration_s

    @property
    def goodput_per_s(self) -> float:
        return self.good / self.duration_s

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s


def summarize(replicas: Sequence[Replica], slo: Slo, traffic: Traffic) -> Outcome:
    """Of a replay that came to its end."""
    records = [record for replica in replicas for record in replica.records]
    gaps = sum((replica.gaps for replica in replicas), Counter[float]())
    begin_s = min(record.at_s for record in records)
    duration_s = max(max(record.last_s for record in records) - begin_s, 1e-9)
    ttft, itl = _ttft(records), Times.of(gaps)
    refused = Counter(record.refused for record in records if record.refused is not None)
    late = ttft is None or ttft.p99 > slo.ttft_s or bool(refused) or (itl is not None and itl.p99 > slo.itl_s)
    tenants = sorted({record.arrival.tenant for record in records})
    asked = Counter(record.tier for record in records if record.tier is not None)
    return Outcome(
        num_engines=len(replicas),
        slo=slo,
        keeps_slo=not late,
        requests=len(records),
        done=sum(record.done for record in records),
        refused=dict(refused),
        duration_s=duration_s,
        output_tokens=sum(gaps.values()) + (ttft.count if ttft else 0),
        ttft=ttft,
        ttft_warm=_ttft(records, lambda record: record.tier in (None, Tier.DEVICE)),
        ttft_cold=_ttft(records, lambda record: record.tier not in (None, Tier.DEVICE)),
        itl=itl,
        e2e=Times.of(Counter(record.last_s - record.at_s for record in records if record.done)),
        ttft_by_tenant={
            tenant: _ttft(records, lambda record, tenant=tenant: record.arrival.tenant == tenant) for tenant in tenants
        }
        if len(tenants) > 1
        else {},
        good=sum(_is_good(record, slo) for record in records),
        hits={tier: asked[tier] / asked.total() for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK) if asked},
        traffic=traffic,
        pool=_added_up([replica.samples for replica in replicas]),
    )


def _ttft(records: Iterable[Record], keep: Callable[[Record], bool] = lambda record: True) -> Times | None:
    return Times.of(Counter(each.first_s - each.at_s for each in records if each.first_s is not None and keep(each)))


def _is_good(record: Record, slo: Slo) -> bool:
    if not record.done or record.first_s is None:
        return False
    mean_itl_s = (record.last_s - record.first_s) / max(1, record.arrival.output_tokens - 1)
    return record.first_s - record.at_s <= slo.ttft_s and mean_itl_s <= slo.itl_s


def _added_up(series: Sequence[Sequence[PoolSample]]) -> tuple[PoolSample, ...]:
    """All engines' pools as one, at the times of the first engine's samples; each as it was seen last."""
    added: list[PoolSample] = []
    for at_s in sorted({sample.at_s for sample in max(series, key=len)}):
        now = [samples[max(0, bisect_right(samples, at_s, key=lambda s: s.at_s) - 1)] for samples in series if samples]
        fields = ("num_pages", "free", "sequences", "prefix", "adapters")
        pool = PoolStats(**{name: sum(getattr(sample.pool, name) for sample in now) for name in fields})
        running, waiting = sum(sample.running for sample in now), sum(sample.waiting for sample in now)
        added.append(PoolSample(at_s=at_s, pool=pool, running=running, waiting=waiting))
    return tuple(added)
