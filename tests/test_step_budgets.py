"""What a decode step may do: Python calls, torch operations and copied bytes, each with a budget.

A guard against growth that needs no clock. The table has what was measured beside each budget; who makes a step do less
writes the new figures there.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from lorasrv_bench.step_counts import Counts, StepCost, calls_counted, ops_counted, step_costs
from lorasrv_kernels import cpu

ROWS = 16
CONTEXT, LONGER = 32, 64


class Budget(NamedTuple):
    """Of one figure: what it was when this was written, and the most it may be."""

    measured: float
    most: float


# For a step of 16 rows on a model without its weights' width: calls of Python functions, of built-in ones, torch
# operations, bytes copied by them.
BUDGETS: Mapping[str, tuple[Budget, Budget, Budget, Budget]] = MappingProxyType(
    {
        "a layer, base": (Budget(27, 28), Budget(50, 52), Budget(12, 12), Budget(0, 0)),
        "a layer, 16 adapters": (Budget(39, 41), Budget(110, 114), Budget(16, 16), Budget(0, 0)),
        "a layer, an adapter more": (Budget(0, 0), Budget(0, 0), Budget(0, 0), Budget(0, 0)),
        "a layer, a row's token more": (Budget(0, 0), Budget(0, 0), Budget(0, 0), Budget(0, 0)),
        "the rest, base": (Budget(471, 490), Budget(462, 480), Budget(45, 47), Budget(5824, 6000)),
        "the rest, 16 adapters": (Budget(606, 630), Budget(586, 610), Budget(53, 55), Budget(9920, 10_000)),
        "the rest, an adapter more": (Budget(2, 3), Budget(1, 2), Budget(0, 0), Budget(0, 0)),
    }
)


@pytest.fixture(scope="module")
def costs() -> Mapping[str, Counts]:
    if isinstance(why := cpu.load(), str):
        pytest.skip(f"torch computes here, which takes more calls: {why}")
    near = step_costs((0, 4, 16), rows=ROWS, context=CONTEXT)
    far = step_costs((0,), rows=ROWS, context=LONGER)
    return {
        "a layer, base": near[0].layer,
        "a layer, 16 adapters": near[16].layer,
        "a layer, an adapter more": _each_more(near, lambda cost: cost.layer),
        "a layer, a row's token more": (far[0].layer - near[0].layer) * (1 / ROWS / (LONGER - CONTEXT)),
        "the rest, base": near[0].rest,
        "the rest, 16 adapters": near[16].rest,
        "the rest, an adapter more": _each_more(near, lambda cost: cost.rest),
    }


def _each_more(costs: Mapping[int, StepCost], part: Callable[[StepCost], Counts]) -> Counts:
    return (part(costs[16]) - part(costs[4])) * (1 / 12)


@pytest.mark.parametrize("part", BUDGETS)
def test_a_decode_step_keeps_to_its_budget(part: str, costs: Mapping[str, Counts]) -> None:
    found, budgets = costs[part], BUDGETS[part]
    figures = (found.python_calls, found.builtin_calls, found.torch_ops, found.copied_bytes)
    over = [
        f"{figure:.6g} {name}, {budget.most:g} allowed"
        for name, figure, budget in zip(Counts.__dataclass_fields__, figures, budgets, strict=True)
        if figure > budget.most
    ]
    assert not over, over


def test_calls_are_counted() -> None:
    def called() -> int:
        return len("ab")

    with calls_counted() as told:
        for _ in range(3):
            called()
    assert told == {"python_calls": 3, "builtin_calls": 3}


def test_operations_and_the_bytes_that_they_copy_are_counted() -> None:
    values, rows = torch.ones(4, 5), torch.tensor([1, 2])
    with ops_counted() as told:
        assert values.add(1).sum() == 40
    assert told["copied_bytes"] == 0 and told["torch_ops"] >= 2
    for copying, num_bytes in (
        (lambda: values.clone(), 80),
        (lambda: values.double(), 160),
        (lambda: values.index_select(0, rows), 40),
        (lambda: torch.cat([values, values]), 160),
        (lambda: torch.zeros(100, 5).index_copy_(0, rows, values[:2]), 40),
        (lambda: torch.zeros(4, 5).copy_(values), 80),
    ):
        with ops_counted() as told:
            copying()
        assert told["copied_bytes"] == num_bytes
