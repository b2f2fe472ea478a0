"""The memory economy against the same requests with all adapters resident, in process and through gRPC.

    python -m lorasrv_bench.economy --model adapters/samples/base

- thousands: adapters of mixed ranks, many registered, through a pool that holds a few; closed loop; requests/s over
  those with equally many distinct adapters at a time, all resident, and over five adapters.
- storm: cold adapters all at once beside a steady stream; the p99 of its gaps between tokens over those of the same
  requests when the adapters are resident.
- tenants, through gRPC: one greedy tenant; the p99 TTFT of the modest ones over theirs without it.

Arms alternate; a ratio is of one round, and the median of rounds is what counts. Every answer's length is checked, and
a sample of each arm is scored alone, under its own weights and under others; an arm with wrong output has no figures.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasrv.client import Client
from lorasrv.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.demo.local_server import LocalServer
from lorasrv.engine.build import build_core
from lorasrv.keys import Role, append_line, format_line, hash_key, new_key
from lorasrv.model.base_shapes import base_shapes
from lorasrv.model.families import read_architecture
from lorasrv_bench.backends import Server
from lorasrv_bench.clients import Clients
from lorasrv_bench.economy_bench import Bench, Registered, Setup, ThroughGrpc, Within
from lorasrv_bench.figures import commit, cpu_name
from lorasrv_bench.fresh_adapters import write_adapter
from lorasrv_bench.in_process import InProcess

# What is promised of each ratio.
TARGETS = {
    "thousands": ("to_resident", "requests/s over all resident", ">=", 0.95),
    "storm": ("to_resident", "p99 gap of hot streams over all resident", "<=", 1.1),
    "tenants": ("to_without", "p99 TTFT of modest tenants over theirs alone", "<=", 1.3),
}
Show = Callable[[Bench], Awaitable[dict[str, Any]]]
SHOWS: dict[str, Show] = {"thousands": Bench.thousands, "storm": Bench.storm, "tenants": Bench.tenants}
WAYS = ("grpc", "process")


def main(argv: Sequence[str] | None = None) -> int:
    setup, shows, ways, out = _parsed(argv)
    print(f"commit {commit()}; {platform.machine()}, {cpu_name()}, {os.cpu_count()} cores")
    print(setup, flush=True)
    all_right = True
    with tempfile.TemporaryDirectory(prefix="lorasrv-economy-") as folder:
        for show, way, told in measured(setup, shows, ways, Path(folder)):
            all_right &= not told["wrong"]
            print(line(show, way, told), flush=True)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps({"show": show, "way": way, "commit": commit(), **told}) + "\n")
    return 0 if all_right else 1


def line(show: str, way: str, told: dict[str, Any]) -> str:
    """The figures of a show on one line, its target behind them."""
    if told["wrong"]:
        return f"{show}, {way}: NO SCORE, the output is wrong: {'; '.join(told['wrong'][:3])}"
    key, what, relation, bound = TARGETS[show]
    met = told[key] >= bound if relation == ">=" else told[key] <= bound
    rounds = "; ".join(", ".join(f"{name} {value:.4g}" for name, value in found.items()) for found in told["rounds"])
    others = "".join(f", {name} {told[name]:.3f}" for name in ("to_few",) if name in told)
    bound_by = f" CLIENT-BOUND: {'; '.join(told['client_bound'])}" if told["client_bound"] else ""
    verdict = "met" if met else "NOT met"
    return f"{show}, {way}: {what} {told[key]:.3f} ({relation} {bound}: {verdict}){others} [{rounds}]{bound_by}"


def measured(
    setup: Setup, shows: Sequence[str], ways: Sequence[str], folder: Path
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each show by each way: registers adapters once, then an engine for each."""
    single = [show for show in shows if show != "tenants"]
    if single:
        registered = _register(setup, folder / "data", setup.adapters, [None], ())
        for show in single:
            for way in ways:
                yield show, way, _run(setup, registered, show, way, [None], ())
    if "tenants" in shows:
        keys, options = _keys(folder / "keys", setup.tenants)
        registered = _register(setup, folder / "tenants", setup.tenants, keys, options)
        yield "tenants", "grpc", _run(setup, registered, "tenants", "grpc", keys, options)


