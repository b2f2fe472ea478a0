"""How many threads an engine computes with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorasrv.config import ModelConfig
from lorasrv.engine.threads import use_threads
from lorasrv.errors import ConfigurationError
from peft_models import random_llama

CORES = 3


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


def test_a_small_model_gets_one(tmp_path: Path) -> None:
    random_llama(tmp_path, seed=0)
    use_threads(ModelConfig(path=str(tmp_path)))
    assert torch.get_num_threads() == 1


def test_a_larger_one_gets_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_llama(tmp_path, seed=0)
    monkeypatch.setattr("lorasrv.engine.threads._SMALL_WEIGHTS_BYTES", 1)
    use_threads(ModelConfig(path=str(tmp_path)))
    assert torch.get_num_threads() == CORES


def test_what_is_asked_for_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_llama(tmp_path, seed=0)
    use_threads(ModelConfig(path=str(tmp_path), threads=2))
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    use_threads(ModelConfig(path=str(tmp_path)))
    assert torch.get_num_threads() == 2


def test_none_is_too_few() -> None:
    with pytest.raises(ConfigurationError, match="threads is 0"):
        ModelConfig(path="anywhere", threads=0)
