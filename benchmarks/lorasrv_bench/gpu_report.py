"""The short table at the end of a run."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from lorasrv_bench.gpu_predict import table as predicted_table
from lorasrv_bench.gpu_records import DONE, NOT_RUN, PLANNED, WRONG, Record
from lorasrv_bench.gpu_targets import Found, geometric_mean, targets

_REASONS = 6


def report(records: Sequence[Record], about: Mapping[str, object], *, on_gpu: bool) -> str:
    found = Found(records)
    parts = [_about(about, on_gpu), _counts(records), _ceilings(found), _groups(found), _steps(found)]
    wrong = [f"- {record.section} {dict(record.case)}: {record.why}" for record in records if record.status == WRONG]
    if wrong:
        parts.append("WRONG:\n" + "\n".join(wrong))
    parts.append(target_table(found) if on_gpu else predicted_table())
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
    if on_gpu:
        return line
    return f"{line}\nOn a CPU: the torch path at small sizes. This says nothing of a GPU: the H200 rows are unmeasured."


def _counts(records: Sequence[Record]) -> str:
    """Of each section, what came of its cases, and why those that did not run did not."""
    lines = ["| section | done | not run | never reached | wrong | reasons |", "|---|---|---|---|---|---|"]
    for section in dict.fromkeys(record.section for record in records):
        own = [record for record in records if record.section == section and record.status != PLANNED]
        done, not_run, wrong = (sum(record.status == status for record in own) for status in (DONE, NOT_RUN, WRONG))
        reasons: dict[str, int] = defaultdict(int)
        for record in own:
            if record.why:
                reasons[record.why] += 1
        most = sorted(reasons.items(), key=lambda item: -item[1])
        text = "; ".join(f"{why} ({count})" for why, count in most[:_REASONS])
        text += f"; {len(most) - _REASONS} more reasons" if len(most) > _REASONS else ""
        lines.append(f"| {section} | {done} | {not_run} | {_unreached(records, section)} | {wrong} | {text} |")
    return "\n".join(lines)


def _unreached(records: Sequence[Record], section: str) -> int:
    """Cases planned of which nothing is known: their process was ended, or the device failed."""
    known, planned = 0, 0
    for record in records:
        if record.section == section and record.status == PLANNED:
            planned += int(record.values["cases"])
        elif record.section == section and record.case.get("peer", "ours") == "ours" and "what" not in record.case:
            known += 1
    return max(0, planned - known)


def _ceilings(found: Found) -> str:
    rates = {str(r.case["what"]): r.values["rate"] for r in found.all("ceilings")}
    units = {"read": (1e9, "GB/s read"), "copy": (1e9, "GB/s copied, read plus written")}
    units |= {"to_device": (1e9, "GB/s from host memory"), "matmul": (1e12, "TFLOP/s in bf16")}
    known = [f"{rates[name] / per:.4g} {unit}" for name, (per, unit) in units.items() if name in rates]
    return "Ceilings: " + (", ".join(known) or "none")


def _groups(records: Found) -> str:
    """Geometric means over LoRA's products and over attention: ours to the floor, every peer to ours."""
    lines: list[str] = []
    for section, by in (("sgmv", ("model", "group")), ("attention", ("rows",))):
        groups: dict[tuple[object, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in records.all(section):
            peer = str(record.case.get("peer"))
            value = record.ratio if peer == "ours" else record.values.get("over_ours")
            if value:
                groups[tuple(record.case[name] for name in by)][peer].append(value)
        for key, peers in groups.items():
            own = " ".join(f"{name} {value}" for name, value in zip(by, key, strict=True))
            text = ", ".join(
                f"{'ours over the floor' if peer == 'ours' else f'{peer} over ours'} {geometric_mean(found):.2f} "
                f"({len(found)})"
                for peer, found in peers.items()
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
