"""The workloads that benchmarks and the simulator know by name, as requests in order of time.

`parse_workload("slora:n=200,alpha=1,rate=10,cv=1,duration=60", seed=0)`. The same text and seed give the same requests,
wherever numpy draws the same; what a value does not concern (the lengths, say, when alpha changes) stays as it was.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from lorasrv.errors import ConfigurationError
from lorasrv_bench.workload_kinds import Arrival, ColdStorm, Kind, Punica, SLora, Tenants, Trace, Zipf
from lorasrv_bench.workload_text import SETTINGS, canonical, parse

__all__ = ["KINDS", "SETTINGS", "Arrival", "Workload", "parse_workload"]

KINDS: Mapping[str, type[Kind]] = MappingProxyType(
    {
        "slora": SLora,
        "punica": Punica,
        "zipf": Zipf,
        "cold_storm": ColdStorm,
        "tenants": Tenants,
        "trace": Trace,
    }
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests in order of time, and the adapters that they may name, 0 to below `num_adapters`.

    `text` says every value; `ranks` are the adapters', in turn; `resident` are those that are warm before the first
    request comes, for workloads that say so.
    """

    text: str
    seed: int
    num_adapters: int
    num_tenants: int
    ranks: tuple[int, ...]
    resident: range
    arrivals: tuple[Arrival, ...]

    @property
    def name(self) -> str:
        return self.text.partition(":")[0]

    def rank(self, adapter: int) -> int:
        return self.ranks[adapter % len(self.ranks)]

    def digest(self) -> str:
        """A hash of every request and rank: equal where two runs were asked the same."""
        told = "\n".join(map(repr, (self.ranks, self.resident, *self.arrivals)))
        return hashlib.sha256(told.encode()).hexdigest()


def parse_workload(text: str, seed: int) -> Workload:
    """The workload that the text names, e.g. `zipf:n=1000,s=1.1,churn=0.05,rate=20,requests=5000`.

    Raises:
        ConfigurationError: an unknown name or key, or a value that is out of range or not of its type.
    """
    if seed < 0:
        raise ConfigurationError(f"seed is {seed}; it must be >= 0")
    name, kind = parse(text, KINDS)
    drawn = kind.build(np.random.default_rng(seed))
    return Workload(
        text=canonical(name, kind),
        seed=seed,
        num_adapters=drawn.num_adapters,
        num_tenants=drawn.num_tenants,
        ranks=drawn.ranks,
        resident=drawn.resident,
        arrivals=tuple(drawn.arrivals),
    )
