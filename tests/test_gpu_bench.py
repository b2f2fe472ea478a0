"""The GPU benchmark on a CPU: the whole script at its smallest, and what it does when something goes wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasrv.engine.batch import ChunkInput
from lorasrv_bench import gpu, gpu_engine_rig, gpu_sgmv
from lorasrv_bench.gpu import Options, main
from lorasrv_bench.gpu_budget import Deadline
from lorasrv_bench.gpu_engine_rig import RANK, Rig, build, check_step, decodes
from lorasrv_bench.gpu_records import DONE, NOT_RUN, WRONG, Record, Results
from lorasrv_bench.gpu_section import Section, WrongOutput
from lorasrv_bench.gpu_sizes import QUICK_SIZE
from lorasrv_kernels import reference
from test_house import run_without


def test_a_bare_gpu_box_can_run_it() -> None:
    blocked = ("msgspec", "zmq", "grpc", "google", "typer", "rich", "platformdirs", "peft", "re2")
    assert "lorasrv_bench.gpu_engine" in run_without(blocked, ["lorasrv_bench.gpu"]).split()


def section(folder: Path, name: str, limit_s: float = 60.0) -> Section:
    results = Results(folder, {"commit": "none"})
    ceilings = {"read": 1e10, "copy": 1e10, "to_device": 1e10, "matmul": 1e11}
    for what, rate in ceilings.items():
        results.add(Record(section="ceilings", case={"what": what}, values={"rate": rate}))
    return Section(
        name=name,
        device=torch.device("cpu"),
        size=QUICK_SIZE,
        seed=0,
        deadline=Deadline(limit_s),
        results=results,
        peers=None,
    )


def statuses(given: Section) -> list[str]:
    return [r.status for r in given.results.records() if r.section == given.name and "what" not in r.case and r.case]


def test_the_whole_script_runs_and_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--cpu", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "gpu.md").read_text()
    assert table in capsys.readouterr().out
    assert "the H200 rows are unmeasured" in table
    assert "Predicted, unmeasured" in table
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    for name in ("commit", "device", "torch", "triton", "seed", "median_s", "spread", "floor_s", "ratio", "checked"):
        assert all(name in line for line in lines), name
    done = {name: [x for x in lines if x["section"] == name and x["status"] == DONE] for name in gpu.SECTIONS}
    assert {name: len(found) for name, found in done.items()} == {
        "compile": 0,
        "tests": 0,
        "ceilings": 4,
        "engine": 6,
        "sgmv": 8,
        "attention": 5,
        "deterministic": 3,
    }
    assert all(line["checked"] for found in done.values() for line in found)


def test_a_case_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    late = section(tmp_path, "sgmv", limit_s=0.0)
    gpu.run_section(late)
    assert statuses(late) == [NOT_RUN] * 5 + [NOT_RUN] * 8  # the peers, the cases
    assert {r.why for r in late.results.records() if "group" in r.case} == {"no time left"}


@pytest.mark.parametrize("fault", ["swapped", "left out", "not finite"])
def test_a_wrong_product_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def expand(h, pool, segments, layer, modules, out) -> None:
        if fault == "swapped":
            h = h.flip(2)
        if fault == "left out":
            h = h.clone()
            h[..., -1] = 0
        reference.sgmv_expand(h, pool, segments, layer, modules, out)
        if fault == "not finite":
            out[-1, -1] = float("nan")

    monkeypatch.setattr(gpu_sgmv, "sgmv", lambda device: (reference.sgmv_shrink, expand))
    given = replace(section(tmp_path, "sgmv"), size=replace(QUICK_SIZE, loads=((4, 2),), cache_bytes=1))
    gpu.run_section(given)
    found = [r for r in given.results.records() if r.case.get("tokens") == 4]
    assert {r.status for r in found} == {WRONG}
    assert {r.median_s for r in found} == {None}


class TorchPeer:
    """LoRA on the dense tensors that peers are given."""

    def __init__(self, name: str, scale: float) -> None:
        self.name = name
        self._scale = scale

    def prepare(self, loads):
        return [lambda load=load: self._add(load) for load in loads]

    def _add(self, load) -> None:
        row = 0
        for adapter, num_rows in enumerate(load.rows):
            x, out = load.x[row : row + num_rows].float(), load.out[row : row + num_rows]
            gained = [x @ a[adapter].float().T @ b[adapter].float().T for a, b in zip(load.a, load.b, strict=True)]
            out += (self._scale * torch.cat(gained, 1)).to(out.dtype)
            row += num_rows


def test_a_right_peer_is_scored_and_a_wrong_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = [TorchPeer("right", 1.0), TorchPeer("wrong", 1.1)]
    monkeypatch.setattr(gpu_sgmv, "find_peers", lambda folder, device: (peers, {"absent": "no such package"}))
    given = replace(section(tmp_path, "sgmv"), size=replace(QUICK_SIZE, loads=((4, 2),), cache_bytes=1))
    gpu.run_section(given)
    by_peer = {name: [r for r in given.results.records() if r.case.get("peer") == name] for name in ("right", "wrong")}
    assert [r.status for r in by_peer["right"]] == [DONE] * 4
    assert all(r.values["over_ours"] > 0 for r in by_peer["right"])
    assert [(r.status, r.values) for r in by_peer["wrong"]] == [(WRONG, {})] * 4
    assert [r.why for r in given.results.records() if r.case == {"peer": "absent"}] == ["no such package"]


def compute_instead(rig: Rig, others: dict[ChunkInput, ChunkInput]) -> None:
    """The runner takes other chunks than it is given."""
    forward = rig.runner.forward

    def wrong(chunks, copies=()):
        return forward(tuple(others[chunk] for chunk in chunks), copies)

    rig.runner.forward = wrong


def test_a_step_of_another_adapter_is_refused(tmp_path: Path) -> None:
    rig = build(section(tmp_path, "engine"))
    chunks = decodes(rig, 2, 2)
    assert check_step(rig, chunks, [0, 1]) <= gpu_engine_rig.LIMIT
    first, second = rig.adapters[RANK]
    wrong = {chunks[0]: chunks[0]._replace(adapter=second), chunks[1]: chunks[1]._replace(adapter=first)}
    compute_instead(rig, wrong)
    with pytest.raises(WrongOutput, match="log-probability"):
        check_step(rig, chunks, [0, 1])


def test_a_prompt_without_its_adapter_is_refused(tmp_path: Path) -> None:
    rig = build(section(tmp_path, "engine"))
    chunks = decodes(rig, 1, 1)
    compute_instead(rig, {chunks[0]: chunks[0]._replace(adapter=None)})
    with pytest.raises(WrongOutput):
        check_step(rig, chunks, [0])


def test_a_section_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = Options(minutes=1, folder=tmp_path, seed=3, quick=True, cpu=True, peers=None)
    gpu._run_child(options, "ceilings", 60.0)
    found = list(options.section("", 0).results.records())
    assert [r.status for r in found] == [DONE] * 4


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import time; time.sleep(60)", "ended after its 1 s"),
        ("raise RuntimeError('the device is gone')", "exit code 1: RuntimeError: the device is gone"),
    ],
)
def test_a_section_that_hangs_or_breaks_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, why: str
) -> None:
    monkeypatch.setattr(Options, "child", lambda *_: [sys.executable, "-c", program])
    options = Options(minutes=1, folder=tmp_path, seed=0, quick=True, cpu=True, peers=None)
    gpu._run_child(options, "sgmv", 1.0)
    (found,) = options.section("", 0).results.records()
    assert (found.status, found.why) == (NOT_RUN, why)
