"""Rotary positions: the frequencies of every kind, with its source, and the cosines and sines of a step's rows.

In fp32 and in the order of operations of transformers, so that long contexts get its bits and not merely its formula.

A row's rotation depends on its own position and on nothing else: not on the chunk, the batch, or the length that the
sequence will have. That is what lets keys stay in the pool, and be shared and recomputed. The kind `dynamic` is defined
by a sequence's length, so it needs a choice: **a token at position p is rotated as in a sequence of p + 1 tokens**.
This equals transformers in a forward of up to `max_position_embeddings` tokens and in the decode with its cache that
goes on from there, past that length, whose old keys keep the rotation they were written with. It differs where a prompt
alone is longer: transformers rotates all its keys as the last one, which no later token's keys will agree with.
"""

import math

import torch
from torch import Tensor

from lorasrv.model.rope_config import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope


class Rotation:
    """Cosines and sines by position. Immutable after construction."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim  # [head_dim / 2]
        self._inv_freq = static_frequencies(rope, self._exponents)  # [head_dim / 2]
        self._amplitude = yarn_attention_factor(rope) if isinstance(rope, YarnRope) else 1.0

    def at(
        self,
        positions: Tensor,  # int64 [num_tokens]
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # [num_tokens, head_dim / 2], twice
        inv_freq = self._inv_freq
        if isinstance(self._rope, DynamicRope):
            grown = dynamic_frequencies(self._rope, positions, self._exponents, self._head_dim)
            inv_freq = torch.where((positions < self._rope.original_tokens).unsqueeze(1), inv_freq, grown)
        angles = positions.unsqueeze(1).float() * inv_freq
        return (angles.cos() * self._amplitude).to(dtype), (angles.sin() * self._amplitude).to(dtype)


def static_frequencies(
    rope: Rope,
    exponents: Tensor,  # float32 [head_dim / 2], 2i / head_dim
) -> Tensor:  # float32 [head_dim / 2]
    """The angle per position of every pair; of the kind `dynamic`, while nothing is scaled.

    Unscaled: Su et al., "RoFormer" (arXiv 2104.09864), theta^(-2i / head_dim). Linear: Chen et al., "Extending context
    window of large language models via positional interpolation" (arXiv 2306.15595), that divided by the factor.
    """
    inv_freq = 1.0 / rope.theta**exponents
    match rope:
        case LinearRope():
            return inv_freq / rope.factor
        case YarnRope():
            return _yarn_frequencies(rope, exponents)
        case Llama3Rope():
            return _llama3_frequencies(rope, inv_freq)
        case _:
            return inv_freq


def dynamic_frequencies(
    rope: DynamicRope,
    positions: Tensor,  # int64 [num_tokens], each >= original_tokens - 1 where the result matters
    exponents: Tensor,  # float32 [head_dim / 2]
    head_dim: int,
) -> Tensor:  # float32 [num_tokens, head_dim / 2]
    """NTK-aware scaling by the length at hand, p + 1: Peng et al., "YaRN" (arXiv 2309.00071), sections 3.1 and 3.3.

    theta grows by (factor * length / original - (factor - 1)) ^ (head_dim / (head_dim - 2)).
    """
    lengths = (positions + 1).clamp(min=rope.original_tokens).unsqueeze(1)
    growth = rope.factor * lengths / rope.original_tokens - (rope.factor - 1)
    return 1.0 / (rope.theta * growth ** (head_dim / (head_dim - 2))) ** exponents


def _yarn_frequencies(
    rope: YarnRope,
    exponents: Tensor,  # float32 [head_dim / 2]
) -> Tensor:  # float32 [head_dim / 2]
    """NTK-by-parts: Peng et al., "YaRN" (arXiv 2309.00071), section 3.2.

    Pairs that turn more than beta_fast times within the original length keep their frequency, pairs that turn fewer
    than beta_slow times are interpolated, and a linear ramp over the pairs' indices joins them.
    """
    head_dim = 2 * exponents.shape[0]

    def pair_that_turns(num_rotations: float) -> float:
        ratio = rope.original_tokens / (num_rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    indices = torch.arange(exponents.shape[0], dtype=torch.float32, device=exponents.device)
    kept = 1 - ((indices - low) / (high - low)).clamp(0, 1)
    wavelengths = rope.theta**exponents
    return (1.0 / (rope.factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept


def yarn_attention_factor(rope: YarnRope) -> float:
    """What cosines and sines are multiplied by, for attention's temperature: "YaRN", section 3.4, sqrt(1 / t).

    With `mscale` and `mscale_all_dim`, the ratio that DeepSeek-V2 (arXiv 2405.04434) introduced.
    """
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _llama3_frequencies(
    rope: Llama3Rope,
    inv_freq: Tensor,  # float32 [head_dim / 2]
) -> Tensor:  # float32 [head_dim / 2]
    """Llama 3.1's scaling, from Meta's reference implementation (github.com/meta-llama/llama-models, llama3 model).

    Wavelengths longer than original / low_freq_factor are stretched by the factor, those shorter than original /
    high_freq_factor kept, and those between blended by the turns that they make within the original length.
    """
    wavelengths = 2 * math.pi / inv_freq
    slow, fast = rope.original_tokens / rope.low_freq_factor, rope.original_tokens / rope.high_freq_factor
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = (rope.original_tokens / wavelengths - rope.low_freq_factor) / span
    blended = (1 - kept) * inv_freq / rope.factor + kept * inv_freq
    between = (wavelengths >= fast) & (wavelengths <= slow)
    return torch.where(between, blended, torch.where(wavelengths > slow, inv_freq / rope.factor, inv_freq))
