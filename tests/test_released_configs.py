"""The config.json of released models, by their keys and values, old versions of transformers and new."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasrv.model.families import read_architecture
from lorasrv.model.rope_config import DefaultRope, Llama3Rope, YarnRope

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
}


def config(model_type: str, *sizes: int, **others: Any) -> dict[str, Any]:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    kind = {"architectures": [f"{names[model_type]}ForCausalLM"], "model_type": model_type}
    return COMMON | kind | dict(zip(keys, sizes, strict=True)) | others


LLAMA_31_8B = config(
    *("llama", 4096, 14336, 32, 32, 8),
    attention_bias=False,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    max_position_embeddings=131072,
    mlp_bias=False,
    pretraining_tp=1,
    rope_scaling={
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    rope_theta=500000.0,
    vocab_size=128256,
)
MISTRAL_7B_V1 = config(
    *("mistral", 4096, 14336, 32, 32, 8),
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=32768,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=32000,
)
MISTRAL_NEMO = config(
    *("mistral", 5120, 14336, 40, 32, 8),
    _name_or_path="mistralai/Mistral-Nemo-Base-2407",
    bos_token_id=1,
    eos_token_id=2,
    head_dim=128,
    max_position_embeddings=128000,
    rope_theta=1000000.0,
    sliding_window=None,
    vocab_size=131072,
)
QWEN_25_32B_YARN = config(
    *("qwen2", 5120, 27648, 64, 40, 8),
    bos_token_id=151643,
    eos_token_id=151645,
    max_position_embeddings=32768,
    max_window_layers=70,
    rope_theta=1000000.0,
    rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    sliding_window=131072,
    use_mrope=False,
    use_sliding_window=False,
    vocab_size=152064,
)
QWEN_3_06B = config(
    *("qwen3", 1024, 3072, 28, 16, 8),
    attention_bias=False,
    bos_token_id=151643,
    eos_token_id=151645,
    head_dim=128,
    max_position_embeddings=40960,
    max_window_layers=28,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
)
QWEN_3_06B_BY_TRANSFORMERS_5 = {key: value for key, value in QWEN_3_06B.items() if not key.startswith("rope")} | {
    "layer_types": ["full_attention"] * 28,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}
YARN = YarnRope(
    theta=1e6,
    factor=4.0,
    original_tokens=32768,
    attention_factor=None,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
)
LLAMA3 = Llama3Rope(theta=5e5, factor=8.0, original_tokens=8192, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    ("raw", "rope", "context_tokens", "head_dim", "window"),
    [
        (LLAMA_31_8B, LLAMA3, 131072, 128, None),
        (MISTRAL_7B_V1, DefaultRope(theta=1e4), 32768, 128, 4096),
        (MISTRAL_NEMO, DefaultRope(theta=1e6), 128000, 128, None),
        (QWEN_25_32B_YARN, YARN, 131072, 128, None),
        (QWEN_3_06B, DefaultRope(theta=1e6), 40960, 128, None),
        (QWEN_3_06B_BY_TRANSFORMERS_5, DefaultRope(theta=1e6), 40960, 128, None),
    ],
)
def test_is_read(
    tmp_path: Path, raw: dict[str, Any], rope: object, context_tokens: int, head_dim: int, window: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = read_architecture(tmp_path)
    assert (found.rope, found.context_tokens, found.head_dim) == (rope, context_tokens, head_dim)
    assert set(found.windows) == {window}
    assert found.num_layers == raw["num_hidden_layers"] == len(found.windows)
    assert (found.qkv_bias, found.o_bias) == (raw["model_type"] == "qwen2", False)
