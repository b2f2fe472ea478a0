"""Checkpoints into weights: values, refusals by name, and peak host memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasrv.errors import UnsupportedModel
from lorasrv.model.families import Architecture, read_architecture
from lorasrv.model.loader import ModelWeights, dummy_weights, load_weights
from peft_models import random_llama, random_model

CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_weights(folder, read_architecture(folder), dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_stacking(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    model = random_llama(tmp_path)
    torch.nn.Module.to(model, stored)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    weights, state = load(tmp_path, dtype), model.state_dict()
    for index, layer in enumerate(weights.layers):
        at = f"model.layers.{index}."
        parts = [state[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"]
        assert torch.equal(layer.qkv, torch.cat(parts).to(dtype))
        parts = [state[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(layer.gate_up, torch.cat(parts).to(dtype))
        assert torch.equal(layer.o, state[f"{at}self_attn.o_proj.weight"].to(dtype))
        assert torch.equal(layer.down, state[f"{at}mlp.down_proj.weight"].to(dtype))
        assert torch.equal(layer.input_norm, state[f"{at}input_layernorm.weight"].to(dtype))
        assert torch.equal(layer.post_attention_norm, state[f"{at}post_attention_layernorm.weight"].to(dtype))
    assert torch.equal(weights.embed, state["model.embed_tokens.weight"].to(dtype))
    assert torch.equal(weights.lm_head, state["lm_head.weight"].to(dtype))
    assert torch.equal(weights.norm, state["model.norm.weight"].to(dtype))


@pytest.mark.parametrize(("model_type", "settings"), [("qwen2", {}), ("qwen3", {"attention_bias": True})])
def test_biases_and_norms_of_queries_and_keys(tmp_path: Path, model_type: str, settings: dict[str, Any]) -> None:
    state = random_model(tmp_path, model_type, head_dim=8, **settings).state_dict()
    assert sum(name.endswith("bias") for name in state) == (6 if model_type == "qwen2" else 8)
    for index, layer in enumerate(load(tmp_path).layers):
        at = f"model.layers.{index}.self_attn."
        assert layer.qkv_bias is not None
        assert torch.equal(layer.qkv_bias, torch.cat([state[f"{at}{name}_proj.bias"] for name in "qkv"]))
        if model_type == "qwen2":
            assert layer.o_bias is None and layer.qk_norms is None
        else:
            assert layer.o_bias is not None and layer.qk_norms is not None
            assert torch.equal(layer.o_bias, state[f"{at}o_proj.bias"])
            for mine, name in zip(layer.qk_norms, ("q_norm", "k_norm"), strict=True):
                assert torch.equal(mine, state[f"{at}{name}.weight"])


def test_a_missing_bias_or_norm_is_named(tmp_path: Path) -> None:
    random_model(tmp_path, "qwen3", attention_bias=True)
    edit(tmp_path, model__layers__0__self_attn__k_norm__weight=None, model__layers__1__self_attn__o_proj__bias=None)
    named = r"lacks 2 tensors: model\.layers\.0\.self_attn\.k_norm\.weight, model\.layers\.1\.self_attn\.o_proj\.bias"
    with pytest.raises(UnsupportedModel, match=named):
        load(tmp_path)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    random_llama(tmp_path, tie_word_embeddings=True)
    weights = load(tmp_path)
    assert weights.lm_head is weights.embed


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of model.safetensors; `__` in a name stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        if value is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    random_llama(tmp_path)
    edit(tmp_path, model__norm__weight=torch.ones(47))
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight has shape \[47\].*\[48\]"):
        load(tmp_path)
    edit(tmp_path, model__norm__weight=torch.ones(48, dtype=torch.int32))
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight has dtype I32"):
        load(tmp_path)
    edit(tmp_path, model__norm__weight=None)
    with pytest.raises(UnsupportedModel, match=r"lacks 1 tensors: model\.norm\.weight"):
        load(tmp_path)
    edit(tmp_path, model__norm__weight=torch.ones(48), model__layers__0__self_attn__q_proj__bias=torch.ones(48))
    with pytest.raises(UnsupportedModel, match=r"not expected: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(tmp_path)


def test_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    random_llama(tmp_path)
    edit(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    load(tmp_path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    random_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content in (
        b"",
        b"\x01",
        (1 << 63).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"[" + whole[9:],
        whole[:-4],
    ):
        file.write_bytes(content)
        with pytest.raises(UnsupportedModel):
            load(tmp_path)
    file.unlink()
    with pytest.raises(UnsupportedModel, match=r"neither model\.safetensors nor"):
        load(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "absent.safetensors", ""])
def test_an_index_names_files_of_the_folder_only(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "model"
    random_llama(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UnsupportedModel, match=r"no file of the model folder"):
        load(folder)


def test_dummy_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    random_llama(tmp_path)
    architecture = read_architecture(tmp_path)
    first, again, other = (dummy_weights(architecture, torch.float32, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[1].gate_up, again.layers[1].gate_up)
    assert not torch.equal(first.layers[1].gate_up, other.layers[1].gate_up)
    assert 0.015 < first.embed.std().item() < 0.025
    assert bool((first.norm == 1).all())


def test_dummy_biases_are_zero(tmp_path: Path) -> None:
    random_model(tmp_path, "qwen3", attention_bias=True)
    layer = dummy_weights(read_architecture(tmp_path), torch.float32, CPU, 1).layers[1]
    assert layer.qkv_bias is not None and layer.o_bias is not None and layer.qk_norms is not None
    assert not layer.qkv_bias.any() and not layer.o_bias.any()
    assert all(bool((norm == 1).all()) for norm in layer.qk_norms)


PEAK_SCRIPT = """
import sys, torch
from lorasrv.model.families import read_architecture
from lorasrv.model.loader import load_weights

def peak_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.zeros(8).bfloat16().float()
before = peak_bytes()
load_weights(sys.argv[1], read_architecture(sys.argv[1]), getattr(torch, sys.argv[2]), torch.device("cpu"))
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_model_and_a_chunk(tmp_path: Path, dtype: str) -> None:
    save_big_model(tmp_path)
    files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert files > 250 << 20
    model_bytes = files if dtype == "float32" else files // 2
    command = [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path), dtype]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 * model_bytes < peak < model_bytes + (128 << 20)


def save_big_model(folder: Path) -> None:
    """About 290 MB in fp32, in two files, one tensor larger than a chunk."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 18000,
    }
    (folder / "config.json").write_text(json.dumps(config))
    architecture: Architecture = read_architecture(folder)
    features = {path: (out, into) for path, into, out in architecture.module_shapes()}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (1024,))
    layers = {
        f"model.layers.{layer}.{path}.weight": torch.ones(shape)
        for layer in range(3)
        for path, shape in (features | norms).items()
    }
    ends = {"model.embed_tokens.weight": torch.ones(18000, 1024), "lm_head.weight": torch.ones(18000, 1024)}
    ends["model.norm.weight"] = torch.ones(1024)
    save_file(layers, folder / "layers.safetensors")
    save_file(ends, folder / "ends.safetensors")
    weight_map = dict.fromkeys(layers, "layers.safetensors") | dict.fromkeys(ends, "ends.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
