"""The fit of a hardware table, and the benchmark that holds the simulator against the real engine, made small."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lorasrv.config import SchedulerConfig
from lorasrv.sim.cost import CostModel, StepWork
from lorasrv.sim.hardware import find_hardware
from lorasrv_bench import calibration, real_engine, simulated
from lorasrv_bench.calibration import Timed, fit
from sim_rig import TINY, hardware

TRUTH = hardware(
    runs_ahead=False,
    kernel_s=0.0,
    step_s=2e-3,
    row_s=1e-4,
    adapter_s=5e-4,
    flops_per_s=3e9,
    read_bytes_per_s=2e8,
    adapter_bytes_per_s=5e7,
    kv_bytes_per_s=4e7,
)


def timed(noise: float = 0.0) -> list[Timed]:
    """Steps as a machine like TRUTH takes them."""
    costs, rng, found = CostModel(TINY, TRUTH, 4), random.Random(0), []
    for rows, tokens, context, adapters in itertools.product((1, 4, 16), (0, 1, 63), (32, 200), (0, 1, 4)):
        work = StepWork(
            num_rows=rows,
            num_tokens=rows + tokens,
            context_tokens=rows * context,
            pairs=rows * context,
            num_adapters=adapters,
            adapter_params=sum(TINY.adapter_params(4 << number) for number in range(adapters)),
        )
        seconds = costs.host_s(rows) + costs.forward_s(work)
        found.append(Timed(work=work, seconds=seconds * rng.uniform(1 - noise, 1 + noise)))
    return found


@pytest.mark.parametrize(("noise", "limit"), [(0.0, 0.02), (0.05, 0.08)])
def test_a_machine_is_found_again_from_its_steps(noise: float, limit: float) -> None:
    found = CostModel(TINY, fit(TINY, timed(noise)), 4)
    for each in timed():
        assert found.host_s(each.work.num_rows) + found.forward_s(each.work) == pytest.approx(each.seconds, rel=limit)


def test_a_table_has_no_negative_terms() -> None:
    """Steps that get faster with every adapter are noise."""
    steps = [Timed(work=each.work, seconds=1e-3 / (1 + each.work.num_adapters)) for each in timed()]
    found = fit(TINY, steps)
    assert min(found.step_s, found.row_s, found.adapter_s) >= 0 and found.flops_per_s > 0


def test_the_comparison_runs_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it at a tiny size: the table is written, every request of each workload is served on both sides."""
    tiny = {**real_engine.SMALL_CONFIG, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    monkeypatch.setattr(real_engine, "SMALL_CONFIG", {**tiny, "vocab_size": 64})
    monkeypatch.setattr(simulated, "SCHEDULER", SchedulerConfig(max_running=4, max_step_tokens=64))
    monkeypatch.setattr(simulated, "NUM_ADAPTERS", 64)
    monkeypatch.setattr(simulated, "_LENGTHS", "in_range=4..40,out_range=2..6")
    # All requests at once: nobody waits for the next one to come.
    cases = tuple(replace(case, num_adapters=min(32, case.num_adapters), load=100.0) for case in simulated.CASES)
    monkeypatch.setattr(simulated, "CASES", cases)
    for name, values in (("_BATCHES", (1, 4)), ("_CONTEXTS", (8, 16)), ("_PREFILLS", (8, 32))):
        monkeypatch.setattr(calibration, name, values)
    table = tmp_path / "table.json"
    assert simulated.main(["--requests", "4", "--repeats", "1", "--out", str(table)]) == 0
    printed = capsys.readouterr().out
    for case in simulated.CASES:
        assert f"\n{case.name}: slora:" in printed
    assert printed.count("TTFT p99: real ") == printed.count("ITL p50: real ") == 3
    found = find_hardware(str(table))
    assert not found.runs_ahead and found.step_s + found.row_s > 0
