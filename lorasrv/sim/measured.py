"""What a real engine's steps took, in place of a machine's rates: good for the model that it was measured on."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import mul
from typing import Any

from lorasrv.errors import ConfigurationError
from lorasrv.sim.work import StepWork


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """How long steps of a model of `linear_params` take, from one's start to the next one's: the sum of what `terms`
    says of a step, each by its `seconds`."""

    linear_params: int
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ConfigurationError."""
        if not self.tokens or sorted(set(self.tokens)) != list(self.tokens):
            raise ConfigurationError(f"measured steps: tokens {self.tokens} do not ascend")
        num_terms = len(terms(StepWork(num_rows=1, num_tokens=1, context_tokens=1, pairs=1), self.tokens))
        if len(self.seconds) != num_terms or not all(0 <= each < float("inf") for each in self.seconds):
            raise ConfigurationError(f"measured steps: seconds {self.seconds} are not {num_terms} numbers >= 0")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "MeasuredSteps":
        """Of a JSON object. Raises ConfigurationError."""
        try:
            return cls(
                linear_params=int(values["linear_params"]),
                tokens=tuple(map(int, values["tokens"])),
                seconds=tuple(map(float, values["seconds"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"measured steps: {error!r}") from None

    def step_s(self, work: StepWork) -> float:
        return sum(map(mul, self.seconds, terms(work, self.tokens)))


def terms(work: StepWork, tokens: tuple[int, ...]) -> tuple[float, ...]:
    """Of a step: 1; how many of its tokens lie between `tokens[i]` and the next number, for each i; its sequences; the
    tokens that it reads the KV of; 1 if it has an adapter; its adapters, their weights, and these times their rows.

    A token more costs little where products have room for it, and much where it begins a new block: so tokens have
    sections.
    """
    ends = (*tokens[1:], float("inf"))
    sections = (max(0.0, min(work.num_tokens, end) - begin) for begin, end in zip(tokens, ends, strict=True))
    adapters = (work.num_adapters > 0, work.num_adapters, work.adapter_params, work.adapter_products)
    return (1.0, *sections, work.num_rows, work.context_tokens, *adapters)
