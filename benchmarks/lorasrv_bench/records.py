"""A run as a file of JSON lines: a header, a line for each look at the server and for each request, and the summary."""

import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasrv import __version__
from lorasrv.errors import ConfigurationError
from lorasrv_bench.figures import commit, cpu_name
from lorasrv_bench.load import Call
from lorasrv_bench.watch import OWNERS, Look
from lorasrv_bench.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class Record:
    """A file read back: the dicts of its lines, by kind."""

    header: dict[str, Any]
    looks: list[dict[str, Any]]
    calls: list[dict[str, Any]]
    summary: dict[str, Any]


def header(workload: Workload, **settings: Any) -> dict[str, Any]:
    """What a figure has to be read with: commit, machine, workload, seed, and how it was run."""
    return {
        "lorasrv": __version__,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "workload": workload.text,
        "seed": workload.seed,
        "requests": len(workload.arrivals),
        "adapters": workload.num_adapters,
        "digest": workload.digest(),
        **settings,
    }


def look_line(look: Look, start_s: float) -> dict[str, Any]:
    return {
        "at_s": round(look.at_s - start_s, 4),
        **dict(zip(OWNERS, look.pages, strict=True)),
        "running": look.running,
        "waiting": look.waiting,
    }


def call_line(call: Call) -> dict[str, Any]:
    """All of a call but what was said, which is checked and not kept."""
    told = asdict(call)
    for name in ("token_ids", "text", "asked_prompt_tokens", "asked_output_tokens"):
        del told[name]
    return told | {"piece_s": [round(each, 5) for each in call.piece_s]}


def write(
    path: Path,
    header: dict[str, Any],
    looks: Iterable[dict[str, Any]],
    calls: Iterable[dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    lines = [
        {"kind": "header", **header},
        *({"kind": "look", **look} for look in looks),
        *({"kind": "call", **call} for call in calls),
        {"kind": "summary", **summary},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path) -> Record:
    """Raises ConfigurationError for what is no such file, and OSError."""
    by_kind: dict[str, list[dict[str, Any]]] = {"header": [], "look": [], "call": [], "summary": []}
    try:
        for line in path.read_text().splitlines():
            told = json.loads(line)
            by_kind[told.pop("kind")].append(told)
        (head,), (summary,) = by_kind["header"], by_kind["summary"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} is no file of `lorasrv bench`: {error!r}") from None
    return Record(header=head, looks=by_kind["look"], calls=by_kind["call"], summary=summary)


def figures(summary: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A summary's numbers by dotted names, those of the client left out."""
    found: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, dict) and name != "client":
            found |= figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def refusals(summary: dict[str, Any]) -> Sequence[str]:
    """Why a run has no score; empty where it has one."""
    return summary["checks"]["wrong"]
