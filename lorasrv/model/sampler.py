"""Draws the tokens of a step: the requests' parameters as tensors, a few calls for all rows, plain values back.

What is drawn stays on the device, where the next step's input is taken from it, and comes to the host beside the steps.

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
from lorasrv_kernels.dispatch import sampler


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
    def sample(self) -> int: ...
    @property
    def edits(self) -> LogitEdits | None: ...
    @property
    def logprobs(self) -> int | None: ...


class Fence:
    """What is submitted to a device so far, to be waited for without waiting for more."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class HostCopy:
    """Small tensors copied to the host behind what is submitted so far."""

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._values = tuple(_to_pinned(tensor) if device.type == "cuda" else tensor for tensor in tensors)
        self._arrived = Fence(device)

    def read(self) -> tuple[Tensor, ...]:
        """Waits for them."""
        self._arrived.wait()
        return self._values


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class Scores:
    """Log-probabilities on their way to the host."""

    def __init__(
        self,
        token_ids: Tensor,  # int64 [num_rows]
        own: Tensor,  # float32 [num_rows]
        top: Tensor,  # float32 [num_rows, num_top]
        ids: Tensor,  # int64 [num_rows, num_top]
    ) -> None:
        self._values = HostCopy(token_ids, own, top, ids)

    def read(self) -> tuple[PositionLogprobs, ...]:
        """Waits for them."""
        token_ids, own, top, ids = (values.tolist() for values in self._values.read())
        return tuple(
            PositionLogprobs(token_id=token_id, logprob=logprob, top=tuple(zip(top_ids, top_logprobs, strict=True)))
            for token_id, logprob, top_ids, top_logprobs in zip(token_ids, own, ids, top, strict=True)
        )


class Drawn:
    """The draws of a step, on their way to the host."""

    def __init__(
        self,
        tokens: Tensor,  # int64 [num_rows], on the device
        valid: Tensor,  # bool [num_rows]
        scores: Sequence[tuple[Sequence[int], Scores]],  # with the rows they are of
    ) -> None:
        self.tokens = tokens
        self._values = HostCopy(tokens, valid)
        self._scores = scores

    def read(self) -> tuple[tuple[int | None, ...], dict[int, PositionLogprobs]]:
        """Waits for them: the tokens, None where a row's logits are not finite, and by row the log-probabilities of
        those that ask and have a token."""
        values, valid = self._values.read()
        tokens = tuple(token if ok else None for token, ok in zip(values.tolist(), valid.tolist(), strict=True))
        found = (zip(rows, scores.read(), strict=True) for rows, scores in self._scores)
        return tokens, {row: each for group in found for row, each in group if tokens[row] is not None}


@torch.inference_mode()
def draw(
    logits: Tensor,  # float32 [num_rows, vocab_size]; rows with edits are changed in place
    rows: Sequence[SampleParams],
) -> Drawn:
    """Draw the token of every row. Rows are not affected by each other."""
    # One call for each number asked for, so that which of equal ones it tells does not depend on the batch.
    asked = sorted({row.logprobs for row in rows if row.logprobs is not None})
    groups = [[index for index, row in enumerate(rows) if row.logprobs == num_top] for num_top in asked]
    places = _tensors(groups, (), logits.device)[0] if groups else ()
    own = [logits[group] for group in places]  # copies, from before the edits
    tokens, valid = _sample(logits, rows)
    scores = [
        (group, position_logprobs(before, tokens[at], num_top))
        for group, before, at, num_top in zip(groups, own, places, asked, strict=True)
    ]
    return Drawn(tokens, valid, scores)


@torch.inference_mode()
def position_logprobs(
    logits: Tensor,  # float32 [num_rows, vocab_size]
    token_ids: Tensor,  # int64 [num_rows]
    num_top: int,
) -> Scores:
    """For every row, the log-probability of its token and those of the `num_top` likeliest."""
    own, top, ids = reference.token_logprobs(logits, token_ids, min(num_top, logits.shape[1]))
    return Scores(token_ids, own, top, ids)


def _sample(logits: Tensor, rows: Sequence[SampleParams]) -> tuple[Tensor, Tensor]:
    """The rows' tokens, and whether their logits are finite."""
    device, vocab_size = logits.device, logits.shape[1]
    edits = [(index, row.edits) for index, row in enumerate(rows) if row.edits is not None]
    if edits:
        _edit(logits, edits)
    drawn = [index for index, row in enumerate(rows) if row.temperature > 0]
    cut = [index for index in drawn if rows[index].top_p < 1 or (rows[index].top_k or vocab_size) < vocab_size]
    integers = [
        [row.top_k or vocab_size for row in rows],
        [_signed(row.seed) for row in rows],
        [row.sample for row in rows],
        [row.position for row in rows],
        sorted(set(drawn).difference(cut)),
        cut,
    ]
    numbers = [[row.temperature for row in rows], [row.top_p for row in rows], [row.min_p for row in rows]]
    (top_k, seeds, samples, positions, *drawing), (temperature, top_p, min_p) = _tensors(integers, numbers, device)
    some_min_p = min_p if any(numbers[2]) else None
    return sampler(device)(logits, temperature, top_p, top_k, some_min_p, seeds, samples, positions, *drawing)


def _tensors(
    integers: Sequence[Sequence[int]], numbers: Sequence[Sequence[float]], device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """int64 and float32 tensors of these lists, in one copy that nobody waits for."""
    wide = torch.tensor([value for values in integers for value in values], dtype=torch.int64)
    narrow = torch.tensor([value for values in numbers for value in values], dtype=torch.float32)
    packed = torch.cat((wide.view(torch.uint8), narrow.view(torch.uint8)))
    if device.type == "cuda":
        packed = packed.pin_memory()  # torch gives the memory to others once the copy has ended
    packed = packed.to(device, non_blocking=True)
    own, others = packed[: wide.nbytes].view(torch.int64), packed[wide.nbytes :].view(torch.float32)
    return own.split([len(values) for values in integers]), others.split([len(values) for values in numbers])


def _edit(logits: Tensor, edits: Sequence[tuple[int, LogitEdits]]) -> None:
    repeated = [(row, token_id) for row, each in edits for token_id in each.repeated]
    penalties = [each.repetition_penalty for _, each in edits for _ in each.repeated]
    added = [(row, token_id) for row, each in edits for token_id, _ in each.added]
    amounts = [amount for _, each in edits for _, amount in each.added]
    masked = [(row, token_id) for row, each in edits for token_id in each.masked]
    columns = [[pair[column] for pair in pairs] for pairs in (repeated, added, masked) for column in (0, 1)]
    places, (factors, terms) = _tensors(columns, (penalties, amounts), logits.device)
    reference.edit_logits(
        logits,
        repeated=torch.stack(places[0:2]),
        penalties=factors,
        added=torch.stack(places[2:4]),
        amounts=terms,
        masked=torch.stack(places[4:6]),
    )


def _signed(seed: int) -> int:
    """The low 64 bits of a seed, as an int64 holds them."""
    bits = seed & (2**64 - 1)
    return bits - 2**64 if bits >> 63 else bits
