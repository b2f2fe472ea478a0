"""A report of one run or several: a page that needs nothing but a browser, with the figures and their curves.

One run: its figures, the distributions of its latencies, the pool by owner over time. Several: throughput and latency
too, a point for each, against the number of adapters and against how many requests were under way at a time.
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from lorasrv_bench.plots import Curve, bands, chart
from lorasrv_bench.records import Record, refusals
from lorasrv_bench.watch import OWNERS

CDF_POINTS = 400
SHOWN = ("requests_per_s", "output_tokens_per_s", "goodput_per_s", "failed")
LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "E2E"}
# What of a header several runs are set against, and what it is called.
AGAINST = {"adapters": "adapters", "concurrency": "requests at a time"}
STYLE = "body{font:14px sans-serif;max-width:1000px;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"


def report(records: Sequence[Record]) -> str:
    """The page, as HTML."""
    parts = [f"<!doctype html><meta charset=utf-8><title>lorasrv bench</title><style>{STYLE}</style>"]
    for number, record in enumerate(records, start=1):
        head = record.header
        parts.append(f"<h2>Run {number}: {escape(head['workload'])}, seed {head['seed']}</h2>")
        told = ("time", "commit", "machine", "server", "concurrency", "resident", "warm_up")
        parts.append("<p>" + escape("; ".join(f"{name}: {head.get(name)}" for name in told)) + "</p>")
        parts.append(_of_run(record))
    scored = [record for record in records if not refusals(record.summary) and "requests_per_s" in record.summary]
    for key, title in AGAINST.items():
        if len({record.header.get(key) for record in scored}) > 1:
            parts.append(f"<h2>Against the number of {title}</h2>" + _against(key, title, scored))
    return "\n".join(parts)


def _of_run(record: Record) -> str:
    summary = record.summary
    if refusals(summary):
        items = "".join(f"<li>{escape(each)}</li>" for each in refusals(summary))
        return f"<p><b>No score: the output is wrong.</b></p><ul>{items}</ul>"
    parts: list[str] = []
    bound = summary.get("client", {}).get("bound", [])
    if bound:
        parts.append(f"<p><b>The client may be what was measured:</b> {escape('; '.join(bound))}</p>")
    parts.append("<p>Checked: " + escape("; ".join(summary["checks"]["done"])) + "</p>")
    parts.append(_table(summary))
    done = [call for call in record.calls if call["error"] is None and call["piece_s"]]
    for name, values in (
        ("TTFT", [call["piece_s"][0] - call["sent_s"] for call in done]),
        ("ITL", [b - a for call in done for a, b in pairwise(call["piece_s"])]),
        ("E2E", [call["ended_s"] - call["sent_s"] for call in done]),
    ):
        if len(values) > 1:
            curves = [Curve(name=name, points=cdf([1000 * value for value in values]))]
            parts.append(chart(f"{name}: share of all within", curves, x="ms", y="share"))
    if len(record.looks) > 1:
        layers = {owner: [float(look[owner]) for look in record.looks] for owner in (*OWNERS[1:], OWNERS[0])}
        parts.append(bands("Pool by owner", [look["at_s"] for look in record.looks], layers, x="s", y="pages"))
    return "\n".join(parts)


def cdf(values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Points of the distribution function, at most CDF_POINTS."""
    ordered = sorted(values)
    ranks = sorted({round(index * (len(ordered) - 1) / (CDF_POINTS - 1)) for index in range(CDF_POINTS)})
    return tuple((ordered[rank], (rank + 1) / len(ordered)) for rank in ranks)


def _table(summary: dict[str, Any]) -> str:
    rows = [f"<tr><th>{name}</th><td>{summary[name]:.4g}</td></tr>" for name in SHOWN if name in summary]
    for name, title in LATENCIES.items():
        if summary.get(name):
            cells = "".join(
                f"<td>{key} {1000 * summary[name][key]:.4g} ms</td>" for key in ("mean", "p50", "p90", "p99")
            )
            rows.append(f"<tr><th>{title}</th>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _against(key: str, title: str, records: Sequence[Record]) -> str:
    placed = [(float(record.header[key]), record.summary) for record in records if record.header.get(key) is not None]
    placed.sort(key=lambda each: each[0])

    def curve(name: str, said: str, which: str | None = None) -> Curve:
        points = [(at, found[name] if which is None else 1000 * found[name][which]) for at, found in placed]
        return Curve(name=said, points=tuple(points))

    tokens = [curve("output_tokens_per_s", "output tokens/s")]
    latency = [curve("ttft_s", "TTFT p50", "p50"), curve("ttft_s", "TTFT p99", "p99"), curve("e2e_s", "E2E p50", "p50")]
    return chart("Throughput", tokens, x=title, y="tokens/s", log_x=True) + chart(
        "Latency", latency, x=title, y="ms", log_x=True
    )
