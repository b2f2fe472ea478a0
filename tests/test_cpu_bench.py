"""The table of the CPU's targets: what is met, what is not, and what has no score."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lorasrv_bench import cpu, cpu_rows, curves, lora_cost
from lorasrv_bench.cpu_rows import Row
from lorasrv_bench.decisions import Load, Measured
from lorasrv_bench.lora_cost import Cost
from lorasrv_bench.peers import MIXED, OURS, Compared
from lorasrv_bench.plots import Curve, chart
from lorasrv_bench.start_up import Started, peak_memory
from lorasrv_bench.step_counts import Counts, StepCost

MIB = 1 << 20


def compared(**rates: dict[str, list[float]]) -> Compared:
    arms = {name.replace("_", " "): each for name, each in rates.items()}
    return Compared(
        rates={"ours, through gRPC": arms.pop("ours"), **arms},
        wrong={},
        bound={},
        searched={},
        chosen={},
        worst_gap={},
    )


def test_ours_against_peers_of_the_run_and_of_earlier_days() -> None:
    found = compared(ours={"base": [900.0, 1100.0], MIXED: [800.0, 900.0]}, PEFT_mixed_batch={MIXED: [200.0, 250.0]})
    base, mixed, llama, vllm = cpu_rows.of_peers(found)
    assert base.met is False and "1.50 (1.35 to 1.65) ×" in base.measured and "of an earlier day" in base.measured
    assert mixed.met is False and "3.80 (3.60 to 4.00) ×" in mixed.measured and "in this run" in mixed.measured
    assert (llama.met, vllm.met) == (False, False)
    found.rates["llama.cpp"] = {"base": [500.0, 500.0], MIXED: [100.0, 100.0]}
    assert [row.met for row in cpu_rows.of_peers(found)] == [True, False, True, False]
    assert "earlier" not in cpu_rows.of_peers(found)[0].measured


def test_wrong_output_has_no_row() -> None:
    found = compared(ours={"base": [9e3], MIXED: [9e3]}, PEFT_mixed_batch={MIXED: [1.0]})
    found.wrong["PEFT mixed batch"] = ["wrong tokens"]
    assert [row.met for row in cpu_rows.of_peers(found)] == [True, None, True, True]
    found.wrong[OURS] = ["wrong too"]
    rows = cpu_rows.of_peers(found)
    assert [row.met for row in rows] == [None] * 4
    assert cpu_rows.table(rows).count("wrong too | no score |") == 4


def test_the_cost_of_adapters_is_what_their_bytes_take_and_half_more() -> None:
    step_s = {0: [0.010, 0.012, 0.011], 4: [0.0129, 0.0149, 0.0139], 16: [0.030, 0.032, 0.031]}
    cost = Cost(step_s=step_s, adapter_bytes=10**7, bytes_per_s=2e10, wrong=())
    four, many = cpu_rows.of_cost(cost, (4, 16))
    assert four.met and "3.00 ms at 20.0 GB/s" in four.target and "+ 2.90" in four.measured
    assert many.met is False and "12.00 ms" in many.target
    (wrong,) = cpu_rows.of_cost(replace(cost, wrong=("off",)), (4,))
    assert "| off | no score |" in cpu_rows.table([wrong])


def test_a_step_counts_where_all_rows_decode() -> None:
    """The second row's prompt takes longer, the first ends earlier: only steps between are of both."""
    first, second = (1.0, 6.0, 7.0, 9.0), (6.0, 7.0, 9.0, 30.0)
    assert lora_cost._decode_s([first, second]) == 1.5


def test_equal_ratios_are_equally_far_across() -> None:
    points = ((1.0, 1.0), (10.0, 2.0), (100.0, 3.0))
    drawn = chart("t", [Curve(name="c", points=points)], x="x", y="y", log_x=True)
    line = re.search(r'<polyline[^>]*points="([^"]+)"', drawn)
    assert line is not None
    a, b, c = (float(point.split(",")[0]) for point in line[1].split())
    assert b - a == pytest.approx(c - b, abs=0.2) and b - a > 50
    assert ">1<" in drawn and ">100<" in drawn
    assert "nan" not in chart("t", [Curve(name="c", points=((0.0, 1.0), (5.0, 2.0)))], x="x", y="y", log_x=True)


def counts(python_calls: float, torch_ops: float) -> StepCost:
    each = Counts(python_calls=python_calls, builtin_calls=0, torch_ops=torch_ops, copied_bytes=0)
    return StepCost(layer=each, rest=each)


