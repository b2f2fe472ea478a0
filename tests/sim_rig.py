"""A tiny model, slow hardware of round numbers, and workloads for tests of the simulator."""

from dataclasses import dataclass
from random import Random
from typing import Any

from lorasrv.config import SchedulerConfig, TierConfig
from lorasrv.model.shape import ModelShape
from lorasrv.sim.engine import EngineSetup
from lorasrv.sim.hardware import Hardware

TINY = ModelShape(
    name="tiny",
    hidden=64,
    intermediate=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of a workload."""

    at_s: float = 0.0
    adapter: int | None = None
    tenant: int = 0
    prompt_tokens: int = 4
    output_tokens: int = 3
    prefix: int | None = None
    prefix_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A workload."""

    arrivals: tuple[Asked, ...]
    ranks: tuple[int, ...] = (4,)
    resident: range = range(0)


def hardware(**changes: Any) -> Hardware:
    values: dict[str, Any] = {
        "name": "test",
        "memory_bytes": 5 * 2**30,
        "read_bytes_per_s": 1e8,
        "adapter_bytes_per_s": 1e7,
        "kv_bytes_per_s": 1e7,
        "flops_per_s": 1e9,
        "copy_bytes_per_s": 1e6,
        "disk_bytes_per_s": 1e5,
        "read_s": 0.01,
        "kernel_s": 1e-5,
        "step_s": 1e-3,
        "row_s": 1e-4,
        "adapter_s": 1e-4,
    }
    return Hardware(**(values | changes))


def setup(machine: Hardware | None = None, *, pool_bytes: int = 1 << 22, **scheduler: Any) -> EngineSetup:
    return EngineSetup(
        shape=TINY,
        hardware=machine or hardware(),
        itemsize=4,
        pool_bytes=pool_bytes,
        scheduler=SchedulerConfig(**({"max_step_tokens": 16, "max_running": 4} | scheduler)),
        tiers=TierConfig(host_cache_bytes=1 << 20),
    )


def random_asking(seed: int, count: int, *, rate: float, num_adapters: int = 0, longest: int = 30) -> Asking:
    random = Random(seed)
    at_s, arrivals = 0.0, []
    for _ in range(count):
        at_s += random.expovariate(rate)
        arrivals.append(
            Asked(
                at_s=at_s,
                adapter=random.randrange(num_adapters) if num_adapters else None,
                prompt_tokens=random.randint(1, longest),
                output_tokens=random.randint(1, longest),
            )
        )
    return Asking(arrivals=tuple(arrivals))
