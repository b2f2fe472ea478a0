"""How long a server takes to READY, and how much host memory its processes take at most, from /proc."""

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from lorasrv.client import Client
from lorasrv.config import DType
from lorasrv.demo.local_server import LocalServer
from lorasrv.types import BASE_ID

LOOK_S = 0.02
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Started:
    """Of each start: seconds from the command to READY, and the most bytes that all processes held at a look. `read_s`
    is what reading the weights' files takes, `weights_bytes` what they are in the type in which they are held."""

    ready_s: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    read_s: float
    weights_bytes: int
    pool_bytes: int


def measure(model: Path, dtype: DType, pool_mib: int, folder: Path, starts: int) -> Started:
    """Each start answers a few requests; `folder` is for the registry and the logs."""
    begun_s = time.perf_counter()
    for path in _weight_files(model):
        path.read_bytes()
    read_s = time.perf_counter() - begun_s
    ready_s: list[float] = []
    peaks: list[int] = []
    for number in range(starts):
        with peak_memory() as looks:
            begun_s = time.perf_counter()
            options = ("--dtype", dtype, "--pool-mib", str(pool_mib))
            with LocalServer(model, folder / f"start-{number}", folder / f"start-{number}.log", options) as server:
                ready_s.append(time.perf_counter() - begun_s)
                with Client(server.url) as client:
                    for prompt in range(8):
                        client.generate([prompt] * 64, adapter=BASE_ID, temperature=0.0, max_tokens=16, ignore_eos=True)
        peaks.append(max(looks))
    return Started(
        ready_s=tuple(ready_s),
        peak_bytes=tuple(peaks),
        read_s=read_s,
        weights_bytes=_num_weights(model) * ITEM_BYTES[dtype],
        pool_bytes=pool_mib << 20,
    )


@contextmanager
def peak_memory() -> Iterator[Sequence[int]]:
    """Looks at what all processes below this one hold together, every LOOK_S; what is shared counts once."""
    looks = [0]
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_S):
            looks.append(sum(map(_held_bytes, _below(os.getpid()))))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield looks
    finally:
        done.set()
        looking.join()


def _below(pid: int) -> Iterator[int]:
    """The children of a process, and theirs; those that end meanwhile are left out."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield child
        yield from _below(child)


def _held_bytes(pid: int) -> int:
    """A process's share of the pages that it maps: a page that n processes hold counts an n-th for each."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _weight_files(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def _num_weights(model: Path) -> int:
    total = 0
    for path in _weight_files(model):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total
