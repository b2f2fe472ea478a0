"""The fit of a hardware table, and the benchmark that holds the simulator against the real engine, made small."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lorasrv.config import SchedulerConfig
from lorasrv.engine.batch import AdapterInput, ChunkInput, PageCopy
from lorasrv.errors import ConfigurationError
from lorasrv.model.shape import MODELS
from lorasrv.sim.cost import CostModel
from lorasrv.sim.hardware import find_hardware, write_hardware
from lorasrv.sim.measured import MeasuredSteps
from lorasrv.sim.work import StepWork
from lorasrv_bench import calibration, real_engine, simulated
from lorasrv_bench.calibration import fit
from lorasrv_bench.step_records import StepRecorder, Timed, kinds
from sim_rig import TINY, hardware

SECTIONS = calibration._SECTIONS
# Room for four tokens, then a new block; dear prompts; an adapter costs something once, for itself, and by its work.
TRUTH = MeasuredSteps(
    linear_params=TINY.linear_params,
    tokens=SECTIONS,
    seconds=(1.6e-3, 5e-4, 5e-4, 0.0, 2e-4, 2e-4, 1e-4, 1e-4, *[5e-5] * 4, 3e-5, 1e-7, 2.5e-4, 1e-5, 2e-7, 3e-8),
)


def served(noise: float = 0.0) -> list[tuple[StepWork, float]]:
    """Steps as a machine like TRUTH takes them, one in ten with something else on it."""
    rng, found = random.Random(0), []
    for rows, tokens, adapters in itertools.product((1, 2, 3, 4, 5, 6, 8, 11, 16), (0, 9, 30, 63, 120), (0, 1, 4)):
        for _ in range(11):
            num_adapters = min(rows, adapters)
            context, params = rng.randrange(20, 200), [TINY.adapter_params(4 << n) for n in range(num_adapters)]
            work = StepWork(
                num_rows=rows,
                num_tokens=rows + tokens,
                context_tokens=rows * context,
                pairs=rows * context,
                num_adapters=num_adapters,
                adapter_params=sum(params),
                adapter_products=sum(params) + tokens * sum(params[-1:]),
            )
            slow = 3.0 if rng.random() < 0.1 else rng.uniform(1 - noise, 1 + noise)
            found.append((work, TRUTH.step_s(work) * slow))
    return found


@pytest.mark.parametrize(("noise", "limit"), [(0.0, 0.02), (0.05, 0.06)])
def test_a_machine_is_found_again_from_its_steps(noise: float, limit: float) -> None:
    found = fit(TINY.linear_params, kinds(served(noise)))
    assert min(found.seconds) >= 0
    for work, _ in served():
        assert found.step_s(work) == pytest.approx(TRUTH.step_s(work), rel=limit)


def test_a_table_has_no_negative_terms() -> None:
    """Steps that get faster with every adapter are noise; what no step has costs nothing."""
    steps = [Timed(work=each.work, seconds=1e-3 / (1 + each.work.num_adapters)) for each in kinds(served())]
    assert min(fit(TINY.linear_params, steps).seconds) >= 0
    without = [each for each in kinds(served()) if not each.work.num_adapters]
    assert fit(TINY.linear_params, without).seconds[-4:] == (0.0, 0.0, 0.0, 0.0)


class Machine:
    """A runner and a clock: a forward takes a second for each chunk, what the host does behind it a tenth of that."""

    runs_ahead = False

    def __init__(self) -> None:
        self.now_s = 0.0

    def forward(self, chunks: Sequence[ChunkInput], copies: Sequence[PageCopy] = ()) -> Any:
        self.now_s += 1.1 * len(chunks)

    def __call__(self) -> float:
        return self.now_s

    def sleep_until(self, at_s: float) -> None:
        self.now_s = max(self.now_s, at_s)


def test_a_step_lasts_until_the_next_one_unless_the_engine_slept() -> None:
    machine = Machine()
    recorder = StepRecorder(machine, machine, machine, TINY)
    adapter = AdapterInput(directory=7, max_rank=4, scale=1.0)
    one, other = ChunkInput((1,), 4, (), None), ChunkInput((1, 2, 3), 0, (), adapter)
    recorder.forward((one,))
    recorder.sleep_until(0.5)  # past already
    recorder.forward((one, other))
    recorder.sleep_until(9.0)
    recorder.forward((other,))
    recorder.forward((one,))
    assert [(work.num_rows, work.num_adapters, round(seconds, 3)) for work, seconds in recorder.steps] == [
        (1, 0, 1.1),
        (1, 1, 1.1),
    ]
    assert recorder.steps[1][0].adapter_products == 3 * TINY.adapter_params(4)


def test_a_table_of_measured_steps_in_a_file(tmp_path: Path) -> None:
    """It serves its own model, and no other."""
    path = tmp_path / "box.json"
    write_hardware(hardware(runs_ahead=False, steps=TRUTH), path)
    found = find_hardware(str(path))
    assert found == hardware(runs_ahead=False, steps=TRUTH)
    work = served()[100][0]
    costs = CostModel(TINY, found, 4)
    assert costs.host_s(work.num_rows) + costs.forward_s(work) == TRUTH.step_s(work)
    with pytest.raises(ConfigurationError, match=f"model of {TINY.linear_params} linear parameters; 8B has"):
        CostModel(MODELS["8B"], found, 4)
    CostModel(MODELS["8B"], hardware(), 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [4, 2]}, "do not ascend"),
        ({"tokens": []}, "do not ascend"),
        ({"seconds": [1.0]}, "are not 18 numbers"),
        ({"seconds": [-1.0, *TRUTH.seconds[1:]]}, ">= 0"),
        ({"seconds": [math.nan, *TRUTH.seconds[1:]]}, ">= 0"),
        ({"seconds": "fast"}, "measured steps: ValueError"),
        ({"tokens": None}, "measured steps: TypeError"),
    ],
)
def test_wrong_measured_steps_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "box.json"
    right = json.loads(json.dumps(asdict(hardware(steps=TRUTH))))
    path.write_text(json.dumps({**right, "steps": {**right["steps"], **changes}}))
    with pytest.raises(ConfigurationError, match=message):
        find_hardware(str(path))
    path.write_text(json.dumps({**right, "steps": {"tokens": [1]}}))
    with pytest.raises(ConfigurationError, match="linear_params"):
        find_hardware(str(path))


def test_the_comparison_runs_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it at a tiny size: the table is written, every request of each workload is served on both sides."""
    tiny = {**real_engine.SMALL_CONFIG, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    monkeypatch.setattr(real_engine, "SMALL_CONFIG", {**tiny, "vocab_size": 64})
    monkeypatch.setattr(simulated, "SCHEDULER", SchedulerConfig(max_running=4, max_step_tokens=64))
    monkeypatch.setattr(simulated, "NUM_ADAPTERS", 64)
    monkeypatch.setattr(simulated, "PARTS", 2)
    monkeypatch.setattr(simulated, "spare_collections", lambda: None)  # this process has more to do
    monkeypatch.setattr(simulated, "_LENGTHS", "in_range=4..40,out_range=2..6")
    # All requests at once: nobody waits for the next one to come.
    cases = tuple(replace(case, num_adapters=min(32, case.num_adapters), load=100.0) for case in simulated.CASES)
    monkeypatch.setattr(simulated, "CASES", cases)
    sizes = {"_ADAPTERS": (0, 2), "_REQUESTS": 6, "_LENGTHS": "in_range=4..40,out_range=2..6", "_LOADS": (50.0,)}
    for name, values in {**sizes, "_TRIALS": 3}.items():
        monkeypatch.setattr(calibration, name, values)
    table = tmp_path / "table.json"
    assert simulated.main(["--requests", "4", "--repeats", "1", "--out", str(table)]) == 0
    printed = capsys.readouterr().out
    for case in simulated.CASES:
        assert f"\n{case.name}: 2 parts as slora:" in printed
    assert printed.count("TTFT p99: real ") == printed.count("ITL p50: real ") == 3
    found = find_hardware(str(table))
    assert not found.runs_ahead and found.steps is not None and found.steps.seconds[0] > 0
