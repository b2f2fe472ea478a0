"""config.json into an architecture, and what is refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lorasrv.errors import UnsupportedModel
from lorasrv.model.families import MODULE_PATHS, fingerprint, read_architecture
from peft_models import random_llama

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def write(folder: Path, generation: dict[str, object] | None = None, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_fields_and_defaults(tmp_path: Path) -> None:
    found = read_architecture(write(tmp_path))
    assert (found.num_layers, found.hidden, found.num_heads, found.num_kv_heads, found.head_dim) == (3, 64, 8, 2, 8)
    assert (found.rope.theta, found.rms_norm_eps, found.context_tokens) == (1e4, 1e-6, 2048)
    assert (found.tie_word_embeddings, found.name) == (False, tmp_path.name)
    assert dict.fromkeys(MODULE_PATHS) == dict.fromkeys(path for path, _, _ in found.module_shapes())
    shapes = {path.split(".")[1]: tuple(rest) for path, *rest in found.module_shapes()}
    assert shapes["q_proj"] == (64, 64)
    assert shapes["k_proj"] == shapes["v_proj"] == (64, 16)
    assert shapes["o_proj"] == (64, 64)
    assert shapes["gate_proj"] == shapes["up_proj"] == (64, 96)
    assert shapes["down_proj"] == (96, 64)


def test_what_transformers_writes_is_read_back(tmp_path: Path) -> None:
    model = random_llama(tmp_path, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    found = read_architecture(tmp_path)
    assert (found.head_dim, found.rope.theta, found.vocab_size) == (12, 777.0, model.config.vocab_size)
    assert found.eos_token_ids == ()


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        (None, (2,)),
        ({}, (2,)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 8, 9]}, (7, 8, 9)),
    ],
)
def test_eos_ids(tmp_path: Path, generation: dict[str, object] | None, want: tuple[int, ...]) -> None:
    assert read_architecture(write(tmp_path, generation)).eos_token_ids == want


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_rope_theta_in_either_place(tmp_path: Path, where: str) -> None:
    assert read_architecture(write(tmp_path, rope_theta=5e5)).rope.theta == 5e5
    inside: dict[str, Any] = {where: {"rope_type": "default", "rope_theta": 3e5}}
    assert read_architecture(write(tmp_path, **inside)).rope.theta == 3e5
    assert read_architecture(write(tmp_path, **{where: None})).rope.theta == 1e4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["MixtralForCausalLM"]),
        ("architectures", ["Qwen2MoeForCausalLM"]),
        ("architectures", ["Phi3ForCausalLM"]),
        ("architectures", ["LlamaForCausalLM", "MistralForCausalLM"]),
        ("architectures", [1]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", []),
        ("model_type", "gemma"),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear"}),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}),
        ("rope_parameters", []),
        ("partial_rotary_factor", 0.5),
        ("attention_bias", 1),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention"] * 3),
        ("attention_sinks", True),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("per_layer_config", {"1": {"intermediate_size": 32}}),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("some_new_switch", False),
        ("is_encoder_decoder", True),
        ("rope_interleaved", True),
        ("num_hidden_layers", 2**31 - 1),
        ("hidden_size", 2**31),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": "remote.Model"}),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("hidden_size", 0),
        ("hidden_size", True),
        ("hidden_size", "64"),
        ("vocab_size", None),
        ("rms_norm_eps", -1.0),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**400),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", 1),
        ("eos_token_id", [-1]),
        ("eos_token_id", 2.5),
    ],
)
def test_anything_not_served_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        read_architecture(write(tmp_path, **{key: value}))


FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"attention_bias": True}, "attention_bias True"),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ("mistral", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen2", {"attention_bias": False}, "attention_bias False"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True"),
        ("qwen2", {"use_sliding_window": None}, "use_sliding_window is None"),
        ("qwen2", WINDOWED | {"max_window_layers": -1}, "max_window_layers is -1"),
        ("qwen2", WINDOWED | {"layer_types": ["full_attention"]}, "layer_types .* each of 3 layers"),
        ("qwen2", WINDOWED | {"layer_types": ["chunked_attention"] * 3}, "layer_types is .*chunked_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types .* use_sliding_window is false"),
        ("qwen3", WINDOWED | {"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "is null"),
        ("qwen3", WINDOWED | {"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ("qwen3", {"decoder_sparse_step": 1, "moe_intermediate_size": 768}, "decoder_sparse_step 1, moe_intermed"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quant_method': 'fp8'}"),
        ("qwen3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim 2 .* dynamic"),
    ],
)
def test_a_family_refuses_by_name_what_it_does_not_have(
    tmp_path: Path, model_type: str, changes: dict[str, Any], named: str
) -> None:
    changes = {"model_type": model_type, "num_hidden_layers": 3} | FAMILY_CONFIGS[model_type] | changes
    with pytest.raises(UnsupportedModel, match=named):
        read_architecture(write(tmp_path, **changes))


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        {"max_position_embeddings": 777, "rope_theta": 1e6, "eos_token_id": [3, 4], "bos_token_id": None},
        {"torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.1, "attention_dropout": 0.0},
        {"rope_scaling": None, "quantization_config": None, "some_new_switch": None, "mlp_bias": False},
        {"without": ("num_key_value_heads", "eos_token_id", "bos_token_id")},
    ],
)
def test_configs_are_read_as_transformers_reads_them(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    raw = CONFIG | {"model_type": model_type, "num_attention_heads": 32} | FAMILY_CONFIGS[model_type] | changes
    for key in raw.pop("without", ()):
        del raw[key]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found, theirs = read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert found.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (found.num_heads, found.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (found.context_tokens, found.rms_norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert (found.rope.kind, found.rope.theta) == ("default", theirs.rope_parameters["rope_theta"])
    eos = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert found.eos_token_ids == tuple(token for token in eos if token is not None)
    assert found.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_null_key_value_heads_are_as_many_as_heads(tmp_path: Path, model_type: str) -> None:
    """For Mistral transformers 5 refuses null; the versions before read it so for every family."""
    changes = {"model_type": model_type, "num_key_value_heads": None} | FAMILY_CONFIGS[model_type]
    assert read_architecture(write(tmp_path, **changes)).num_kv_heads == CONFIG["num_attention_heads"]


@pytest.mark.parametrize(
    ("model_type", "changes", "windows"),
    [
        ("llama", {}, (None, None, None)),
        ("mistral", {}, (4096, 4096, 4096)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": 7}, (7, 7, 7)),
        ("qwen2", {}, (None, None, None)),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1}, (None, None, None)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, (None, 4096, 4096)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7}, (None, None, None)),  # the first 28 are full
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None, None, None)),
        ("qwen3", WINDOWED, (None, None, 16)),
        ("qwen3", WINDOWED | {"max_window_layers": 0}, (16, 16, 16)),
        (
            "qwen3",
            WINDOWED | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            (16, None, None),
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 3, "sliding_window": None}, (None, None, None)),
    ],
)
def test_windows(tmp_path: Path, model_type: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    changes = {"model_type": model_type, "num_hidden_layers": 3} | FAMILY_CONFIGS[model_type] | changes
    assert read_architecture(write(tmp_path, **changes)).windows == windows
    if model_type.startswith("qwen"):
        theirs = AutoConfig.from_pretrained(tmp_path)
        sliding = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
        assert sliding == windows


@pytest.mark.parametrize(
    ("model_type", "changes", "biases"),
    [
        ("llama", {}, (False, False)),
        ("llama", {"attention_bias": True}, (True, True)),
        ("mistral", {}, (False, False)),
        ("qwen2", {}, (True, False)),
        ("qwen3", {}, (False, False)),
        ("qwen3", {"attention_bias": True}, (True, True)),
    ],
)
def test_biases(tmp_path: Path, model_type: str, changes: dict[str, Any], biases: tuple[bool, bool]) -> None:
    changes = {"model_type": model_type} | FAMILY_CONFIGS[model_type] | changes
    found = read_architecture(write(tmp_path, **changes))
    assert (found.qkv_bias, found.o_bias) == biases
    assert found.family.qk_norm == (model_type == "qwen3")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        read_architecture(tmp_path)


def test_a_missing_config_is_refused_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        read_architecture(tmp_path)
    assert "config.json" in str(caught.value)
    assert str(tmp_path.parent) not in str(caught.value)


def test_fingerprint_follows_config_and_tokenizer_alone(tmp_path: Path) -> None:
    first = fingerprint(write(tmp_path))
    assert len(first) == 64
    assert fingerprint(write(tmp_path, transformers_version="9", use_cache=False)) == first
    assert fingerprint(write(tmp_path, eos_token_id=[5, 6], bos_token_id=4)) == first
    assert fingerprint(write(tmp_path, vocab_size=301)) != first
    scaled = [
        fingerprint(write(tmp_path, max_position_embeddings=n, rope_scaling={"type": kind, "factor": 2.0}))
        for kind, n in (("linear", 1024), ("dynamic", 1024), ("dynamic", 2048))
    ]
    assert len({first, *scaled}) == 4
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    second = fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_families_load_no_torch() -> None:
    script = "import sys, lorasrv.model.families; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
