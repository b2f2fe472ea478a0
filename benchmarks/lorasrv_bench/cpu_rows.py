"""The rows of the CPU's table: each says its target, what was measured, and whether that meets it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lorasrv_bench.decisions import Load, Measured, quantile
from lorasrv_bench.figures import spread
from lorasrv_bench.lora_cost import ALLOWED, Cost
from lorasrv_bench.peers import MIXED, OURS, Compared
from lorasrv_bench.start_up import Started
from lorasrv_bench.step_counts import StepCost

# Tokens/s of peers that are not started here, for where no URL is given: llama.cpp's server and vLLM 0.32's CPU build,
# measured in November 2026 on two cores with AVX512_BF16, the same shape of model and the same load.
EARLIER: Mapping[tuple[str, str], float] = MappingProxyType(
    {("llama.cpp", "base"): 667, ("llama.cpp", MIXED): 175, ("vllm", MIXED): 175}
)
STRETCH_TOKENS_PER_S = 1300
POOL_MIB = 256
SPARE_BYTES = 600 << 20
READY_S = 5.0
STEP_S = 1e-3


@dataclass(frozen=True, kw_only=True)
class Row:
    """`met` is None where nothing can be said; `wrong` says why a part has no score."""

    what: str
    target: str
    measured: str
    met: bool | None
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    wrong: str = ""


def table(rows: Sequence[Row]) -> str:
    lines = ["| what | target | measured: median (least to most) | |", "|---|---|---|---|"]
    for row in rows:
        verdict = "no score" if row.wrong else {True: "met", False: "**not met**", None: "–"}[row.met]
        lines.append(f"| {row.what} | {row.target} | {row.wrong or row.measured} | {verdict} |")
    return "\n".join(lines)


def of_peers(found: Compared) -> list[Row]:
    """Base, and four adapters: against peers of this run, and against others' earlier figures where they are not."""
    return [
        _against(found, "base only", "base", "llama.cpp", 1.5),
        _against(found, "4 adapters, mixed", MIXED, "PEFT mixed batch", 4),
        _against(found, "4 adapters, mixed", MIXED, "llama.cpp", 5),
        _against(found, "4 adapters, mixed", MIXED, "vllm", 5),
    ]


def _against(found: Compared, what: str, case: str, peer: str, factor: float) -> Row:
    target = f"≥ {factor:g} × {peer}"
    rates = found.rates.get(OURS, {}).get(case)
    if rates is None or OURS in found.wrong:
        return Row(what=what, target=target, measured="", met=None, wrong="; ".join(found.wrong.get(OURS, ["no run"])))
    ratios = found.ratio(OURS, case, peer)
    earlier = EARLIER.get((peer, case))
    if ratios is not None:
        said = f"{spread(found.rates[peer][case], '.0f')} tok/s in this run"
    elif peer in found.wrong:
        return Row(what=what, target=target, measured="", met=None, wrong=f"{peer}: {'; '.join(found.wrong[peer])}")
    elif earlier is not None:
        ratios, said = (
            [rate / earlier for rate in rates],
            f"its {earlier:g} tok/s are of an earlier day, not of this run",
        )
    else:
        return Row(what=what, target=target, measured=f"{peer} was not there", met=None)
    stretch = f"; stretch of {STRETCH_TOKENS_PER_S} tok/s" if case == "base" else ""
    return Row(
        what=what,
        target=target + stretch,
        measured=f"{spread(ratios, '.2f')} ×: {spread(rates, '.0f')} tok/s through gRPC; {said}",
        met=statistics.median(ratios) >= factor,
        figures={"ratios": ratios, "tokens_per_s": rates, "peer": peer, "earlier_tokens_per_s": earlier},
    )


def of_cost(cost: Cost, numbers: Sequence[int]) -> list[Row]:
    base = f"base step {spread([1e3 * each for each in cost.step_s[0]], '.1f')} ms"
    return [
        Row(
            what=f"LoRA's own cost, {number} adapters",
            target=f"≤ {ALLOWED} × reading them: {1e3 * cost.allowed_s(number):.2f} ms at "
            f"{cost.bytes_per_s / 1e9:.1f} GB/s",
            measured=f"+ {spread([1e3 * each for each in cost.added_s(number)], '.2f')} ms; {base}",
            met=statistics.median(cost.added_s(number)) <= cost.allowed_s(number),
            figures={"added_s": cost.added_s(number), "allowed_s": cost.allowed_s(number), "base_s": cost.step_s[0]},
            wrong="; ".join(cost.wrong),
        )
        for number in numbers
    ]


