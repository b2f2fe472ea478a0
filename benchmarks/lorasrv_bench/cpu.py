"""The targets on a CPU, each measured, met or not.

    python -m lorasrv_bench.cpu

The 125M Llama of random weights in bfloat16 unless a row says otherwise. Every part checks what it measures; one whose
output is wrong has no score. Peers that this does not start (llama.cpp, vLLM) are measured where `--folder` and their
URLs are given (docs/benchmarks.md says how). Else what they did on such a machine earlier stands in, and the table says
so.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from lorasrv_bench import (
    cpu_rows,
    decisions,
    economy,
    economy_bench,
    lora_cost,
    peers,
    start_up,
    step_counts,
    streaming,
)
from lorasrv_bench.cpu_rows import Row
from lorasrv_bench.figures import commit, cpu_name

SAMPLE = Path(__file__).parents[2] / "adapters" / "samples" / "base"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How large everything is."""

    peers: peers.Setup
    cost: lora_cost.Setup
    economy: economy_bench.Setup
    load: decisions.Load
    steps: int
    streaming: streaming.Setup
    starts: int


ECONOMY: dict[str, Any] = {
    "model": SAMPLE,
    "dtype": "float32",
    "dummy_weights": False,
    "ranks": (8, 16, 32, 64),
    "tenants": 8,
    "greedy": 10,
    "tenant_rate": 0.5,
    "tenant_s": 30,
    "seed": 0,
}
STREAMING: dict[str, Any] = {"model": str(SAMPLE), "clients": 1, "seed": 0, "paced": True}
FULL = Effort(
    peers=peers.Setup(),
    cost=lora_cost.Setup(),
    economy=economy_bench.Setup(
        **ECONOMY,
        adapters=2000,
        resident=20,
        concurrency=16,
        requests=320,
        prompt_tokens=64,
        output_tokens=64,
        storm=100,
        hot=4,
        hot_rate=2,
        storm_s=16,
        rounds=2,
    ),
    load=decisions.Load(),
    steps=2000,
    streaming=streaming.Setup(**STREAMING, streams=256, tokens=500, repeats=3),
    starts=3,
)
QUICK = Effort(
    peers=peers.Setup(size="tiny", concurrency=4, requests=8, prompt_tokens=8, output_tokens=8, rounds=1),
    cost=lora_cost.Setup(size="tiny", rows=4, numbers=(1, 4), prompt_tokens=8, output_tokens=8, rounds=1),
    economy=economy_bench.Setup(
        **ECONOMY,
        adapters=20,
        resident=8,
        concurrency=4,
        requests=12,
        prompt_tokens=8,
        output_tokens=8,
        storm=6,
        hot=2,
        hot_rate=4,
        storm_s=2,
        rounds=1,
    ),
    load=decisions.Load(num_running=16, num_waiting=32, num_adapters=20),
    steps=50,
    streaming=streaming.Setup(**STREAMING, streams=8, tokens=20, repeats=1),
    starts=1,
)


def main(argv: Sequence[str] | None = None) -> int:
    effort, kept, out = _parsed(argv)
    disable_progress_bar()
    machine = f"{platform.machine()}, {cpu_name()}, {os.cpu_count()} cores; torch {torch.__version__}"
    print(f"commit {commit()}; {machine}")
    print(effort, flush=True)
    begun_s = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lorasrv-cpu-") as folder:
        for part in (_peers, _cost, _dispatches, _economy, _decisions, _streaming, _start):
            part_s = time.monotonic()
            rows += part(effort, Path(folder), kept)
            print(f"{part.__name__.strip('_')}: {time.monotonic() - part_s:.0f} s\n", flush=True)
    print(f"\n{cpu_rows.table(rows)}\n\n{time.monotonic() - begun_s:.0f} s in all")
    if out is not None:
        told = {"commit": commit(), "machine": machine, "rows": [asdict(row) for row in rows]}
        out.write_text(json.dumps(told, indent=2) + "\n")
        print(out)
    return 1 if any(row.wrong for row in rows) else 0


def _peers(effort: Effort, folder: Path, kept: Path | None) -> list[Row]:
    setup = effort.peers
    material = peers.written(folder / "peers", setup) if kept is None else peers.material_in(kept)
    found = peers.measured(setup, material, folder)
    print(peers.report(found))
    return cpu_rows.of_peers(found)


def _cost(effort: Effort, folder: Path, kept: Path | None) -> list[Row]:
    return cpu_rows.of_cost(lora_cost.measure(effort.cost), effort.cost.numbers)


def _dispatches(effort: Effort, folder: Path, kept: Path | None) -> list[Row]:
    return cpu_rows.of_counts(step_counts.step_costs((1, 4, 16)))


def _economy(effort: Effort, folder: Path, kept: Path | None) -> list[Row]:
    rows: list[Row] = []
    for show, way, told in economy.measured(effort.economy, ("thousands", "storm"), ("grpc",), _own(folder, "economy")):
        print(economy.line(show, way, told), flush=True)
        rows.append(cpu_rows.of_economy(show, told))
    return rows


def _decisions(effort: Effort, folder: Path, kept: Path | None) -> list[Row]:
    return [cpu_rows.of_decisions(effort.load, decisions.measure(effort.load, effort.steps, 0))]


def _streaming(effort: Effort, folder: Path, kept: Path | None) -> list[Row]:
    repeats = streaming.measure(effort.streaming)
    print(streaming.report(effort.streaming, repeats))
    rates = [(each["grpc"].tokens_per_s, each["loop"].tokens_per_s) for each in repeats]
    return [cpu_rows.of_streaming(effort.streaming.streams, rates)]


def _start(effort: Effort, folder: Path, kept: Path | None) -> list[Row]:
    started = start_up.measure(SAMPLE, "float32", cpu_rows.POOL_MIB, _own(folder, "starts"), effort.starts)
    return cpu_rows.of_start(started)


def _own(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _parsed(argv: Sequence[str] | None) -> tuple[Effort, Path | None, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether all of it runs, no figures")
    peers.add_urls(parser)
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    given = parser.parse_args(argv)
    effort = QUICK if given.quick else FULL
    return replace(effort, peers=peers.with_urls(parser, effort.peers, given)), given.folder, given.out


if __name__ == "__main__":
    sys.exit(main())
