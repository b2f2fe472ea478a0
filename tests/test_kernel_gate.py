"""Everything that a kernel's launcher can ask the compiler for, compiled for sm_80 and sm_90 with no GPU."""

import json
import os
import subprocess
import sys

import pytest


def run(program: str, timeout_s: int) -> str:
    """In a process of its own, since this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)
def test_all_variants_compile_without_faults() -> None:
    """`-s` shows the table."""
    table = run("lorasrv_kernels.gate", timeout_s=900)
    print(table)
    assert {line.split()[0] for line in table.splitlines()[:-1]} == {"sm_80", "sm_90"}


@pytest.mark.timeout(500)
def test_the_table_holds_whatever_a_launcher_picks() -> None:
    """For the shapes of many models, any rank, prompts and decode rows, in both types that are served."""
    found = json.loads(run("selected_kernels", timeout_s=400).splitlines()[-1])
    assert found["missing"] == []
    # What no model of these picks: attention in fp16, rows that are not aligned, sums that nobody norms.
    assert len(found["idle"]) < 24
