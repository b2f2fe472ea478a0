"""What says whether the kernels can be trusted, before anything is timed: all of them compiled, and the tests that need
a GPU. Each is a command in a process of its own, whose log grows while it runs.

What has been compiled stays in Triton's cache, so that no other section spends its time on that.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from lorasrv_bench.gpu_records import DONE, NOT_RUN, WRONG, Record
from lorasrv_bench.gpu_section import Section

ROOT = Path(__file__).parents[2]
# What a command has to end in once it is asked to.
_END_S = 6.0
_MOST_WORKERS = 12


def run_compile(section: Section) -> None:
    """Every kernel that a launcher can choose here, on all cores; otherwise each is compiled when it is first met."""
    case = {"what": "kernels"}
    if section.device.type != "cuda":
        section.skip(case, "no GPU")
        return
    major, minor = torch.cuda.get_device_capability(section.device)
    command = [sys.executable, "-m", "lorasrv_kernels.gate", f"{major}{minor}"]
    code, last = run_logged(command, section.results.path.with_name("compile.txt"), section.deadline.left_s - _END_S)
    # A kernel that spills is slow, not wrong.
    section.add(Record(section=section.name, case=case, status=NOT_RUN if code is None else DONE, why=last))


def run(section: Section) -> None:
    case = {"what": "pytest -m gpu"}
    if section.device.type != "cuda":
        section.skip(case, "no GPU")
        return
    if not (ROOT / "tests").is_dir():
        section.skip(case, "no tests beside this package")
        return
    log = section.results.path.with_name("pytest.txt")
    code, last = run_logged(pytest_command(), log, section.deadline.left_s - _END_S)
    status = NOT_RUN if code is None else status_of(code)
    section.add(Record(section=section.name, case=case, status=status, why=last))


def pytest_command() -> list[str]:
    """In several processes where pytest-xdist is there, since most of the time is compiling. What versions of packages
    warn of here is no failure."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu and not slow", "--no-header", "-W", "default"]
    command += ["-p", "no:cacheprovider"]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(_MOST_WORKERS, os.cpu_count() or 1))]
    return command


def run_logged(command: Sequence[str], log: Path, limit_s: float) -> tuple[int | None, str]:
    """The exit code, None when it was not over in time, and the last line that it wrote."""
    paths = [str(ROOT / folder) for folder in (".", "kernels", "adapters", "benchmarks", "tests")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            code = None
            # pytest then tells of the failures so far.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_END_S / 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    last = summary(log.read_text(errors="replace"))
    return code, last if code is not None else f"not over in the {limit_s:.0f} s it had; last line: {last}"


def status_of(returncode: int) -> str:
    """pytest's 5 is that no test was there to run."""
    return {0: DONE, 5: NOT_RUN}.get(returncode, WRONG)


def summary(output: str) -> str:
    """pytest's last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else "no output"
