"""What a run's calls come to: latencies, throughput, goodput, and whether the client was what bounded it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from lorasrv.errors import ConfigurationError
from lorasrv_bench.load import Call, Sent

# Beyond these the client, not the server, may be what was measured.
MAX_LATE_S = 0.02
MAX_LAG_S = 0.02
MAX_CPU_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a request has to keep to count as good, in seconds; None is no bound."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def kept(self, call: Call) -> bool:
        """Whether an answered request kept all bounds."""
        found = (ttft(call), tpot(call) or 0.0, e2e(call))
        return all(
            bound is None or value <= bound
            for bound, value in zip((self.ttft, self.tpot, self.e2e), found, strict=True)
        )


def parse_slo(text: str) -> Slo:
    """`ttft=0.5,tpot=0.05`, in seconds. Raises ConfigurationError."""
    values: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in {field.name for field in fields(Slo)} or name in values:
            raise ConfigurationError(f"SLO {item!r} is not ttft=, tpot= or e2e=SECONDS, each once")
        try:
            values[name] = float(value)
        except ValueError:
            raise ConfigurationError(f"SLO {item!r}: {value!r} is no number of seconds") from None
        if not values[name] > 0:
            raise ConfigurationError(f"SLO {item!r} must be > 0")
    return Slo(**values)


def ttft(call: Call) -> float:
    """Time to first token, from when the request was sent."""
    return call.piece_s[0] - call.sent_s


def tpot(call: Call) -> float | None:
    """Time per output token after the first; None where there is one only."""
    return (call.piece_s[-1] - call.piece_s[0]) / (call.output_tokens - 1) if call.output_tokens > 1 else None


def itl(call: Call) -> list[float]:
    """The gaps between messages that carry tokens, as a reader sees them."""
    return [b - a for a, b in pairwise(call.piece_s)]


def e2e(call: Call) -> float:
    return call.ended_s - call.sent_s


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    found = np.fromiter(values, dtype=np.float64)
    if not len(found):
        return None
    p50, p90, p99 = np.percentile(found, (50, 90, 99)).tolist()
    return {"mean": float(found.mean()), "p50": p50, "p90": p90, "p99": p99, "count": len(found)}


def summarize(calls: Sequence[Call], slo: Slo | None) -> dict[str, Any]:
    """The figures of a run; those that failed are counted and are in none of the others."""
    done = [call for call in calls if call.error is None and call.piece_s]
    figures: dict[str, Any] = {"requests": len(calls), "failed": len(calls) - len(done)}
    if not done:
        return figures
    duration_s = max(call.ended_s for call in done) - min(call.sent_s for call in done)
    output_tokens = sum(call.output_tokens for call in done)
    figures |= {
        "duration_s": duration_s,
        "requests_per_s": len(done) / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "tokens_per_s": (output_tokens + sum(call.prompt_tokens for call in done)) / duration_s,
        "ttft_s": spread(map(ttft, done)),
        "tpot_s": spread(value for call in done if (value := tpot(call)) is not None),
        "itl_s": spread(gap for call in done for gap in itl(call)),
        "e2e_s": spread(map(e2e, done)),
        "ttft_cold_s": spread(ttft(call) for call in done if call.cold),
        "ttft_warm_s": spread(ttft(call) for call in done if not call.cold),
    }
    if slo is not None:
        good = sum(slo.kept(call) for call in done)
        figures |= {"good_share": good / len(calls), "goodput_per_s": good / duration_s}
    tenants = sorted({call.tenant for call in calls})
    if len(tenants) > 1:
        figures["tenants"] = {str(tenant): _of_tenant(done, tenant, duration_s) for tenant in tenants}
    return figures


def _of_tenant(done: Sequence[Call], tenant: int, duration_s: float) -> dict[str, Any]:
    own = [call for call in done if call.tenant == tenant]
    # As the workloads count it: input × 1 + output × 2.
    service = sum(call.prompt_tokens + 2 * call.output_tokens for call in own)
    return {"requests": len(own), "service_per_s": service / duration_s, "ttft_s": spread(map(ttft, own))}


def client_figures(sent: Sequence[Sent]) -> dict[str, Any]:
    """How the client kept up; `bound` says in words why it may be what was measured, and is empty where it is not."""
    late = spread(call.sent_s - call.planned_s for each in sent for call in each.calls if call.planned_s is not None)
    lag = spread(lag for each in sent for lag in each.lags_s)
    busiest = max((each.cpu_s / each.wall_s for each in sent if each.wall_s > 0), default=0.0)
    bound: list[str] = []
    if late is not None and late["p99"] > MAX_LATE_S:
        bound.append(f"p99 of requests left {late['p99'] * 1000:.0f} ms late")
    if lag is not None and lag["p99"] > MAX_LAG_S:
        bound.append(f"p99 of its timers rang {lag['p99'] * 1000:.0f} ms late")
    if busiest > MAX_CPU_SHARE:
        bound.append(f"a process used {busiest:.2f} of a core")
    return {"processes": len(sent), "late_s": late, "lag_s": lag, "busiest_core_share": busiest, "bound": bound}


def server_figures(before: Mapping[str, int], after: Mapping[str, int], num_with_adapter: int) -> dict[str, Any]:
    """What the server's counters say of the time between: hits by kind of memory, steps, loads."""
    counts = {name: after[name] - before[name] for name in after}
    prompts = counts["prompt_tokens"] + counts["cached_prompt_tokens"]
    return {
        "counters": counts,
        "prefix_hit_share": counts["cached_prompt_tokens"] / prompts if prompts else None,
        # Requests that found their adapter on the device or coming there.
        "adapter_hit_share": 1 - min(1.0, counts["adapter_loads"] / num_with_adapter) if num_with_adapter else None,
    }
