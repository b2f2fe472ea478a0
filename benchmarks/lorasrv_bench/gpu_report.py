"""The short table at the end of a run."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from lorasrv_bench.gpu_records import DONE, NOT_RUN, WRONG, Record
from lorasrv_bench.gpu_targets import Found, targets


def report(records: Sequence[Record], about: Mapping[str, object], *, on_gpu: bool) -> str:
    found = Found(records)
    parts = [_about(about, on_gpu), _counts(records), _ceilings(found), _groups(found), _steps(found)]
    if on_gpu:
        parts.append(target_table(found))
    wrong = [f"- {record.section} {dict(record.case)}: {record.why}" for record in records if record.status == WRONG]
    if wrong:
        parts.append("WRONG:\n" + "\n".join(wrong))
    return "\n\n".join(part for part in parts if part)


def target_table(found: Found) -> str:
    lines = ["| H200 row | target | measured | met |", "|---|---|---|---|"]
    for target in targets():
        verdict = target.judge(found)
        met = {True: "yes", False: "NO", None: "–"}[verdict.met]
        lines.append(f"| {target.what} | {target.target} | {verdict.measured} | {met} |")
    return "\n".join(lines)


def _about(about: Mapping[str, object], on_gpu: bool) -> str:
    line = ", ".join(f"{name} {value}" for name, value in about.items())
    return line if on_gpu else line + "\nOn a CPU: the torch path at small sizes. These times say nothing about a GPU."


def _counts(records: Sequence[Record]) -> str:
    """Of each section, what came of its cases, and why those that did not run did not."""
    lines = ["| section | done | not run | wrong | reasons |", "|---|---|---|---|---|"]
    for section in dict.fromkeys(record.section for record in records):
        own = [record for record in records if record.section == section]
        counts = [sum(record.status == status for record in own) for status in (DONE, NOT_RUN, WRONG)]
        reasons: dict[str, int] = defaultdict(int)
        for record in own:
            if record.status != DONE or section == "tests":
                reasons[record.why] += 1
        text = "; ".join(f"{why} ({count})" for why, count in reasons.items())
        lines.append(f"| {section} | {' | '.join(map(str, counts))} | {text} |")
    return "\n".join(lines)


def _ceilings(found: Found) -> str:
    rates = {str(r.case["what"]): r.values["rate"] for r in found.all("ceilings")}
    units = {"read": (1e9, "GB/s read"), "copy": (1e9, "GB/s copied, read plus written")}
    units |= {"to_device": (1e9, "GB/s from host memory"), "matmul": (1e12, "TFLOP/s in bf16")}
    return "Ceilings: " + ", ".join(f"{rates[name] / per:.4g} {unit}" for name, (per, unit) in units.items() if name in rates)


def _groups(found: Found) -> str:
    """Geometric means over LoRA's products and over attention: ours to the floor, every peer to ours."""
    lines: list[str] = []
    for section, by in (("sgmv", ("model", "group")), ("attention", ("rows",))):
        groups: dict[tuple[object, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in found.all(section):
            peer = str(record.case.get("peer"))
            value = record.ratio if peer == "ours" else record.values.get("over_ours")
            if value:
                groups[tuple(record.case[name] for name in by)][peer].append(value)
        for key, peers in groups.items():
            own = " ".join(f"{name} {value}" for name, value in zip(by, key, strict=True))
            text = ", ".join(
                f"{'ours over the floor' if peer == 'ours' else peer + ' over ours'} {_mean(values):.2f} ({len(values)})"
                for peer, values in peers.items()
            )
            lines.append(f"| {section} | {own} | {text} |")
    if not lines:
        return ""
    return "\n".join(["| | group | geometric means (cases) |", "|---|---|---|", *lines])


def _steps(found: Found) -> str:
    lines: list[str] = []
    for section in ("engine", "deterministic"):
        for record in found.all(section):
            if record.median_s is not None:
                case = " ".join(f"{name} {value}" for name, value in record.case.items())
                ratio = "–" if record.ratio is None else f"{record.ratio:.2f}"
                again = "–" if record.again is None else f"{abs(record.again - 1) * 100:.1f} %"
                lines.append(f"| {section} | {case} | {record.median_s * 1e3:.3f} | {ratio} | {again} |")
    if not lines:
        return ""
    header = ["| | step | ms | over the floor | the same again differs by |", "|---|---|---|---|---|"]
    return "\n".join([*header, *lines])


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