def test_dispatches_must_not_grow() -> None:
    assert cpu_rows.of_counts({1: counts(5, 9), 16: counts(5, 9)})[0].met
    assert not cpu_rows.of_counts({1: counts(5, 9), 16: counts(5, 10)})[0].met
    assert not cpu_rows.of_counts({1: counts(5, 9), 16: counts(6, 9)})[0].met


@pytest.mark.parametrize(
    ("show", "ratio", "met"),
    [("thousands", 0.94, False), ("thousands", 0.96, True), ("storm", 1.2, False), ("storm", 1.05, True)],
)
def test_economy(show: str, ratio: float, met: bool) -> None:
    arms = {"thousands": ("all", "resident"), "storm": ("cold", "resident")}[show]
    rounds = [{arms[0]: ratio * size, arms[1]: size} for size in (1.0, 2.0)]
    row = cpu_rows.of_economy(show, {"wrong": [], "rounds": rounds, "client_bound": ["late"], "to_few": 0.5})
    assert row.met is met and f"{ratio:.3f} ({ratio:.3f} to {ratio:.3f}) ×" in row.measured
    assert "CLIENT-BOUND: late" in row.measured
    assert cpu_rows.of_economy(show, {"wrong": ["bad"]}).wrong == "bad"


def test_the_scheduler_s_99th_percentile_counts() -> None:
    def row(slow: int) -> Row:
        step_s = [0.0005] * (1000 - slow) + [0.002] * slow
        found = Measured(step_s=[1.0], decide_apply_s=step_s, admissions=1, loads=2, evictions=3, preemptions=4)
        return cpu_rows.of_decisions(Load(), found)

    assert row(5).met and not row(20).met
    assert "256 running, 2000 waiting, 1000 adapters" in row(5).target


def test_streaming_is_beside_offline() -> None:
    assert cpu_rows.of_streaming(256, [(96.0, 100.0), (97.0, 100.0)]).met
    assert not cpu_rows.of_streaming(256, [(90.0, 100.0)]).met


def test_start_up_may_take_five_seconds_and_the_reading() -> None:
    started = Started(
        ready_s=(5.1, 5.0, 5.2), peak_bytes=(700 * MIB,), read_s=0.2, weights_bytes=10 * MIB, pool_bytes=100 * MIB
    )
    assert [row.met for row in cpu_rows.of_start(started)] == [True, True]
    worse = replace(started, ready_s=(5.3,), peak_bytes=(711 * MIB, 1))
    assert [row.met for row in cpu_rows.of_start(worse)] == [False, False]


def test_peak_memory_is_that_of_all_processes_below() -> None:
    holding = "import sys; held = b'x' * (100 << 20); print('there', flush=True); sys.stdin.read()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {holding!r}])"
    with (
        peak_memory() as looks,
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        before = len(looks)
        while len(looks) < before + 2:
            pass
        process.communicate("")
    assert 100 * MIB < max(looks) < 200 * MIB


def test_points_of_curves() -> None:
    assert [point.adapters for point in curves.points_of("adapters", None, 128)] == [1, 4, 16, 64, 256, 1000, 2000]
    assert {(point.concurrency, point.requests) for point in curves.points_of("adapters", None, 128)} == {(16, 128)}
    busier = curves.points_of("concurrency", [1, 64], 128)
    assert [(point.adapters, point.concurrency, point.requests) for point in busier] == [(16, 1, 16), (16, 64, 128)]
    workload = curves.workload_of(busier[1], 64, 8, 0)
    assert {(a.prompt_tokens, a.output_tokens) for a in workload.arrivals} == {(64, 64)}
    assert (workload.num_adapters, workload.ranks) == (16, (8,))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_small_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["adapters", "--size", "tiny", "--points", "1", "3", "--requests", "6", "--tokens", "8"]
    assert curves.main([*options, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.count("tok/s") == 2 and "NO SCORE" not in told
    assert "Against the number of adapters" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run_has_every_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["--quick", "--out", str(tmp_path / "bench.json")]) == 0
    told = json.loads((tmp_path / "bench.json").read_text())
    rows = [row["what"] for row in told["rows"]]
    assert rows == [
        "base only",
        *["4 adapters, mixed"] * 3,
        "LoRA's own cost, 1 adapters",
        "LoRA's own cost, 4 adapters",
        "dispatches",
        "thousands of adapters",
        "cold loads",
        "scheduler + bookkeeping",
        "streaming",
        "start",
        "host memory",
    ]
    assert all(row["met"] is not None and not row["wrong"] for row in told["rows"])
    table = capfd.readouterr().out
    assert table.count("| met |") + table.count("| **not met** |") == len(rows)
