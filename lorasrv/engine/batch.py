"""What one step computes, as the runner gets it: token chunks of sequences, each with its pages and its adapter.

A step is submitted in two halves, so that the device need not wait for the host: `Runner.forward` while the step before
still runs, and `RunningStep.draw` when that step's tokens are known, which penalties and masks depend on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lorasrv.memory.residency import AdapterInput
from lorasrv.model.logit_edits import LogitEdits
from lorasrv.types import PositionLogprobs


class SampleInput(NamedTuple):
    """How to draw the token behind a chunk; `position` is that token's index in the sequence, `sample` the sequence's
    among the request's samples.

    `edits` None leaves the logits as the model gave them; `logprobs` is how many of the likeliest tokens to tell the
    log-probabilities of beside the drawn one's, None for not even that.
    """

    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    position: int
    sample: int = 0
    min_p: float = 0.0
    edits: LogitEdits | None = None
    logprobs: int | None = None


class Draw(NamedTuple):
    """Draw the token behind chunk number `chunk` of a step."""

    chunk: int
    how: SampleInput


@dataclass(frozen=True, kw_only=True)
class ScoreInput:
    """Prompt tokens `[start, start + len(token_ids))` whose log-probabilities a chunk is to give.

    The row of the token before each is in the chunk. `num_top` is how many of the likeliest to tell beside it.
    """

    token_ids: tuple[int, ...]
    start: int
    num_top: int


class ChunkInput(NamedTuple):
    """Tokens `[start, start + num_tokens)` of one sequence.

    `block_table` covers all tokens up to the chunk's end; tokens before `start` are in its pages already. Where the
    step before draws the chunk's only token, `token_ids` is empty and `drawn` is the token's place in its draws.
    """

    token_ids: tuple[int, ...]
    start: int
    block_table: Sequence[int]
    adapter: AdapterInput | None
    score: ScoreInput | None = None
    drawn: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) or 1


@dataclass(frozen=True, kw_only=True)
class PageCopy:
    """Before the forward, copy all of page `source` to page `target`."""

    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step gave. `tokens` has the token of every draw, in order; None where no token could be drawn.

    `logprobs` is by place in the draws, `prompt_logprobs` by place of the chunk; those that did not ask are not there.
    """

    tokens: tuple[int | None, ...]
    logprobs: Mapping[int, PositionLogprobs] = field(default_factory=dict[int, PositionLogprobs])
    prompt_logprobs: Mapping[int, tuple[PositionLogprobs, ...]] = field(
        default_factory=dict[int, tuple[PositionLogprobs, ...]]
    )


class RunningStep(Protocol):
    """A submitted step, whose forward may still be running."""

    def draw(self, draws: tuple[Draw, ...]) -> None:
        """Submit the drawing of tokens. Called once."""
        ...

    def output(self) -> StepOutput:
        """Wait until the step has completed. Called once, after `draw`."""
        ...


class Runner(Protocol):
    """Runs one model forward per step. Steps complete in the order in which they are submitted."""

    @property
    def runs_ahead(self) -> bool:
        """Whether steps run beside the caller, so that submitting one while another runs gains time."""
        ...

    def forward(self, chunks: tuple[ChunkInput, ...], copies: tuple[PageCopy, ...] = ()) -> RunningStep:
        """Submit a step's forward, once the step before has its draws."""
        ...
