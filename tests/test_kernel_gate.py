"""Everything that a kernel's launcher can ask the compiler for, compiled for sm_80 and sm_90 with no GPU."""

import os
import subprocess
import sys

import pytest

# What `make test` compiles: what serves on the newer device.
QUICK = ("90", "bf16", "-ALIGN=1,")


def gate(*arguments: str) -> str:
    """In a process of its own, since this one may run Triton's interpreter. `-s` shows the table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "lorasrv_kernels.gate", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_serving_variants_compile_without_faults() -> None:
    assert len(gate(*QUICK).splitlines()) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_variants_compile_without_faults() -> None:
    gate()
