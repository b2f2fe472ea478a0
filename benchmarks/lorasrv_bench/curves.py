"""Throughput and latency against the number of adapters, and against how many requests there are at a time.

    python -m lorasrv_bench.curves adapters --out curves-adapters
    python -m lorasrv_bench.curves concurrency --out curves-concurrency

One server of the 125M Llama in bfloat16, with all adapters of the largest point registered, and a closed loop for each
point: adapters drawn uniformly from 1 to 2,000, 16 requests at a time; or 1 to 64 at a time, over 16 adapters. Every
point is a run of `lorasrv bench`, checked like one: a file of JSON lines each, and one report of all.
"""

import argparse
import asyncio
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasrv.client import Client
from lorasrv.demo.local_server import LocalServer
from lorasrv.model.base_shapes import base_shapes
from lorasrv.types import BASE_ID
from lorasrv_bench import records
from lorasrv_bench.asks import make_asks
from lorasrv_bench.backends import Server
from lorasrv_bench.bench_model import CONFIGS, Size, write_model
from lorasrv_bench.clients import Clients
from lorasrv_bench.fresh_adapters import write_adapter
from lorasrv_bench.report import report
from lorasrv_bench.serving import Outcome, Ready, Setup, run
from lorasrv_bench.workloads import Workload, parse_workload


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run: adapters drawn from so many, so many requests at a time, and in all."""

    adapters: int
    concurrency: int
    requests: int

    @property
    def name(self) -> str:
        return f"{self.adapters}-adapters-{self.concurrency}-at-a-time"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curve", choices=("adapters", "concurrency"))
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs and report.html")
    parser.add_argument("--size", choices=tuple(CONFIGS), default="125m")
    parser.add_argument("--points", type=int, nargs="+", help="numbers of adapters, or of requests at a time")
    parser.add_argument("--requests", type=int, default=128, help="of a point; fewer where few go at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, and of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--pool-mib", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    points = points_of(given.curve, given.points, given.requests)
    paths = [given.out / f"{point.name}.jsonl" for point in points]
    all_right = True
    with tempfile.TemporaryDirectory(prefix="lorasrv-curves-") as folder:
        model = write_model(Path(folder) / "model", given.size, given.seed)
        options = ("--dtype", "bfloat16", "--pool-mib", str(given.pool_mib))
        clients = Clients(1)
        try:
            with LocalServer(model, Path(folder) / "data", Path(folder) / "log", options) as server:
                count = max(point.adapters for point in points)
                versions = registered(server.url, model, count, given.rank, given.seed)
                for point, path in zip(points, paths, strict=True):
                    workload = workload_of(point, given.tokens, given.rank, given.seed)
                    outcome = measured(server.url, workload, point, versions, clients)
                    all_right &= outcome.is_right
                    write(path, workload, point, outcome, given.size)
                    print(line(point, outcome), flush=True)
        finally:
            clients.close()
    (given.out / "report.html").write_text(report([records.read(path) for path in paths]), encoding="utf-8")
    print(given.out / "report.html")
    return 0 if all_right else 1


def points_of(curve: str, numbers: Sequence[int] | None, requests: int) -> list[Point]:
    if curve == "adapters":
        return [
            Point(adapters=number, concurrency=16, requests=requests)
            for number in numbers or (1, 4, 16, 64, 256, 1000, 2000)
        ]
    return [
        Point(adapters=16, concurrency=number, requests=min(requests, 16 * number))
        for number in numbers or (1, 2, 4, 8, 16, 32, 64)
    ]


def workload_of(point: Point, tokens: int, rank: int, seed: int) -> Workload:
    size = f"{tokens}..{tokens + 1}"
    text = f"slora:n={point.adapters},requests={point.requests},in_range={size},out_range={size},ranks={rank}"
    return parse_workload(text, seed)


def registered(url: str, model: Path, count: int, rank: int, seed: int) -> dict[str, str]:
    """So many adapters made and pushed; their digests by name, in order."""
    base = base_shapes(model, "bfloat16")
    versions: dict[str, str] = {}
    with Client(url) as client:
        for number in range(count):
            with tempfile.TemporaryDirectory(prefix="lorasrv-curves-") as folder:
                path = write_adapter(Path(folder), base, rank=rank, seeds=(seed, number))
                name = f"adapter-{number:05d}"
                versions[name] = client.push(path, name).digest
    return versions


def measured(url: str, workload: Workload, point: Point, versions: Mapping[str, str], clients: Clients) -> Outcome:
    """With prompts of its own: the server still holds those of points before."""
    server = Server(api="grpc", url=url)
    with Client(url) as client:
        info = client.info()
    salt = secrets.randbits(32)
    asks = make_asks(workload.arrivals, tuple(versions), (workload.seed, salt), info.base_model.vocab_size)
    ready = Ready(
        asks=tuple(asks), versions={**versions, BASE_ID: ""}, base_name=BASE_ID, exact=info.deterministic, info=info
    )
    setup = Setup(server=server, workload=workload, concurrency=point.concurrency)
    return asyncio.run(run(setup, ready, clients))


def write(path: Path, workload: Workload, point: Point, outcome: Outcome, size: Size) -> None:
    told = records.header(
        workload, bench="serve", base=f"{size}, bfloat16", concurrency=point.concurrency, resident="workload", warm_up=8
    )
    looks = [records.look_line(look, outcome.start_s) for look in outcome.looks]
    records.write(path, told, looks, map(records.call_line, outcome.calls), outcome.summary)


def line(point: Point, outcome: Outcome) -> str:
    summary = outcome.summary
    if not outcome.is_right:
        return f"{point.name}: NO SCORE, the output is wrong: {'; '.join(summary['checks']['wrong'][:3])}"
    ttft, tpot = summary["ttft_s"], summary["tpot_s"]
    bound = "".join(f"; CLIENT-BOUND: {each}" for each in summary["client"]["bound"])
    hits = summary["server"]["adapter_hit_share"]
    return (
        f"{point.name}: {summary['output_tokens_per_s']:.0f} tok/s, {summary['requests_per_s']:.2f} req/s, TTFT p50 "
        f"{1e3 * ttft['p50']:.0f} p99 {1e3 * ttft['p99']:.0f} ms, TPOT p50 {1e3 * tpot['p50']:.1f} p99 "
        f"{1e3 * tpot['p99']:.1f} ms, adapters found on the device {hits:.0%}{bound}"
    )


if __name__ == "__main__":
    sys.exit(main())