def pool_bytes(setup: Setup, show: str) -> int:
    """A pool that holds what the show says: `resident` adapters, or the storm's, beside what runs."""
    architecture = read_architecture(setup.model)
    item = 4 if setup.dtype == "float32" else 2
    page = architecture.num_layers * 2 * 16 * architecture.num_kv_heads * architecture.head_dim * item
    width = architecture.num_layers * sum(a + b for _, a, b in architecture.module_shapes())
    pages_by_rank = [-(-int(width * rank * item * 1.01) // page) + 1 for rank in setup.ranks]
    count = setup.resident if show == "thousands" else setup.hot + setup.storm
    adapters = sum(pages_by_rank[number % len(pages_by_rank)] for number in range(count))
    running = setup.concurrency if show == "thousands" else SchedulerConfig().max_running
    kv = running * (-(-(setup.prompt_tokens + setup.output_tokens) // 16) + 1)
    return (adapters + kv) * page


def _run(
    setup: Setup, registered: Registered, show: str, way: str, keys: Sequence[str | None], options: Sequence[str]
) -> dict[str, Any]:
    pool = pool_bytes(setup, show)
    if way == "process":
        config = EngineConfig(
            model=ModelConfig(path=str(setup.model), dtype=setup.dtype, dummy_weights=setup.dummy_weights),
            pool=PoolConfig(pool_bytes=pool),
            scheduler=SchedulerConfig(max_running=_max_running(setup, show)),
            blob_root=str(registered.data_dir / "blobs"),
        )
        core, _ = build_core(config)
        try:
            return asyncio.run(_shown(show, setup, registered, Within(InProcess(core, registered.versions))))
        finally:
            core.close()
    sized = ("--pool-mib", str(pool / 2**20), "--max-running", str(_max_running(setup, show)), *options)
    clients = Clients(1)
    try:
        with _served(setup, registered.data_dir, sized) as url:
            server = Server(api="grpc", url=url, api_keys=tuple(keys))
            return asyncio.run(_through(show, setup, registered, server, clients))
    finally:
        clients.close()


async def _through(show: str, setup: Setup, registered: Registered, server: Server, clients: Clients) -> dict[str, Any]:
    way = ThroughGrpc(server, clients)
    try:
        return await SHOWS[show](Bench(setup, registered, way))
    finally:
        await way.close()


async def _shown(show: str, setup: Setup, registered: Registered, way: Within) -> dict[str, Any]:
    return await SHOWS[show](Bench(setup, registered, way))


def _max_running(setup: Setup, show: str) -> int:
    return setup.concurrency if show == "thousands" else SchedulerConfig().max_running


@contextmanager
def _served(setup: Setup, data_dir: Path, options: Sequence[str]) -> Iterator[str]:
    dummy = ("--dummy-weights",) if setup.dummy_weights else ()
    arguments = ("--dtype", setup.dtype, *dummy, *options)
    with LocalServer(setup.model, data_dir, data_dir.with_suffix(".log"), arguments) as server:
        yield server.url


def _register(
    setup: Setup, data_dir: Path, count: int, keys: Sequence[str | None], options: Sequence[str]
) -> Registered:
    """Make and push so many adapters, each for the tenant of its number."""
    base = base_shapes(setup.model, "float32")
    versions: dict[str, str] = {}
    with _served(setup, data_dir, options) as url:
        clients = [Client(url, api_key=key) for key in keys]
        for number in range(count):
            name = f"adapter-{number:05d}"
            with tempfile.TemporaryDirectory(prefix="lorasrv-economy-") as folder:
                rank = setup.ranks[number % len(setup.ranks)]
                path = write_adapter(Path(folder), base, rank=rank, seeds=(setup.seed, number))
                versions[name] = clients[number % len(clients)].push(path, name).digest
        for client in clients:
            client.close()
    return Registered(data_dir=data_dir, names=tuple(versions), versions=versions)


def _keys(file: Path, tenants: int) -> tuple[list[str | None], tuple[str, ...]]:
    """A key for each tenant, and what tells a server of them."""
    keys = [new_key() for _ in range(tenants)]
    for number, key in enumerate(keys):
        append_line(file, format_line(f"key{number}", f"tenant{number}", list(Role), hash_key(key), None))
    return [*keys], ("--api-keys", str(file))


def _parsed(argv: Sequence[str] | None) -> tuple[Setup, list[str], list[str], Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the base's folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dummy-weights", action="store_true")
    parser.add_argument("--ranks", default="8/16/32/64", help="of the adapters, in turn")
    parser.add_argument("--shows", nargs="+", choices=tuple(SHOWS), default=list(SHOWS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="tenants are through grpc only")
    parser.add_argument("--out", type=Path, help="append a JSON line for each show")
    sizes: dict[str, int] = {
        "adapters": 2000,
        "resident": 20,
        "concurrency": 16,
        "requests": 320,
        "prompt-tokens": 64,
        "output-tokens": 64,
        "storm": 100,
        "hot": 4,
        "tenants": 8,
        "rounds": 3,
        "seed": 0,
    }
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    rates: dict[str, float] = {"hot-rate": 2, "storm-s": 20, "greedy": 10, "tenant-rate": 0.5, "tenant-s": 30}
    for name, rate in rates.items():
        parser.add_argument(f"--{name}", type=float, default=rate)
    given = vars(parser.parse_args(argv))
    shows, ways, out = given.pop("shows"), given.pop("ways"), given.pop("out")
    ranks = tuple(map(int, given.pop("ranks").split("/")))
    setup = Setup(ranks=ranks, **given)
    if setup.adapters % len(ranks) or setup.resident % len(ranks) or setup.resident > setup.adapters:
        parser.error(f"--adapters and --resident must be multiples of the {len(ranks)} ranks, and resident the smaller")
    if setup.hot + setup.rounds * setup.storm > setup.adapters and "storm" in shows:
        parser.error("--adapters must be at least hot + rounds × storm: each round's storm is of adapters of its own")
    return setup, shows, ways, out


if __name__ == "__main__":
    sys.exit(main())
