"""Everything that a kernel's launcher can ask the compiler for, compiled for sm_80 and sm_90 with no GPU."""

import os
import subprocess
import sys

import pytest


@pytest.mark.timeout(600)
def test_all_variants_compile_without_faults() -> None:
    """In a process of its own, since this one may run Triton's interpreter. `-s` shows the table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "lorasrv_kernels.gate"], env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()[:-1]} == {"sm_80", "sm_90"}
