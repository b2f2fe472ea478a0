"""One step's drawing, waited for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv.engine.batch import ChunkInput, Draw, Runner, SampleInput, StepOutput
from lorasrv.model import sampler
from lorasrv.types import PositionLogprobs

GREEDY = SampleInput(temperature=0.0, top_p=1.0, top_k=None, seed=0, position=0)


def draw(
    logits: Tensor,  # float32 [num_rows, vocab_size]
    rows: Sequence[SampleInput],
) -> tuple[tuple[int | None, ...], dict[int, PositionLogprobs]]:
    return sampler.draw(logits, rows).read()


def sample_tokens(logits: Tensor, rows: Sequence[SampleInput]) -> tuple[int | None, ...]:
    return draw(logits, rows)[0]


def position_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[PositionLogprobs, ...]:
    return sampler.position_logprobs(logits, torch.tensor(token_ids, dtype=torch.int64), num_top).read()


def run_greedy(runner: Runner, chunks: Sequence[ChunkInput], drawing: Sequence[int] | None = None) -> StepOutput:
    """A step that draws behind the chunks of these numbers, or behind all."""
    step = runner.forward(tuple(chunks))
    step.draw(tuple(Draw(chunk=number, how=GREEDY) for number in (range(len(chunks)) if drawing is None else drawing)))
    return step.output()
