"""What a section of the benchmark is given, and how it is run so that the run goes on whatever becomes of a case."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasrv_bench.gpu_budget import Deadline
from lorasrv_bench.gpu_floors import Ceilings
from lorasrv_bench.gpu_records import DONE, NO_TIME, NOT_RUN, PLANNED, WRONG, Record, Results
from lorasrv_bench.gpu_sizes import Size


class WrongOutput(Exception):
    """An output is too far from the oracle's."""


class NotRun(Exception):
    """A case cannot be run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section's name, its means and its time."""

    name: str
    device: torch.device
    size: Size
    seed: int
    deadline: Deadline
    results: Results
    peers: Path | None

    @property
    def ceilings(self) -> Ceilings:
        """Those measured earlier in this run. Raises NotRun where they were not."""
        found = {str(r.case["what"]): r.values["rate"] for r in self.results.records() if _is_ceiling(r)}
        try:
            return Ceilings.of(found)
        except KeyError as error:
            raise NotRun(f"the ceiling {error} was not measured") from error

    def add(self, record: Record) -> None:
        self.results.add(record)

    @contextmanager
    def case(self, case: Mapping[str, object]):
        """What goes wrong in a case is its record. An error of the device itself ends the section."""
        try:
            yield
        except WrongOutput as wrong:
            self.add(Record(section=self.name, case=case, status=WRONG, why=str(wrong)))
        except NotRun as reason:
            self.skip(case, str(reason))
        except torch.OutOfMemoryError as error:
            self.skip(case, f"out of memory: {str(error).splitlines()[0]}")
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self.skip(case, f"{type(error).__name__}: {error}"[:500])

    def skip(self, case: Mapping[str, object], why: str) -> None:
        self.add(Record(section=self.name, case=case, status=NOT_RUN, why=why))

    def plan(self, num_cases: int) -> None:
        """Say that so many cases follow."""
        self.add(Record(section=self.name, case={}, status=PLANNED, values={"cases": num_cases}))

    def each(self, cases: Mapping[str, Mapping[str, object]], run: Callable[[str], None], estimate_s: float) -> None:
        """Run cases in order while there is time; those that do not fit are recorded as not run."""
        self.plan(len(cases))
        for key, case in cases.items():
            if not self.deadline.remains(estimate_s):
                self.skip(case, NO_TIME)
                continue
            with self.case(case):
                run(key)


def _is_ceiling(record: Record) -> bool:
    return record.section == "ceilings" and record.status == DONE


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in fp64; infinite where something is not finite."""
    if not bool(found.isfinite().all()):
        return float("inf")
    error = (found.double() - expected.double()).norm()
    return (error / expected.double().norm().clamp_min(1e-30)).item()


def check(error: float, limit: float, what: str) -> float:
    """The error. Raises WrongOutput past the limit, and for NaN."""
    if not error <= limit:
        raise WrongOutput(f"{what} is {error:.2e} of its norm from the oracle's; the limit is {limit:.0e}")
    return error
