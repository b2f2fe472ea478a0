"""Triton's drawing of tokens against the oracle, token by token: in the interpreter, or on a GPU where there is one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_device import DEVICE

from lorasrv_kernels import reference  # isort: skip
from drawing_cases import Settings, random_logits, random_settings  # isort: skip
from lorasrv_kernels.sampling import sample  # isort: skip


def settings_here(num_rows: int, vocab_size: int, *, cut: bool, min_p: bool, seed: int = 0) -> Settings:
    settings = random_settings(num_rows, vocab_size, cut=cut, min_p=min_p, seed=seed)
    return {name: None if value is None else value.to(DEVICE) for name, value in settings.items()}


def assert_same(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    own: dict[str, Any] = settings
    tokens, valid = sample(logits.to(DEVICE), **own)
    want_tokens, want_valid = reference.sample(logits.to(DEVICE), **own)
    assert torch.equal(valid, want_valid)
    assert torch.equal(tokens[valid], want_tokens[valid])
    assert ((tokens >= 0) & (tokens < logits.shape[1])).all()
    return tokens, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 5, 1023, 1024, 1025, 3001])
def test_the_oracles_tokens(vocab_size: int, dtype: torch.dtype) -> None:
    settings = settings_here(24, vocab_size, cut=True, min_p=True)
    tokens, valid = assert_same(random_logits(24, vocab_size, dtype), settings)
    assert valid.all()
    assert vocab_size < 1000 or len(set(tokens.tolist())) > 12


@pytest.mark.parametrize("min_p", [False, True])
def test_many_rows_that_keep_all_tokens(min_p: bool) -> None:
    logits = random_logits(1, 1500).repeat(90, 1) / 4
    tokens, _ = assert_same(logits, settings_here(90, 1500, cut=False, min_p=min_p, seed=3))
    assert len(set(tokens.tolist())) > 30


def test_of_equal_logits_the_lowest_id_wins_across_blocks() -> None:
    logits = random_logits(6, 5000).clamp(max=1.0)
    settings = settings_here(6, 5000, cut=False, min_p=False)
    settings["temperature"] = torch.zeros(6, device=DEVICE)
    tokens, _ = assert_same(logits, settings)
    assert tokens.tolist() == (logits == 1.0).int().argmax(-1).tolist()
    settings["min_p"], settings["temperature"] = torch.ones(6, device=DEVICE), torch.full((6,), 0.7, device=DEVICE)
    settings["whole"] = torch.arange(6, device=DEVICE)
    tokens, _ = assert_same(logits, settings)
    assert (logits.gather(1, tokens.cpu().unsqueeze(1)) == 1.0).all()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-3, 3e38])
def test_temperatures_and_logits_at_their_ends(temperature: float) -> None:
    rows = [
        [3e38, -3e38, 3e38, 0.0],
        [1e-44, 0.0, 1e-44, -1e-44],
        [-math.inf, 0.5, 0.5, -math.inf],
        [1.0, 1.0, 2.0, 2.0],
    ]
    logits = torch.tensor(rows).repeat(1, 300).repeat(4, 1)
    settings = settings_here(16, 1200, cut=True, min_p=True)
    settings["temperature"] = torch.full((16,), temperature, device=DEVICE)
    settings["cut"] = torch.arange(1, 16, 2, device=DEVICE)
    settings["whole"] = torch.arange(0, 16, 2, device=DEVICE)
    assert_same(logits, settings)


@pytest.mark.parametrize("at", [0, 1023, 1024, 2000])
def test_rows_that_are_not_finite_are_told_and_leave_the_others_alone(at: int) -> None:
    logits = random_logits(12, 2001)
    whole = logits.clone()
    logits[1, at] = logits[2, at] = logits[3, at] = math.nan
    logits[4, at] = logits[5, at] = logits[6, at] = math.inf
    logits[7] = logits[8] = logits[9] = -math.inf
    logits[9, at] = -5.0
    settings = settings_here(12, 2001, cut=True, min_p=True)
    tokens, valid = assert_same(logits, settings)
    assert valid.tolist() == [True] + [False] * 8 + [True] * 3
    assert tokens[9] == at
    assert torch.equal(tokens[[0, 10, 11]], assert_same(whole, settings)[0][[0, 10, 11]])


def test_a_row_draws_the_same_alone() -> None:
    logits, settings = random_logits(9, 1100), settings_here(9, 1100, cut=False, min_p=True)
    tokens, _ = assert_same(logits, settings)
    for row in range(9):
        own = {name: None if value is None else value[row : row + 1] for name, value in settings.items()}
        own["whole"], own["cut"] = torch.zeros(1, dtype=torch.int64, device=DEVICE), settings["cut"]
        if settings["temperature"] is not None and settings["temperature"][row] == 0:
            own["whole"] = own["cut"]
        assert assert_same(logits[row : row + 1], own)[0] == tokens[row]
