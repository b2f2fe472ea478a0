"""config.json into an architecture, and what is refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    assert (found.tie_word_embeddings, found.bos_token_id, found.name) == (False, 1, tmp_path.name)
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
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", []),
        ("model_type", "gemma"),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}),
        ("rope_parameters", []),
        ("attention_bias", True),
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
        ("tie_word_embeddings", 1),
        ("eos_token_id", [-1]),
        ("eos_token_id", 2.5),
    ],
)
def test_anything_not_served_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        read_architecture(write(tmp_path, **{key: value}))


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
    assert fingerprint(write(tmp_path, vocab_size=301)) != first
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    second = fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_families_load_no_torch() -> None:
    script = "import sys, lorasrv.model.families; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
