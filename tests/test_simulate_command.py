"""`lorasrv simulate`: what it prints, keeps in files and refuses."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from fake_engine import BASE_MODEL
from lorasrv.cli.pool_chart import pool_chart
from lorasrv.sim.hardware import write_hardware
from lorasrv.types import PoolStats
from sim_rig import hardware
from test_cli import assert_fails, run

WORKLOAD = "slora:n=20,rate=40,requests=60"
SMALL = ("simulate", "--workload", WORKLOAD, "--pool-gib", 8)


def test_it_prints_times_hits_bytes_and_the_pool() -> None:
    done = run(*SMALL, "--gpus", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "8B bfloat16 on 2 × h200, routing affinity" in lines[0] and "n=20" in lines[0]
    rows = {line[:12].strip(): line for line in lines}
    assert {"TTFT", "TTFT warm", "TTFT cold", "ITL", "E2E", "goodput", "adapter hits", "moved", "steps"} <= rows.keys()
    assert "60: 60 done; " in rows["requests"] and "GB from disk" in rows["moved"]
    assert any(line.startswith(" 100 % ") for line in lines) and lines[-1].strip().startswith("█ adapters")


def test_json_has_all_of_it(tmp_path: Path) -> None:
    box = tmp_path / "box.json"
    fast = hardware(
        memory_bytes=40e9, read_bytes_per_s=1e12, flops_per_s=1e14, copy_bytes_per_s=1e10, disk_bytes_per_s=1e10
    )
    write_hardware(fast, box)
    done = run(*SMALL, "--hardware", box, "--routing", "balanced", "--slo", "ttft=200ms", "--seed", 3, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["hardware"] == asdict(hardware()) | found["hardware"] and found["hardware"]["memory_bytes"] == 40e9
    assert (found["seed"], found["routing"], found["slo"], found["num_engines"]) == (3, "balanced", "ttft=200ms", 1)
    assert found["num_pages"] == 4096 and found["requests"] == found["done"] == 60
    assert found["ttft_warm"]["count"] + found["ttft_cold"]["count"] == found["ttft"]["count"] == 60
    assert sum(found["hits"].values()) == pytest.approx(1)
    assert found["traffic"]["disk_bytes"] > 0 and found["pool"][0]["pool"]["num_pages"] == 4096
    assert json.loads(run(*SMALL, "--hardware", box, "--seed", 4, "--json").stdout)["ttft"] != found["ttft"]


def test_it_finds_how_many_gpus_it_takes() -> None:
    busy = ("simulate", "--workload", "slora:n=4,rate=400,requests=600,out_range=8..64", "--slo", "ttft=400ms")
    done = run(*busy, "--gpus", "auto", "--json")
    assert done.exit_code == 0, done.output
    count = json.loads(done.stdout)["num_engines"]
    assert count > 1 and "1 GPUs: too few" in done.stderr and f"{count} GPUs: enough" in done.stderr
    assert_too_few = run(*busy, "--gpus", "auto", "--max-gpus", 1)
    assert assert_too_few.exit_code == 5
    assert assert_too_few.stderr.splitlines()[-1] == "lorasrv: 1 GPUs do not keep ttft=400ms; --max-gpus tries more"


def test_a_folders_model_and_its_dtype() -> None:
    done = run(*SMALL[:3], "--model", BASE_MODEL, "--dtype", "float32", "--pool-gib", 0.01, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["model"], found["dtype"], found["done"]) == ("base", "float32", 60)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--gpus", "many"), 2, "--gpus is 'many'; it must be auto or a number from 1 to 4096"),
        (("--gpus", "0"), 2, "--gpus is '0'"),
        (("--hardware", "abacus"), 2, "hardware 'abacus' is no file and none of h200"),
        (("--model", "9B"), 2, "model '9B' is no folder and none of 7B, 8B"),
        (("--routing", "random"), 2, "routing 'random' is none of affinity, balanced"),
        (("--slo", "ttft=soon"), 2, "slo 'ttft=soon' must be"),
        (("--max-running", "0"), 2, "max_running is 0"),
        (("--pool-gib", "500"), 2, "8B takes 15.0 GiB, h200 has 139.0 GiB"),
        (("--model", "70B", "--hardware", "h100"), 2, "70B takes 131.4 GiB, h100 has 78.0 GiB"),
        (("--workload", "slora:m=4"), 2, "slora"),
        (("--plot", "pool.png"), 2, "--plot needs matplotlib; pip install 'lorasrv[plot]' has it"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    arguments: tuple[str, ...], code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_fails(run(*SMALL, *arguments), code, text)


def test_a_picture_of_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by matplotlib itself: what the upper axes stack up to is the pool, at all times."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", savefig)
    done = run(*SMALL, "--plot", tmp_path / "pool.png", "--json")
    assert done.exit_code == 0, done.output
    samples = json.loads(done.stdout)["pool"]
    assert imread(tmp_path / "pool.png").std() > 0.1, "the picture is blank"
    pool, queue = figures[0].axes
    tops = [np.asarray(band.get_paths()[0].vertices)[:, 1].max() for band in pool.collections]
    assert len(tops) == 4 and tops[-1] == 4096
    assert tops[0] == max(sample["pool"]["adapters"] for sample in samples)
    running, waiting = queue.lines
    assert list(running.get_xdata()) == [sample["at_s"] for sample in samples]
    assert list(waiting.get_ydata()) == [sample["waiting"] for sample in samples]


def test_the_chart_shows_shares_bottom_up() -> None:
    half = PoolStats(num_pages=100, free=50, sequences=0, prefix=25, adapters=25)
    full = PoolStats(num_pages=100, free=0, sequences=0, prefix=0, adapters=100)
    lines = pool_chart([half, full], 8.0, width=10, height=4).plain.splitlines()
    assert [line[7:] for line in lines[:4]] == [" █", " █", "▓█", "██"]
    assert lines[4].split() == ["0", "s8", "s"] or "8 s" in lines[4]
    wide = pool_chart([half] * 1000, 8.0, width=20, height=4).plain.splitlines()
    assert {len(line) for line in wide[:4]} == {27}
