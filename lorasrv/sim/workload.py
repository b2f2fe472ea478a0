"""What the simulator asks of a workload, and its requests as the engine takes them."""

from collections.abc import Sequence
from typing import Protocol

from lorasrv.types import AdapterUse, EngineRequest

# Prompts begin with their prefix's token and go on with one of their own.
_FIRST_OWN_TOKEN = 1 << 32


class Arrival(Protocol):
    """A request, `at_s` seconds after the start; `prompt_tokens` counts the `prefix_tokens` with which it begins."""

    @property
    def at_s(self) -> float: ...
    @property
    def adapter(self) -> int | None: ...
    @property
    def tenant(self) -> int: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def prefix(self) -> int | None: ...
    @property
    def prefix_tokens(self) -> int: ...


class Workload(Protocol):
    """Requests in order of time; adapter number i has `ranks[i % len(ranks)]`, the `resident` ones are warm before."""

    @property
    def arrivals(self) -> Sequence[Arrival]: ...
    @property
    def ranks(self) -> tuple[int, ...]: ...
    @property
    def resident(self) -> range: ...


def digest_of(adapter: int) -> str:
    return str(adapter)


def make_request(number: int, arrival: Arrival) -> EngineRequest:
    """Request `number` of a workload, for an engine whose token ids are names: equal where prompts share a prefix."""
    prefix = (0 if arrival.prefix is None else arrival.prefix + 1,) * arrival.prefix_tokens
    own = (_FIRST_OWN_TOKEN + number,) * (arrival.prompt_tokens - arrival.prefix_tokens)
    return EngineRequest(
        request_id=str(number),
        token_ids=prefix + own,
        adapter=None if arrival.adapter is None else AdapterUse(digest=digest_of(arrival.adapter)),
        max_tokens=arrival.output_tokens,
        seed=0,
        temperature=0.0,
        ignore_eos=True,
        tenant=str(arrival.tenant),
    )
