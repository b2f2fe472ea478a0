"""The rows that an H200 is to reach, each computed from what a run has recorded."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lorasrv_bench.gpu_records import DONE, PLANNED, Record


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`measured` is the worst of the row's cases, or why there is none; `met` None where it was not run."""

    measured: str
    met: bool | None


@dataclass(frozen=True, kw_only=True)
class Target:
    what: str
    target: str
    judge: Callable[["Found"], Verdict]


class Found:
    """A run's records, by section and case."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)

    def one(self, section: str, **case: object) -> Record | None:
        """The last one whose case has these values, if it was timed."""
        return next(
            (r for r in reversed(self.records) if r.section == section and r.status == DONE and _has(r, case)), None
        )

    def all(self, section: str, **case: object) -> list[Record]:
        return [r for r in self.records if r.section == section and r.status == DONE and _has(r, case)]

    def why_not(self, section: str, **case: object) -> str:
        reasons = [r.why for r in self.records if r.section == section and r.why and _has(r, case)]
        general = [r.why for r in self.records if r.section == section and r.status not in (DONE, PLANNED)]
        return (reasons or general or ["it was not reached"])[-1]


def _has(record: Record, case: dict[str, object]) -> bool:
    return all(name in record.case and record.case[name] == value for name, value in case.items())


def targets() -> list[Target]:
    return [
        Target(
            what="decode step, base only, batch 1–16",
            target="≤ 1.20 × floor",
            judge=lambda found: _steps_to_floor(found, [(0, 1), (0, 4), (0, 16)], 1.20),
        ),
        Target(
            what="decode step, base only, batch 64",
            target="≤ 1.25 × floor",
            judge=lambda found: _steps_to_floor(found, [(0, 64)], 1.25),
        ),
        Target(
            what="one adapter r16, batch 1–64",
            target="≤ 1.08 × the base step",
            judge=lambda found: _one_adapter(found, 1.08),
        ),
        Target(
            what="64 distinct adapters, batch 64",
            target="≤ 1.30 × floor",
            judge=lambda found: _steps_to_floor(found, [(64, 64)], 1.30),
        ),
        Target(
            what="64 distinct adapters, batch 256",
            target="≤ 1.35 × floor",
            judge=lambda found: _steps_to_floor(found, [(64, 256)], 1.35),
        ),
        Target(
            what="256 distinct adapters, batch 256",
            target="≤ 1.35 × floor",
            judge=lambda found: _steps_to_floor(found, [(256, 256)], 1.35),
        ),
        Target(
            what="kernels against the fastest peer, geometric mean",
            target="≥ 1.2 ×",
            judge=lambda found: _peers(found, geometric_mean, 1.2),
        ),
        Target(
            what="kernels against the fastest peer, worst case",
            target="≥ 0.95 ×",
            judge=lambda found: _peers(found, min, 0.95),
        ),
        Target(what="prefill of 8k tokens", target="≥ 0.70 of the matrix rate", judge=lambda f: _prefill_rate(f, 0.70)),
        Target(what="prefill with r16", target="≥ 0.93 × without", judge=lambda f: _prefill_lora(f, 16, 0.93)),
        Target(what="prefill with r64", target="≥ 0.88 × without", judge=lambda f: _prefill_lora(f, 64, 0.88)),
        Target(
            what="adapters host to device while decoding",
            target="≥ 0.90 of pinned bandwidth",
            judge=lambda found: _value(found, "of_pinned", lambda value: value >= 0.90),
        ),
        Target(
            what="decode step beside these copies",
            target="≤ 1.03 × alone",
            judge=lambda found: _value(found, "step_over_alone", lambda value: value <= 1.03),
        ),
        Target(what="deterministic", target="≤ 1.6 × the default step", judge=lambda f: _deterministic(f, 1.6)),
    ]


def _steps_to_floor(found: Found, loads: Sequence[tuple[int, int]], most: float) -> Verdict:
    """The worst ratio, if every one of the steps was timed."""
    ratios: list[float] = []
    for adapters, batch in loads:
        record = found.one("engine", adapters=adapters, batch=batch)
        if record is None or record.ratio is None:
            return _not_run(found.why_not("engine", adapters=adapters, batch=batch))
        ratios.append(record.ratio)
    return Verdict(measured=f"{max(ratios):.2f} ×", met=max(ratios) <= most)


def _one_adapter(found: Found, most: float) -> Verdict:
    ratios: list[float] = []
    for batch in (1, 4, 16, 64):
        base, lora = (found.one("engine", adapters=adapters, batch=batch) for adapters in (0, 1))
        if base is None or lora is None or base.median_s is None or lora.median_s is None:
            return _not_run(f"batch {batch}: " + found.why_not("engine", batch=batch))
        ratios.append(lora.median_s / base.median_s)
    return Verdict(measured=f"{max(ratios):.3f} ×", met=max(ratios) <= most)


def _peers(found: Found, summary: Callable[[Sequence[float]], float], least: float) -> Verdict:
    """Over the cases that a peer was right on, each against the fastest of them."""
    best = fastest_peers(found)
    if not best:
        return _not_run(found.why_not("sgmv"))
    value = summary(list(best.values()))
    return Verdict(measured=f"{value:.2f} × over {len(best)} cases", met=value >= least)


def fastest_peers(found: Found) -> dict[tuple[object, ...], float]:
    """By case, the least of the peers' times over ours."""
    best: dict[tuple[object, ...], float] = {}
    for record in found.all("sgmv"):
        if "over_ours" in record.values:
            key = tuple(value for name, value in sorted(record.case.items()) if name != "peer")
            best[key] = min(record.values["over_ours"], best.get(key, math.inf))
    return best


def _prefill_rate(found: Found, least: float) -> Verdict:
    record = found.one("engine", rank=0)
    if record is None:
        return _not_run(found.why_not("engine", rank=0))
    value = record.values["of_matmul"]
    return Verdict(measured=f"{value:.2f}", met=value >= least)


def _prefill_lora(found: Found, rank: int, least: float) -> Verdict:
    base, lora = found.one("engine", rank=0), found.one("engine", rank=rank)
    if base is None or lora is None or base.median_s is None or lora.median_s is None:
        return _not_run(found.why_not("engine", rank=rank))
    value = base.median_s / lora.median_s
    return Verdict(measured=f"{value:.2f} ×", met=value >= least)


def _value(found: Found, name: str, met: Callable[[float], bool]) -> Verdict:
    record = found.one("engine", copies="while decoding")
    if record is None:
        return _not_run(found.why_not("engine", copies="while decoding"))
    return Verdict(measured=f"{record.values[name]:.2f}", met=met(record.values[name]))


def _deterministic(found: Found, most: float) -> Verdict:
    """The worst over the steps and prompts that both were timed at."""
    ratios = [
        record.median_s / default.median_s
        for record in found.all("deterministic")
        if (default := found.one("engine", **record.case)) is not None and record.median_s and default.median_s
    ]
    if not ratios:
        return _not_run(found.why_not("deterministic"))
    return Verdict(measured=f"{max(ratios):.2f} × over {len(ratios)} cases", met=max(ratios) <= most)


def _not_run(why: str) -> Verdict:
    return Verdict(measured=f"not run: {why}", met=None)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
