"""What one step computes, as the runner gets it: token chunks of sequences, each with its pages and its adapter."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class SampleInput:
    """How to draw the token behind a chunk; `position` is that token's index in the sequence."""

    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    position: int


@dataclass(frozen=True, kw_only=True)
class AdapterInput:
    """A resident adapter: `directory` is its address in the pool, in units of 128 bytes."""

    directory: int
    max_rank: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class ChunkInput:
    """Tokens `[start, start + len(token_ids))` of one sequence.

    `block_table` covers all tokens up to the chunk's end; tokens before `start` are in its pages already. `sample` is
    None unless the chunk ends the known tokens.
    """

    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    adapter: AdapterInput | None
    sample: SampleInput | None


class Runner(Protocol):
    """Runs one model forward per step."""

    def run(self, chunks: tuple[ChunkInput, ...]) -> tuple[int | None, ...]:
        """The token of every sampling chunk, in order; None where that row's logits were not finite."""
        ...
