"""The CPU's native drawing of tokens against the oracle, token by token."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from drawing_cases import Settings, random_logits, random_settings
from lorasrv_kernels import reference
from lorasrv_kernels.cpu import CpuKernels
from native_kernels import KINDS, kernels_of


@pytest.fixture(params=KINDS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return kernels_of(request.param)


def assert_same(kernels: CpuKernels, logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    own: dict[str, Any] = settings
    tokens, valid = kernels.sample(logits, **own)
    want_tokens, want_valid = reference.sample(logits, **own)
    assert torch.equal(valid, want_valid)
    assert torch.equal(tokens[valid], want_tokens[valid])
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
    return tokens, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 5, 255, 256, 257, 3001])
def test_the_oracles_tokens(kernels: CpuKernels, vocab_size: int, dtype: torch.dtype) -> None:
    settings = random_settings(24, vocab_size, cut=True, min_p=True)
    tokens, valid = assert_same(kernels, random_logits(24, vocab_size, dtype), settings)
    assert valid.all()
    assert vocab_size < 1000 or len(set(tokens.tolist())) > 12


@pytest.mark.parametrize("min_p", [False, True])
@pytest.mark.parametrize("spread", [0.01, 0.25, 3.0])
def test_many_rows_that_keep_all_tokens(kernels: CpuKernels, spread: float, min_p: bool) -> None:
    logits = random_logits(1, 1500).repeat(300, 1) * spread
    tokens, _ = assert_same(kernels, logits, random_settings(300, 1500, cut=False, min_p=min_p, seed=3))
    assert len(set(tokens.tolist())) > 8


def test_of_equal_logits_the_lowest_id_wins(kernels: CpuKernels) -> None:
    logits = random_logits(6, 5000).clamp(max=1.0)
    settings = random_settings(6, 5000, cut=False, min_p=False)
    settings["temperature"], settings["whole"] = torch.zeros(6), torch.arange(0)
    tokens, _ = assert_same(kernels, logits, settings)
    assert tokens.tolist() == (logits == 1.0).int().argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-3, 3e38])
def test_temperatures_and_logits_at_their_ends(kernels: CpuKernels, temperature: float) -> None:
    rows = [
        [3e38, -3e38, 3e38, 0.0],
        [1e-44, 0.0, 1e-44, -1e-44],
        [-math.inf, 0.5, 0.5, -math.inf],
        [1.0, 1.0, 2.0, 2.0],
    ]
    logits = torch.tensor(rows).repeat(1, 300).repeat(4, 1)
    settings = random_settings(16, 1200, cut=True, min_p=True)
    settings["temperature"] = torch.full((16,), temperature)
    settings["cut"], settings["whole"] = torch.arange(1, 16, 2), torch.arange(0, 16, 2)
    assert_same(kernels, logits, settings)


@pytest.mark.parametrize("at", [0, 255, 1024, 2000])
def test_rows_that_are_not_finite_are_told_and_leave_the_others_alone(kernels: CpuKernels, at: int) -> None:
    logits = random_logits(12, 2001)
    whole = logits.clone()
    logits[1, at] = logits[2, at] = logits[3, at] = math.nan
    logits[4, at] = logits[5, at] = logits[6, at] = math.inf
    logits[7] = logits[8] = logits[9] = -math.inf
    logits[9, at] = -5.0
    settings = random_settings(12, 2001, cut=True, min_p=True)
    tokens, valid = assert_same(kernels, logits, settings)
    assert valid.tolist() == [True] + [False] * 8 + [True] * 3
    assert tokens[9] == at
    assert torch.equal(tokens[[0, 10, 11]], assert_same(kernels, whole, settings)[0][[0, 10, 11]])
