"""Draws the tokens of a step: the requests' parameters as tensors, one call, plain ids back."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

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
    def seed(self) -> int: ...
    @property
    def position(self) -> int: ...


def sample_tokens(
    logits: Tensor,  # float32 [num_rows, vocab_size]
    rows: Sequence[SampleParams],
) -> tuple[int | None, ...]:
    """The token of every row; None where the row's logits are not finite. Other rows are not affected by it."""
    device, vocab_size = logits.device, logits.shape[1]
    tokens, valid = reference.sample(
        logits,
        temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device),
        top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float32, device=device),
        top_k=torch.tensor([row.top_k or vocab_size for row in rows], dtype=torch.int64, device=device),
        seeds=torch.tensor([_signed(row.seed) for row in rows], dtype=torch.int64, device=device),
        positions=torch.tensor([row.position for row in rows], dtype=torch.int64, device=device),
    )
    return tuple(token if ok else None for token, ok in zip(tokens.tolist(), valid.tolist(), strict=True))


def _signed(seed: int) -> int:
    """The low 64 bits of a seed, as an int64 holds them."""
    bits = seed & (2**64 - 1)
    return bits - 2**64 if bits >> 63 else bits
