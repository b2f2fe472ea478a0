"""What a decode step does, counted rather than timed: calls of Python functions, torch operations, bytes copied.

    python -m lorasrv_bench.step_counts

Counts do not depend on the machine's mood, so a test can hold them to budgets. What a layer costs is the difference
between models of more and fewer layers; what is left is the step's own.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasrv.config import SchedulerConfig
from lorasrv.engine.core import EngineCore
from lorasrv.types import AdapterUse, EngineRequest
from lorasrv_bench.bench_model import write_config
from lorasrv_bench.real_engine import RealEngine, prepare, real_engine

FEW_LAYERS, MORE_LAYERS = 2, 4
POOL_BYTES = 64 << 20
RANKS = (8, 16)
# Operations whose outputs hold what some tensor held already.
COPYING = frozenset(
    {
        *("copy_", "_to_copy", "clone", "cat", "stack", "repeat", "repeat_interleave", "constant_pad_nd"),
        *("embedding", "index", "index_select", "gather", "index_copy_", "index_put_"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one decode step, or of a part of it: calls of Python functions, of built-in ones, torch operations, and bytes
    that operations copied from one tensor to another."""

    python_calls: float
    builtin_calls: float
    torch_ops: float
    copied_bytes: float

    def __sub__(self, other: "Counts") -> "Counts":
        return _each(lambda a, b: a - b, self, other)

    def __mul__(self, factor: float) -> "Counts":
        return _each(lambda a, _: a * factor, self, self)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """`layer` is what each layer adds; `rest` what a step costs besides."""

    layer: Counts
    rest: Counts


def step_costs(numbers: Sequence[int], *, rows: int = 16, context: int = 32) -> dict[int, StepCost]:
    """What a decode step of so many rows at that context costs, by how many different adapters (0 is the base)."""
    few, more = (counted(layers, numbers, rows=rows, context=context) for layers in (FEW_LAYERS, MORE_LAYERS))
    costs: dict[int, StepCost] = {}
    for number in numbers:
        layer = (more[number] - few[number]) * (1 / (MORE_LAYERS - FEW_LAYERS))
        costs[number] = StepCost(layer=layer, rest=few[number] - layer * FEW_LAYERS)
    return costs


def counted(layers: int, numbers: Sequence[int], *, rows: int, context: int) -> dict[int, Counts]:
    """The counts of a decode step of a tiny model of so many layers, by how many different adapters."""
    with tempfile.TemporaryDirectory(prefix="lorasrv-counts-") as folder:
        model = Path(folder) / "model"
        write_config(model, "tiny", num_hidden_layers=layers)
        prepared = prepare(Path(folder), num_adapters=max(1, *numbers), ranks=RANKS, model=model)
        config = SchedulerConfig(max_running=rows, max_step_tokens=rows * context, prefix_cache=False)
        with real_engine(prepared, pool_bytes=POOL_BYTES, scheduler=config) as engine:
            for number in range(max(numbers)):
                engine.core.add(_request(engine, number, max(numbers), 2))
            _drain(engine.core)
            return {number: _of_decode(engine, number, rows, context) for number in numbers}


def _of_decode(engine: RealEngine, num_adapters: int, rows: int, context: int) -> Counts:
    """The second step in which every row decodes, calls in one round and operations in another; adapters are there."""
    found: dict[str, float] = {}
    for meter in (calls_counted, ops_counted):
        core = engine.core
        for row in range(rows):
            core.add(_request(engine, row, num_adapters, context))
        for _ in ("prompts", "a decode that warms up"):
            assert len(core.step()) == rows, "the rows do not go together"
        with meter() as told:
            core.step()
        found |= told
        _drain(core)
    return Counts(**found)


def _request(engine: RealEngine, row: int, num_adapters: int, context: int) -> EngineRequest:
    digest = engine.digests[row % num_adapters] if num_adapters else None
    return EngineRequest(
        request_id=f"row-{row}",
        token_ids=tuple(3 + (row * context + place) % 200 for place in range(context)),
        adapter=None if digest is None else AdapterUse(digest=digest),
        max_tokens=8,
        seed=0,
        temperature=0.0,
        ignore_eos=True,
    )


def _drain(core: EngineCore) -> None:
    while core.has_work():
        core.step()


@contextmanager
def calls_counted() -> Iterator[dict[str, float]]:
    """Counts what is called in the block by this thread: functions written in Python, and built-in ones."""
    told = {"python_calls": 0.0, "builtin_calls": 0.0}

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            told["python_calls"] += 1
        elif event == "c_call":
            told["builtin_calls"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield told
    finally:
        sys.setprofile(before)
        # What ends the counting: __exit__ and this generator; next and setprofile.
        told["python_calls"] -= 2
        told["builtin_calls"] -= 2


@contextmanager
def ops_counted() -> Iterator[dict[str, float]]:
    """Counts the torch operations of the block, and the bytes that those of them wrote which only copy."""
    told = {"torch_ops": 0.0, "copied_bytes": 0.0}
    with _Dispatched(told):
        yield told


class _Dispatched(TorchDispatchMode):
    def __init__(self, told: dict[str, float]) -> None:
        super().__init__()
        self._told = told

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._told["torch_ops"] += 1
        name = func.overloadpacket.__name__
        if name in COPYING:
            # What was put into a larger tensor is the source, not the whole.
            written = args[-1] if name in ("index_copy_", "index_put_") else result
            self._told["copied_bytes"] += sum(
                each.numel() * each.element_size() for each in tree_leaves(written) if isinstance(each, torch.Tensor)
            )
        return result


def _each(operation: Callable[[float, float], float], a: Counts, b: Counts) -> Counts:
    values = map(operation, astuple(a), astuple(b))
    return Counts(**dict(zip(Counts.__dataclass_fields__, values, strict=True)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("adapters | part  | " + " | ".join(Counts.__dataclass_fields__))
    for number, cost in step_costs((0, 1, 4, 16)).items():
        for part, counts in (("layer", cost.layer), ("rest", cost.rest)):
            print(f"{number:8d} | {part:5s} | " + " | ".join(f"{figure:g}" for figure in astuple(counts)))


if __name__ == "__main__":
    main()
