"""What one step computes, as the runner gets it: token chunks of sequences, each with its pages and its adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lorasrv.model.logit_edits import LogitEdits
from lorasrv.types import PositionLogprobs


@dataclass(frozen=True, kw_only=True)
class SampleInput:
    """How to draw the token behind a chunk; `position` is that token's index in the sequence.

    `edits` None leaves the logits as the model gave them; `logprobs` is how many of the likeliest tokens to tell the
    log-probabilities of beside the drawn one's, None for not even that.
    """

    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    position: int
    min_p: float = 0.0
    edits: LogitEdits | None = None
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreInput:
    """Prompt tokens `[start, start + len(token_ids))` whose log-probabilities a chunk is to give.

    The row of the token before each is in the chunk. `num_top` is how many of the likeliest to tell beside it.
    """

    token_ids: tuple[int, ...]
    start: int
    num_top: int


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
    score: ScoreInput | None = None


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step gave. `tokens` has the token of every sampling chunk, in order; None where no token could be drawn.

    `logprobs` is by place in `tokens`, `prompt_logprobs` by place of the chunk; those that did not ask are not there.
    """

    tokens: tuple[int | None, ...]
    logprobs: Mapping[int, PositionLogprobs] = field(default_factory=dict[int, PositionLogprobs])
    prompt_logprobs: Mapping[int, tuple[PositionLogprobs, ...]] = field(
        default_factory=dict[int, tuple[PositionLogprobs, ...]]
    )


class Runner(Protocol):
    """Runs one model forward per step."""

    def run(self, chunks: tuple[ChunkInput, ...]) -> StepOutput: ...
