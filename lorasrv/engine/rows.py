"""What the runner and the callers are told of each row in each step.

These are made by the ten thousands a second. So they are made as tuples: a named tuple's own constructor is a function
in Python, which takes three times as long.
"""

from collections.abc import Iterable

from lorasrv.engine.batch import ChunkInput, Draw, SampleInput
from lorasrv.engine.sampling import logit_edits
from lorasrv.sched.sequence import Sequence
from lorasrv.types import FinishReason, PositionLogprobs, TokenDelta

_new = tuple.__new__  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def decode_inputs(sequences: Iterable[Sequence]) -> list[ChunkInput]:
    """Of sequences that need one token computed: the last known one, or the one that the step before draws."""
    return [
        _new(
            ChunkInput,
            (
                (each.token_ids[-1],) if each.drawn is None else (),
                each.num_computed,
                each.block_table,
                each.adapter,
                None,
                each.drawn,
            ),
        )
        for each in sequences
    ]


def draw_behind(number: int, sequence: Sequence, eos_token_ids: frozenset[int]) -> Draw:
    """How to draw the token behind the known ones, which chunk number `number` ends with."""
    request, token_ids = sequence.request, sequence.token_ids
    edits = None
    if request.rules is not None or request.min_tokens:
        edits = logit_edits(request, token_ids, eos_token_ids)
    fields = (
        request.temperature,
        request.top_p,
        request.top_k,
        request.seed,
        len(token_ids),
        sequence.sample,
        request.min_p,
        edits,
        request.logprobs,
    )
    return _new(Draw, (number, _new(SampleInput, fields)))


def token_delta(
    sequence: Sequence,
    token_id: int,
    logprobs: tuple[PositionLogprobs, ...],
    prompt_logprobs: tuple[PositionLogprobs, ...],
    finish: FinishReason | None,
) -> TokenDelta:
    """A drawn token."""
    fields = (sequence.request_id, sequence.sample, (token_id,), logprobs, prompt_logprobs, None, finish, None)
    return _new(TokenDelta, fields)
