"""What a run found, one JSON line a case, written as soon as it is known: what a kill leaves is whole lines."""

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lorasrv_bench.figures import commit
from lorasrv_bench.gpu_timing import Timing

DONE, NOT_RUN, WRONG = "done", "not run", "wrong"
# Says how many cases a section means to run, so that those it never came to are known.
PLANNED = "planned"
NO_TIME = "no time left"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One case of a section. `case` names it by what was varied.

    A time stands only where the output has been checked (`error` is its distance from the oracle's) or there is
    nothing to check; `why` says what kept a case from running, or what is wrong with its output.
    """

    section: str
    case: Mapping[str, object]
    status: str = DONE
    median_s: float | None = None
    spread: float | None = None  # third quartile less first, over the median
    again: float | None = None  # the same version timed once more, over the first median
    floor_s: float | None = None
    error: float | None = None
    why: str = ""
    values: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def ratio(self) -> float | None:
        """Measured over floor."""
        if self.median_s is None or self.floor_s is None:
            return None
        return self.median_s / self.floor_s


def timed(
    section: str,
    case: Mapping[str, object],
    timing: Timing,
    *,
    floor_s: float | None = None,
    error: float | None = None,
    again: Timing | None = None,
    values: Mapping[str, float] | None = None,
) -> Record:
    return Record(
        section=section,
        case=case,
        median_s=timing.median_s,
        spread=timing.spread,
        again=None if again is None else again.median_s / timing.median_s,
        floor_s=floor_s,
        error=error,
        values=values or {},
    )


class Results:
    """The lines of a run's file, which its sections' processes append to in turn."""

    def __init__(self, folder: Path, about: Mapping[str, object]) -> None:
        self.path = folder / "gpu.jsonl"
        self._about = about

    def add(self, record: Record) -> None:
        line = {**asdict(record), "ratio": record.ratio, "checked": record.error is not None, **self._about}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if record.why != NO_TIME:
            print(_line(record), flush=True)

    def records(self) -> Iterator[Record]:
        names = Record.__dataclass_fields__
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                yield Record(**{name: value for name, value in json.loads(line).items() if name in names})


def _line(record: Record) -> str:
    case = " ".join(f"{name}={value}" for name, value in record.case.items())
    if record.status == PLANNED:
        return f"[{record.section}] {record.values['cases']:.0f} cases"
    if record.status != DONE:
        return f"[{record.section}] {case}: {record.status}: {record.why}"
    parts = [] if record.median_s is None else [f"{record.median_s * 1e6:.2f} us"]
    if record.ratio is not None:
        parts.append(f"{record.ratio:.2f} x floor")
    if record.error is not None:
        parts.append(f"error {record.error:.1e}")
    parts += [f"{name} {value:.4g}" for name, value in record.values.items()]
    return f"[{record.section}] {case}: {', '.join(parts)}"


def about(device: torch.device, seed: int, size: str) -> dict[str, object]:
    """What stands beside every number."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "commit": commit(),
        "device": name,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "seed": seed,
        "size": size,
        "dtype": "bfloat16",
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "absent"
    return triton.__version__
