"""Every family through the whole engine: greedy tokens of mixed batches of adapters and base rows are PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_models import peft_greedy, random_adapter, random_model
from test_engine_parity import NUM_TOKENS, PROMPTS_EACH, Case, make_engine, serve

ADAPTERS: dict[str, dict[str, Any]] = {
    "r1": {"rank": 1, "delta": 1.0},
    "r3": {"rank": 3, "targets": ("q_proj", "k_proj", "v_proj"), "delta": 2.0, "rslora": True},
    "r13": {"rank": 13, "targets": ("v_proj", "o_proj", "down_proj")},
    "r32": {"rank": 32, "alpha": 16},
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 6, "rope_parameters": YARN},
    # The longest prompt just fits max_position_embeddings; its answers are scaled.
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "max_position_embeddings": 36,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0},
    },
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
}


def make_case(model_type: str, tmp_path: Path) -> Case:
    model = random_model(tmp_path / "model", model_type, seed=3, initializer_range=0.25, **MODELS[model_type])
    adapters = {
        name: random_adapter(model, tmp_path / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 100, (length,), generator=generator).tolist() for length in (3, 17, 35)]
    prompts: dict[str | None, list[list[int]]] = dict.fromkeys((None, *adapters), texts)
    assert len(texts) == PROMPTS_EACH
    expected = {name: peft_greedy(model, adapters[name] if name else None, texts, NUM_TOKENS) for name in prompts}
    answers = [tuple(answer) for rows in expected.values() for answer in rows]
    assert len(set(answers)) == len(answers), "two adapters, or one and the base, answer alike"
    return Case(folder=tmp_path / "model", adapters=adapters, prompts=prompts, expected=expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_mixed_batches_equal_peft(tmp_path: Path, model_type: str) -> None:
    case = make_case(model_type, tmp_path)
    for joining, max_step_tokens in ((15, 512), (2, 24)):
        engine = make_engine(case, num_pages=400, max_step_tokens=max_step_tokens)
        assert case.wrong(serve(engine, case.requests(), joining)) == set()
        engine.core.close()
