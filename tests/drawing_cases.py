"""Rows of logits, and how to draw from them, for what draws beside the oracle."""

import torch
from torch import Tensor

Settings = dict[str, Tensor | None]


def random_settings(num_rows: int, vocab_size: int, *, cut: bool, min_p: bool, seed: int = 0) -> Settings:
    """Every third row is greedy, and of the others every other one is cut."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(num_rows)
    temperature = torch.rand(num_rows, generator=generator) * 2 + 0.1
    temperature[::3] = 0
    is_cut = (number % 2 == 1) & (temperature > 0) & cut
    top_k = torch.randint(1, vocab_size + 1, (num_rows,), generator=generator)
    top_p = torch.rand(num_rows, generator=generator).clamp(0.05)
    return {
        "temperature": temperature,
        "top_p": torch.where(is_cut, top_p, 1.0),
        "top_k": torch.where(is_cut & (number % 4 == 1), top_k, vocab_size),
        "min_p": torch.rand(num_rows, generator=generator) * (number % 2) if min_p else None,
        "seeds": torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator),
        "samples": number % 3,
        "positions": torch.randint(0, 2**32, (num_rows,), generator=generator),
        "whole": ((temperature > 0) & ~is_cut).nonzero().squeeze(1),
        "cut": is_cut.nonzero().squeeze(1),
    }


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 2).to(dtype)
