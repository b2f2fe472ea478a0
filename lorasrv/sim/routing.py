"""Which of several equal engines gets a request."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType
from typing import Protocol

# An engine takes requests beyond those of its adapters' own up to this much more than its share of all.
SLACK = 0.25


class Router(Protocol):
    def choose(self, adapter: int | None, loads: Sequence[int]) -> int:
        """The engine's number; `loads` are the requests that each has been given and has not ended."""
        ...


class Balanced:
    """The engine with the fewest requests, whatever they ask for."""

    def choose(self, adapter: int | None, loads: Sequence[int]) -> int:
        return min(range(len(loads)), key=loads.__getitem__)


class Affinity:
    """Each adapter has an order of engines of its own, and its requests go to the first that is not overloaded.

    So an adapter is warm in as few engines as its load asks for. (Rendezvous hashing: Thaler and Ravishankar, 1998;
    loads bounded by 1 + SLACK of the mean: Mirrokni et al., SODA 2018.) Requests for the base go where the fewest are.
    """

    def __init__(self) -> None:
        self._orders: dict[tuple[int, int], list[int]] = {}

    def choose(self, adapter: int | None, loads: Sequence[int]) -> int:
        if adapter is None or len(loads) == 1:
            return min(range(len(loads)), key=loads.__getitem__)
        most = (1 + SLACK) * (sum(loads) + 1) / len(loads)
        order = self._order(adapter, len(loads))
        return next((engine for engine in order if loads[engine] + 1 <= most), min(order, key=loads.__getitem__))

    def _order(self, adapter: int, count: int) -> list[int]:
        order = self._orders.get((adapter, count))
        if order is None:
            order = sorted(range(count), key=lambda engine: blake2b(f"{adapter}/{engine}".encode()).digest())
            self._orders[adapter, count] = order
        return order


ROUTERS: Mapping[str, type[Affinity] | type[Balanced]] = MappingProxyType({"affinity": Affinity, "balanced": Balanced})
