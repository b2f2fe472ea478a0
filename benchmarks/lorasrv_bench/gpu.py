"""All that is to be known about a GPU, from a bare checkout, within a time: correctness, ceilings, kernels, the engine.

    PYTHONPATH=.:kernels:adapters:benchmarks python3 -m lorasrv_bench.gpu --minutes 8

Every section runs in a process of its own, with its share of the time, and writes a JSON line for each case as soon as
it is known: a kernel that hangs or breaks the device costs its section and no other. What did not fit is listed as not
run. Outputs are checked before they are timed. Without a GPU the same runs at small sizes through the torch path, in
one process. It needs torch, triton, numpy, safetensors and transformers; see docs/gpu-benchmarks.md.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasrv_bench import gpu_attention, gpu_ceilings, gpu_engine, gpu_sgmv, gpu_tests
from lorasrv_bench.gpu_budget import Budget, Deadline
from lorasrv_bench.gpu_records import NOT_RUN, WRONG, Record, Results, about
from lorasrv_bench.gpu_report import report
from lorasrv_bench.gpu_section import Section
from lorasrv_bench.gpu_sizes import CPU_SIZE, QUICK_SIZE, gpu_size

# In this order; the share is of the time, beside the others'.
SECTIONS: dict[str, tuple[float, Callable[[Section], None]]] = {
    "compile": (30, gpu_tests.run_compile),
    "tests": (80, gpu_tests.run),
    "ceilings": (20, gpu_ceilings.run),
    "engine": (150, gpu_engine.run_decode),
    "sgmv": (130, gpu_sgmv.run),
    "attention": (45, gpu_attention.run),
    "deterministic": (60, gpu_engine.run_deterministic),
}
# A section's process is ended this long after its time: its last case, and what it takes to start and to end.
_GRACE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Options:
    minutes: float
    folder: Path
    seed: int
    quick: bool
    cpu: bool
    peers: Path | None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu or not torch.cuda.is_available() else "cuda")

    def section(self, name: str, limit_s: float) -> Section:
        device = self.device
        size = QUICK_SIZE if self.quick else gpu_size(device) if device.type == "cuda" else CPU_SIZE
        return Section(
            name=name,
            device=device,
            size=size,
            seed=self.seed,
            deadline=Deadline(limit_s),
            results=Results(self.folder, about(device, self.seed, size.name)),
            peers=self.peers,
        )

    def child(self, name: str, limit_s: float) -> list[str]:
        """The command line of a section's process."""
        command = [sys.executable, "-m", "lorasrv_bench.gpu", "--section", name, "--limit-s", str(limit_s)]
        command += ["--out", str(self.folder), "--seed", str(self.seed)]
        command += ["--quick"] * self.quick + ["--cpu"] * self.cpu
        return command + (["--peers", str(self.peers)] if self.peers else [])


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where an output of ours was wrong."""
    given = _parser().parse_args(argv)
    if given.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return _run(given, Path(folder))
    given.out.mkdir(parents=True, exist_ok=True)
    return _run(given, given.out)


def _run(given: argparse.Namespace, folder: Path) -> int:
    options = Options(
        minutes=given.minutes, folder=folder, seed=given.seed, quick=given.quick, cpu=given.cpu, peers=given.peers
    )
    if given.section is not None:
        run_section(options.section(given.section, given.limit_s))
        return 0
    on_gpu = options.device.type == "cuda"
    results = options.section("", 0).results
    results.path.unlink(missing_ok=True)
    budget = Budget({name: share for name, (share, _) in SECTIONS.items()}, 60 * options.minutes)
    for name in SECTIONS:
        limit_s = budget.take(name)
        if on_gpu:
            _run_child(options, name, limit_s)
        else:
            run_section(options.section(name, limit_s))
    records = list(results.records())
    text = report(records, about(options.device, options.seed, options.section("", 0).size.name), on_gpu=on_gpu)
    (folder / "gpu.md").write_text(text + "\n")
    print("\n" + text, flush=True)
    return int(any(record.status == WRONG and record.case.get("peer", "ours") == "ours" for record in records))


def run_section(section: Section) -> None:
    torch.manual_seed(section.seed)
    SECTIONS[section.name][1](section)


def _run_child(options: Options, name: str, limit_s: float) -> None:
    """A section in its process. However that ends, its lines so far stay and the run goes on."""
    grace_s = min(_GRACE_S, limit_s / 4)
    results = options.section(name, 0).results

    def failed(why: str) -> None:
        results.add(Record(section=name, case={"what": "the section"}, status=NOT_RUN, why=why))

    log = options.folder / f"{name}.txt"
    try:
        with log.open("w") as errors:
            done = subprocess.run(options.child(name, limit_s - grace_s), stderr=errors, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        failed(f"ended after its {limit_s:.0f} s")
        return
    if done.returncode:
        failed(f"exit code {done.returncode}: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it said nothing"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, help="folder for gpu.jsonl, gpu.md and the logs; none keeps nothing")
    parser.add_argument("--peers", type=Path, help="folder of other projects' checkouts, see docs/gpu-benchmarks.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that everything runs")
    parser.add_argument("--cpu", action="store_true", help="as if there were no GPU")
    parser.add_argument("--section", choices=SECTIONS, help="run this one alone, here, and print no table")
    parser.add_argument("--limit-s", type=float, default=120.0, help="for --section")
    return parser


if __name__ == "__main__":
    sys.exit(main())
