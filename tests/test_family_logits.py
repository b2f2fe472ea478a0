"""Every family with every kind of rope: logits against transformers, past the trained length and past the window."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorasrv.model.families import read_architecture
from lorasrv_kernels import fixed, reference
from lorasrv_kernels.forward import ForwardKernels
from peft_models import random_model
from test_decoder import Rig, chunk, prompt

NUM_TOKENS = 45
MAX_POSITIONS = 24
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24, "attention_factor": 0.8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
# Configs of a family that the table above leaves out.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_plain": ("llama", {}),
    "mistral_null_window": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral_window_of_one": ("mistral", {"sliding_window": 1}),
    "mistral_window_of_a_block": ("mistral", {"sliding_window": 8, "tie_word_embeddings": True}),
    "qwen2_window_off": ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "qwen2_all_layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen2_layer_types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2_mha_tied": ("qwen2", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "qwen3_bias_and_window": (
        "qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on disk, two texts, and the logits of transformers for every token of them."""

    folder: Path
    texts: tuple[list[int], list[int]]
    want: tuple[torch.Tensor, torch.Tensor]  # [tokens of a text, vocab_size]


def make_model(folder: Path, model_type: str, rope: str, overrides: dict[str, Any]) -> PreTrainedModel:
    settings = {"num_hidden_layers": 3, "max_position_embeddings": MAX_POSITIONS, "initializer_range": 0.2}
    return random_model(folder, model_type, rope_parameters=ROPES[rope], **(settings | overrides))


def make_case(folder: Path, model_type: str, rope: str, overrides: dict[str, Any]) -> Case:
    model = make_model(folder, model_type, rope, overrides)
    texts = (prompt(1, NUM_TOKENS), prompt(2, 30))
    answer = token_by_token if rope == "dynamic" else whole
    return Case(folder=folder, texts=texts, want=(answer(model, texts[0]), answer(model, texts[1])))


def whole(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def token_by_token(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """As `whole`, through transformers' cache."""
    cache, rows = None, []
    with torch.no_grad():
        for token in tokens:
            out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    return torch.cat(rows)


def compare_chunks(case: Case, size: int, kernels: ForwardKernels = reference) -> None:
    rig, tokens = Rig(case.folder, kernels=kernels), case.texts[0]
    table = rig.table(NUM_TOKENS)
    for start in range(0, NUM_TOKENS, size):
        end = min(start + size, NUM_TOKENS)
        got = rig.logits(rig.runner.build_batch([chunk(tokens, start, end, table)]))
        torch.testing.assert_close(got, case.want[0][end - 1 : end], atol=1e-4, rtol=0)


def compare_mixed(case: Case) -> None:
    """Four sequences of two texts at different stages of life: whole prompts, chunks and decodes in one batch."""
    rig = Rig(case.folder)
    lengths = [len(case.texts[i % 2]) for i in range(4)]
    tables = [rig.table(length) for length in lengths]
    rng, done = random.Random(4), [0] * 4
    while done != lengths:
        members = [i for i in range(4) if done[i] < lengths[i]]
        ends = {i: min(done[i] + rng.choice((1, 1, 5, 30)), lengths[i]) for i in members}
        batch = rig.runner.build_batch([chunk(case.texts[i % 2], done[i], ends[i], tables[i]) for i in members])
        for row, i in zip(rig.logits(batch), members, strict=True):
            torch.testing.assert_close(row, case.want[i % 2][ends[i] - 1], atol=1e-4, rtol=0)
            done[i] = ends[i]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_transformers(tmp_path: Path, model_type: str, rope: str) -> None:
    case = make_case(tmp_path, model_type, rope, FAMILIES[model_type])
    assert read_architecture(tmp_path).rope.kind == rope
    for size in (1, 7, NUM_TOKENS):
        compare_chunks(case, size)
    compare_chunks(case, 7, fixed)
    compare_mixed(case)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_other_configs_equal_transformers(tmp_path: Path, name: str) -> None:
    model_type, overrides = VARIANTS[name]
    case = make_case(tmp_path, model_type, "default", overrides)
    compare_chunks(case, 7)
    compare_chunks(case, 7, fixed)
    compare_mixed(case)


def test_dynamic_is_transformers_whole_forward_up_to_max_position_embeddings(tmp_path: Path) -> None:
    """And not past it: there transformers rotates all keys as the last one, which no cached decode could go on from."""
    model, tokens = make_model(tmp_path, "llama", "dynamic", {}), prompt(1, NUM_TOKENS)
    short = whole(model, tokens[:MAX_POSITIONS])  # first: transformers forgets a longer text's scale too late for it
    cached = token_by_token(model, tokens)
    torch.testing.assert_close(short, cached[:MAX_POSITIONS], atol=1e-4, rtol=0)
    assert (whole(model, tokens) - cached).abs().max() > 0.1
    rig = Rig(tmp_path)
    got = rig.logits(rig.runner.build_batch([chunk(tokens, 0, NUM_TOKENS, rig.table(NUM_TOKENS))]))
    torch.testing.assert_close(got, cached[-1:], atol=1e-4, rtol=0)
