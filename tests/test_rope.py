"""Rotary positions: transformers' bits for every kind, at real sizes and lengths, and what config.json may say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lorasrv.errors import UnsupportedModel
from lorasrv.model.config_fields import Fields
from lorasrv.model.rope import Rotation
from lorasrv.model.rope_config import DefaultRope, DynamicRope, Rope, read_rope

MAX_POSITIONS = 4096
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn_attention_factor": YARN | {"attention_factor": 1.7, "mscale": 0.5, "mscale_all_dim": 0.3},
    "yarn_mscales": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn_one_mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0},
    "yarn_betas": YARN | {"beta_fast": 16, "beta_slow": 2.5},
    "yarn_untruncated": YARN | {"truncate": False},
    "yarn_of_the_ratio": YARN | {"factor": None},
    "yarn_of_max_positions": {"rope_type": "yarn", "factor": 3},
    "yarn_of_one_ramp_point": YARN | {"beta_fast": 8.0, "beta_slow": 8.0, "truncate": False},
    "llama3": LLAMA3,
    "llama3_of_max_positions": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    "llama3_odd": LLAMA3 | {"low_freq_factor": 1.7, "high_freq_factor": 9, "factor": 3},
}


def read(max_positions: int = MAX_POSITIONS, **config: Any) -> tuple[Rope, int]:
    return read_rope(Fields(where="config.json", values=json.loads(json.dumps(config))), max_positions)


def transformers_config(rope: dict[str, Any], theta: float = 5e5, head_dim: int = 128) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=rope | {"rope_theta": theta},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("theta", "head_dim"), [(5e5, 128), (1e4, 64)])
@pytest.mark.parametrize("name", KINDS)
def test_rotations_are_transformers_to_the_bit(name: str, theta: float, head_dim: int, dtype: torch.dtype) -> None:
    config = transformers_config(KINDS[name], theta, head_dim)
    last = MAX_POSITIONS - 1 if name == "dynamic" else 131071
    positions = torch.tensor([0, 1, 2, 63, 1023, 1024, 4000, last])
    want = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions.unsqueeze(0))
    rope, _ = read(rope_parameters=KINDS[name] | {"rope_theta": theta})
    got = Rotation(rope, head_dim, torch.device("cpu")).at(positions, dtype)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs[0, :, : head_dim // 2])


def test_a_dynamic_rotation_is_that_of_a_sequence_which_ends_there() -> None:
    config, rope = transformers_config(KINDS["dynamic"]), read(rope_theta=5e5, rope_scaling=KINDS["dynamic"])[0]
    positions = torch.tensor([7, 4095, 4096, 4097, 5000, 8191])
    cos, sin = Rotation(rope, 128, torch.device("cpu")).at(positions, torch.float32)
    for row, position in enumerate(positions.tolist()):
        inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=torch.tensor(position + 1))
        torch.testing.assert_close(cos[row], (position * inv_freq).cos(), atol=1e-3, rtol=0)
        torch.testing.assert_close(sin[row], (position * inv_freq).sin(), atol=1e-3, rtol=0)
    unscaled = Rotation(DefaultRope(theta=5e5), 128, torch.device("cpu")).at(positions, torch.float32)[0]
    assert [torch.equal(a, b) for a, b in zip(cos, unscaled, strict=True)] == [True, True, False, False, False, False]


@pytest.mark.parametrize("name", KINDS)
def test_old_and_new_files_say_the_same(name: str) -> None:
    new = read(rope_parameters=KINDS[name] | {"rope_theta": 3e5})
    assert read(rope_scaling=KINDS[name], rope_theta=3e5) == new
    old = {"type" if key == "rope_type" else key: value for key, value in KINDS[name].items()}
    assert read(rope_scaling=old, rope_theta=3e5) == new
    assert read(rope_scaling=old | KINDS[name] | {"rope_theta": 3e5}, rope_theta=7.0) == new
    assert read(rope_scaling=KINDS[name] | {"partial_rotary_factor": None}, rope_theta=3e5, rope_parameters={}) == new


def test_what_transformers_writes_is_read_as_it_was_meant(tmp_path: Path) -> None:
    for rope in KINDS.values():
        transformers_config(rope).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert read(rope_parameters=written["rope_parameters"]) == read(rope_scaling=rope, rope_theta=5e5)


@pytest.mark.parametrize(
    ("rope", "max_positions", "context_tokens"),
    [
        ({}, 4096, 4096),
        ({"rope_type": "linear", "factor": 2.5}, 4097, 10242),
        ({"rope_type": "dynamic", "factor": 2}, 4096, 8192),
        (YARN, 1024, 4096),  # Qwen2.5: the config keeps the length before scaling
        (YARN, 4096, 4096),  # DeepSeek: the config has the length after it
        (YARN, 1280, 4096),  # Qwen3: the original length and room for an answer
        (YARN, 5000, 5000),
        (LLAMA3, 131072, 131072),
        ({"rope_type": "linear", "factor": 1e308}, 4096, 2**31 - 1),
    ],
)
def test_the_tokens_that_a_sequence_may_have(rope: dict[str, Any], max_positions: int, context_tokens: int) -> None:
    assert read(max_positions, rope_scaling=rope)[1] == context_tokens


def test_dynamic_is_unscaled_up_to_max_position_embeddings() -> None:
    assert read(4096, rope_scaling=KINDS["dynamic"])[0] == DynamicRope(theta=1e4, factor=2.0, original_tokens=4096)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "longrope"),
        ({"type": "su"}, "'su'"),
        ({"rope_type": "mrope"}, "mrope"),
        ({"rope_type": ["yarn"]}, r"rope_type \['yarn'\]"),
        ({"rope_type": None}, "rope_type None"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "type is 'linear'"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"rope_type": "default", "factor": 2.0}, "factor 2.0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ({"rope_type": "linear"}, "factor is None"),
        ({"rope_type": "linear", "factor": 0.5}, r"factor is 0.5; .* >= 1"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'"),
        ({"rope_type": "linear", "factor": True}, "factor is True"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 0}, "rope_theta is 0"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}, "original_max_position"),
        ({"rope_type": "yarn"}, "factor is None"),
        (YARN | {"finetuned": True}, "finetuned True"),
        (YARN | {"truncate": 1}, "truncate is 1"),
        (YARN | {"attention_factor": -1.0}, r"attention_factor is -1.0; .* > 0"),
        (YARN | {"beta_fast": 0}, "beta_fast is 0"),
        (YARN | {"beta_fast": 1, "beta_slow": 2}, "beta_fast is 1"),
        (YARN | {"mscale": "1"}, "mscale is '1'"),
        (YARN | {"rope_theta": 1.0}, "rope_theta is 1; yarn needs it > 1"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        (LLAMA3 | {"low_freq_factor": None}, "low_freq_factor is None"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor is 1.0"),
        (LLAMA3 | {"beta_fast": 32}, "beta_fast 32"),
        ([], r"is \[\]"),
    ],
)
@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_anything_else_is_refused_by_name(where: str, rope: Any, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named) as caught:
        read(**{where: rope})
    assert where in str(caught.value)


def test_a_config_may_not_contradict_itself() -> None:
    with pytest.raises(UnsupportedModel, match=r"rope_scaling.*rope_parameters says otherwise"):
        read(rope_scaling=YARN, rope_parameters=LLAMA3)
    assert read(rope_scaling=YARN, rope_parameters=YARN) == read(rope_scaling=YARN)
    with pytest.raises(UnsupportedModel, match=r"partial_rotary_factor is 0.25"):
        read(partial_rotary_factor=0.25)
