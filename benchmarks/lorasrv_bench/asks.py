"""A workload's arrivals as the requests that are sent: prompts of their own, and the names that servers know."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasrv.types import BASE_ID
from lorasrv_bench.workloads import Arrival

# Behind the seeds, so that no two draws share numbers.
PREFIX, REST = 1, 2


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request to send: number `index` of its run, at `at_s` in an open loop.

    `exact_tokens`: the answer has `max_tokens` tokens, whatever they are. Otherwise it ends where the model ends it,
    and `answer`, where it is known, is what it has to be.
    """

    index: int
    at_s: float
    name: str
    adapter: int | None
    tenant: int
    prompt: tuple[int, ...] | str
    max_tokens: int
    exact_tokens: bool = True
    answer: str | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt of a workload's request, which is no text."""
        assert not isinstance(self.prompt, str)
        return self.prompt


def make_asks(arrivals: Sequence[Arrival], names: Sequence[str], seeds: tuple[int, ...], vocab_size: int) -> list[Ask]:
    """Prompts are drawn tokens, by the seeds, a request and its place; requests of one prefix begin alike."""
    return [
        Ask(
            index=index,
            at_s=arrival.at_s,
            name=BASE_ID if arrival.adapter is None else names[arrival.adapter],
            adapter=arrival.adapter,
            tenant=arrival.tenant,
            prompt=prompt_of(arrival, index, seeds, vocab_size),
            max_tokens=arrival.output_tokens,
        )
        for index, arrival in enumerate(arrivals)
    ]


def prompt_of(arrival: Arrival, index: int, seeds: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    shared = np.random.default_rng([*seeds, PREFIX, arrival.prefix or 0])
    own = np.random.default_rng([*seeds, REST, index])
    return (
        *shared.integers(0, vocab_size, arrival.prefix_tokens).tolist(),
        *own.integers(0, vocab_size, arrival.prompt_tokens - arrival.prefix_tokens).tolist(),
    )