def of_counts(costs: Mapping[int, StepCost]) -> list[Row]:
    few, many = min(costs), max(costs)
    told = {number: (cost.layer.torch_ops, cost.layer.python_calls) for number, cost in costs.items()}
    return [
        Row(
            what="dispatches",
            target="torch calls a layer do not grow with adapters",
            measured="; ".join(f"{n}: {ops:.0f} operations, {calls:.0f} calls" for n, (ops, calls) in told.items()),
            met=all(many <= few for few, many in zip(told[few], told[many], strict=True)),
            figures={str(number): each for number, each in told.items()},
        )
    ]


def of_economy(show: str, told: Mapping[str, Any]) -> Row:
    what, target, arms, is_met = {
        "thousands": (
            "thousands of adapters",
            "≥ 0.95 × as many at a time, all resident",
            ("all", "resident"),
            lambda ratio: ratio >= 0.95,
        ),
        "storm": ("cold loads", "p99 gap ≤ 1.1 × all resident", ("cold", "resident"), lambda ratio: ratio <= 1.1),
    }[show]
    if told["wrong"]:
        return Row(what=what, target=target, measured="", met=None, wrong="; ".join(told["wrong"][:3]))
    ratios = [found[arms[0]] / found[arms[1]] for found in told["rounds"]]
    beside = f"; {told['to_few']:.3f} × five adapters" if "to_few" in told else ""
    bound = "".join(f"; CLIENT-BOUND: {each}" for each in told["client_bound"])
    return Row(
        what=what,
        target=target,
        measured=f"{spread(ratios, '.3f')} × (sample model){beside}{bound}",
        met=is_met(statistics.median(ratios)),
        figures={"ratios": ratios, "rounds": told["rounds"]},
    )


def of_decisions(load: Load, found: Measured) -> Row:
    p50_s, p99_s = (quantile(found.decide_apply_s, share) for share in (0.5, 0.99))
    happened = f"{found.admissions} admissions, {found.loads} loads, {found.evictions} evictions, {found.preemptions}"
    return Row(
        what="scheduler + bookkeeping",
        target=f"p99 < {1e3 * STEP_S:g} ms at {load.num_running} running, {load.num_waiting} waiting, "
        f"{load.num_adapters} adapters",
        measured=f"{1e3 * p99_s:.3f} ms, median {1e3 * p50_s:.3f} ms; {happened} preemptions",
        met=p99_s < STEP_S,
        figures={"p99_s": p99_s, "p50_s": p50_s},
    )


def of_streaming(streams: int, rates: Sequence[tuple[float, float]]) -> Row:
    """`rates` are tokens/s through gRPC and offline, by repeat."""
    ratios = [grpc / loop for grpc, loop in rates]
    return Row(
        what="streaming",
        target=f"{streams} streams through gRPC ≥ 0.95 × offline",
        measured=f"{spread(ratios, '.3f')} ×: {spread([grpc for grpc, _ in rates], '.0f')} tok/s",
        met=statistics.median(ratios) >= 0.95,
        figures={"ratios": ratios},
    )


def of_start(started: Started) -> list[Row]:
    ready_s, allowed_s = started.ready_s, READY_S + started.read_s
    allowed_bytes = started.weights_bytes + started.pool_bytes + SPARE_BYTES
    peaks = [each / 2**20 for each in started.peak_bytes]
    return [
        Row(
            what="start",
            target=f"READY ≤ {READY_S:g} s + {started.read_s:.2f} s of reading weights, sample model",
            measured=f"{spread(ready_s, '.2f')} s",
            met=statistics.median(ready_s) <= allowed_s,
            figures={"ready_s": ready_s, "read_s": started.read_s},
        ),
        Row(
            what="host memory",
            target=f"peak ≤ weights + pool + 600 MiB: {allowed_bytes / 2**20:.0f} MiB",
            measured=f"{spread(peaks, '.0f')} MiB in all its processes",
            met=max(started.peak_bytes) <= allowed_bytes,
            figures={"peak_mib": peaks},
        ),
    ]
