"""Draws the tokens of a step: the requests' parameters as tensors, a few calls for all rows, plain values back.

The order of operations on a row of logits, stated here once:

1. repetition penalty: it depends on a logit's sign, so it must see what the model gave;
2. presence penalty, frequency penalty and bias: sums, so they have no order among themselves;
3. masks (bad words; the end while min_tokens holds it back): -inf, which nothing after can undo;
4. temperature, 5. top_k, 6. top_p, 7. min_p: each narrows what the one before left, as in transformers;
8. Gumbel-max.

1 to 3 are `reference.edit_logits` and touch only rows that ask; 4 to 8 are `reference.sample`. Log-probabilities are
those of the model's own logits, before all of it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorasrv.model.logit_edits import LogitEdits
from lorasrv.types import PositionLogprobs
from lorasrv_kernels import reference


class SampleParams(Protocol):
    """What a row needs; `engine.batch.SampleInput` is one. `top_k` None keeps all tokens."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def edits(self) -> LogitEdits | None: ...
    @property
    def logprobs(self) -> int | None: ...


def draw(
    logits: Tensor,  # float32 [num_rows, vocab_size]; rows with edits are changed in place
    rows: Sequence[SampleParams],
) -> tuple[tuple[int | None, ...], dict[int, PositionLogprobs]]:
    """The tokens as `sample_tokens` gives them, and by row the log-probabilities of those that ask and have a token."""
    asking = [index for index, row in enumerate(rows) if row.logprobs is not None]
    if not asking:
        return sample_tokens(logits, rows), {}
    own = logits[asking]  # a copy, from before the edits
    tokens = sample_tokens(logits, rows)
    found: dict[int, PositionLogprobs] = {}
    # One call for each number asked for, so that which of equal ones it tells does not depend on the batch.
    for num_top in sorted({rows[index].logprobs or 0 for index in asking}):
        group = [
            (place, index, token)
            for place, index in enumerate(asking)
            if (rows[index].logprobs or 0) == num_top and (token := tokens[index]) is not None
        ]
        scored = position_logprobs(own[[place for place, _, _ in group]], [token for _, _, token in group], num_top)
        found |= zip((index for _, index, _ in group), scored, strict=True)
    return tokens, found


@torch.inference_mode()
def sample_tokens(
    logits: Tensor,  # float32 [num_rows, vocab_size]; rows with edits are changed in place
    rows: Sequence[SampleParams],
) -> tuple[int | None, ...]:
    """The token of every row; None where the row's logits are not finite. Other rows are not affected by it."""
    device, vocab_size = logits.device, logits.shape[1]
    edits = [(index, row.edits) for index, row in enumerate(rows) if row.edits is not None]
    if edits:
        _edit(logits, edits)
    min_p = [row.min_p for row in rows]
    tokens, valid = reference.sample(
        logits,
        temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device),
        top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float32, device=device),
        top_k=torch.tensor([row.top_k or vocab_size for row in rows], dtype=torch.int64, device=device),
        min_p=torch.tensor(min_p, dtype=torch.float32, device=device) if any(min_p) else None,
        seeds=torch.tensor([_signed(row.seed) for row in rows], dtype=torch.int64, device=device),
        positions=torch.tensor([row.position for row in rows], dtype=torch.int64, device=device),
    )
    return tuple(token if ok else None for token, ok in zip(tokens.tolist(), valid.tolist(), strict=True))


@torch.inference_mode()
def position_logprobs(
    logits: Tensor,  # float32 [num_rows, vocab_size]
    token_ids: Sequence[int],
    num_top: int,
) -> tuple[PositionLogprobs, ...]:
    """For every row, the log-probability of its token and those of the `num_top` likeliest."""
    own, top, ids = reference.token_logprobs(
        logits, torch.tensor(token_ids, dtype=torch.int64, device=logits.device), min(num_top, logits.shape[1])
    )
    return tuple(
        PositionLogprobs(token_id=token_id, logprob=logprob, top=tuple(zip(top_ids, top_logprobs, strict=True)))
        for token_id, logprob, top_ids, top_logprobs in zip(
            token_ids, own.tolist(), ids.tolist(), top.tolist(), strict=True
        )
    )


def _edit(logits: Tensor, edits: Sequence[tuple[int, LogitEdits]]) -> None:
    device = logits.device
    rows = torch.tensor([row for row, _ in edits], device=device)

    def each_of(values: Tensor, lists: Sequence[Sequence[object]]) -> Tensor:
        """Each row's value, once for each thing in the row's list."""
        return values.repeat_interleave(torch.tensor([len(found) for found in lists], device=device))

    def pairs(lists: Sequence[Sequence[int]]) -> Tensor:
        flat = torch.tensor([token_id for found in lists for token_id in found], dtype=torch.int64, device=device)
        return torch.stack((each_of(rows, lists), flat))

    repeated = [each.repeated for _, each in edits]
    penalties = torch.tensor([each.repetition_penalty for _, each in edits], dtype=torch.float32, device=device)
    amounts = [amount for _, each in edits for _, amount in each.added]
    reference.edit_logits(
        logits,
        repeated=pairs(repeated),
        penalties=each_of(penalties, repeated),
        added=pairs([[token_id for token_id, _ in each.added] for _, each in edits]),
        amounts=torch.tensor(amounts, dtype=torch.float32, device=device),
        masked=pairs([each.masked for _, each in edits]),
    )


def _signed(seed: int) -> int:
    """The low 64 bits of a seed, as an int64 holds them."""
    bits = seed & (2**64 - 1)
    return bits - 2**64 if bits >> 63 else bits
