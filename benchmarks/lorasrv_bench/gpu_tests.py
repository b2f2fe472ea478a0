"""The tests that need a GPU, in a process of their own: what is timed afterwards is worth little where they fail."""

import os
import subprocess
import sys
from pathlib import Path

from lorasrv_bench.gpu_records import DONE, NOT_RUN, WRONG, Record
from lorasrv_bench.gpu_section import Section

ROOT = Path(__file__).parents[2]


def run(section: Section) -> None:
    case = {"what": "pytest -m gpu"}
    if section.device.type != "cuda":
        section.skip(case, "no GPU")
        return
    if not (ROOT / "tests").is_dir():
        section.skip(case, "no tests beside this package")
        return
    paths = [str(ROOT / folder) for folder in (".", "kernels", "adapters", "benchmarks", "tests")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
            timeout=section.deadline.left_s,
        )
    except subprocess.TimeoutExpired:
        section.skip(case, "not over in the time they had")
        return
    log = section.results.path.with_name("pytest.txt")
    log.write_text(done.stdout + done.stderr)
    section.add(Record(section=section.name, case=case, status=status_of(done.returncode), why=summary(done.stdout)))


def status_of(returncode: int) -> str:
    """pytest's 5 is that no test was there to run."""
    return {0: DONE, 5: NOT_RUN}.get(returncode, WRONG)


def summary(output: str) -> str:
    """pytest's last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else "no output"
