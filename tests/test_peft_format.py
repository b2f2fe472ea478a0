"""PEFT folders: what PEFT saves is read exactly; what is not served exactly is refused by name."""

import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_files import (
    ALL_TARGETS,
    Tensor,
    llama_shapes,
    lora_config,
    lora_tensors,
    safetensors_bytes,
    write_adapter,
)
from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.errors import (
    AdapterError,
    BaseMismatch,
    ContentRefused,
    InvalidAdapter,
    MalformedFile,
    RankTooLarge,
    UnsupportedFeature,
)
from lorasrv_adapters.manifest import CONFIG_FILE, WEIGHTS_FILE
from lorasrv_adapters.peft_config import parse_peft_config
from lorasrv_adapters.peft_format import AdapterSpec, read_spec, validate_bytes, validate_folder
from lorasrv_adapters.published import open_bytes, open_folder
from lorasrv_adapters.safetensors_header import TensorEntry, iter_tensor
from lorasrv_adapters.values import bad_values

BASE = llama_shapes()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def tiny_llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=32,
        )
    )


def refusals(folder: Path, base: BaseShapes = BASE, max_rank: int = 256) -> tuple[AdapterError, ...]:
    with pytest.raises(ContentRefused) as refused:
        validate_folder(folder, base, max_rank)
    for error in refused.value.errors:
        assert str(folder) not in str(error)
        assert str(error).isascii()
        assert str(error).isprintable()
    files = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    if all(file.is_file() for file in files):
        with pytest.raises(ContentRefused) as again:
            validate_bytes(*(file.read_bytes() for file in files), base, max_rank)
        assert str(again.value) == str(refused.value)
    return refused.value.errors


def refused_config(tmp_path: Path, **changes: Any) -> AdapterError:
    """The only reason for which a configuration is refused whose tensors are fine."""
    folder = write_adapter(tmp_path / "a", lora_config(**changes), lora_tensors(BASE, ["q_proj", "down_proj"], 2))
    (error,) = refusals(folder)
    return error


def accepted(tmp_path: Path, **changes: Any) -> AdapterSpec:
    folder = write_adapter(tmp_path / "a", lora_config(**changes), lora_tensors(BASE, ["q_proj", "down_proj"], 2))
    return validate_folder(folder, BASE)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("seed", range(8))
def test_what_peft_saves_is_read_exactly(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rank = (1, 3, 8, 64, 256)[seed % 5]
    heads = rng.choice((2, 4))
    shape: dict[str, Any] = {
        "layers": rng.randint(1, 3),
        "hidden": 8 * heads,
        "intermediate": rng.choice((24, 40)),
        "heads": heads,
        "kv_heads": rng.choice((1, heads)),
    }
    targets: str | list[str] = (
        "all-linear" if seed == 0 else sorted(rng.sample(ALL_TARGETS, rng.randint(1, len(ALL_TARGETS))))
    )
    rslora = seed % 2 == 1
    alpha = rng.choice((1, 16, 2 * rank))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        use_rslora=rslora,
        init_lora_weights=False,
        task_type=None if seed == 2 else "CAUSAL_LM",
    )
    model = get_peft_model(tiny_llama(**shape), config)
    model.save_pretrained(str(tmp_path))
    base = llama_shapes(**shape)

    spec = validate_folder(tmp_path, base)

    files = open_bytes(*((tmp_path / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)), base, 256)
    assert (files.spec, files.digest) == (spec, open_folder(tmp_path, base, 256).digest)
    assert (spec.rank_min, spec.rank_max) == (rank, rank)
    assert set(spec.target_modules) == (set(ALL_TARGETS) if targets == "all-linear" else set(targets))
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert {base.module_key(m.layer, m.module) for m in spec.modules} == layers.keys()
    assert [(m.layer, m.module) for m in spec.modules] == sorted((m.layer, m.module) for m in spec.modules)
    with (tmp_path / WEIGHTS_FILE).open("rb") as file:
        for module in spec.modules:
            layer = layers[base.module_key(module.layer, module.module)]
            assert module.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
            for entry, linears in ((module.a, layer.lora_A), (module.b, layer.lora_B)):
                values = np.frombuffer(b"".join(iter_tensor(file, entry)), dtype=np.float32).reshape(entry.shape)
                assert np.array_equal(values, linears.get_parameter("default.weight").detach().numpy())


def test_every_default_of_this_peft_is_accepted() -> None:
    fields = LoraConfig(target_modules=["q_proj"]).to_dict() | {"target_modules": ["q_proj"]}
    config, errors = parse_peft_config(json.dumps(fields).encode(), 256)
    assert config is not None
    assert not errors
    assert config.rank_and_scale("model.layers.0.self_attn.q_proj") == (8, 1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("task_type", "FEATURE_EXTRACTION"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("ensure_weight_tying", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", "unheard_of"),
        ("megatron_config", {"a": 1}),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", [1]),
        ("lora_ga_config", [1]),
        ("velora_config", {"x": 1}),
        ("monteclora_config", {"x": 1}),
        ("kasa_config", {"x": 1}),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["x"]),
        ("use_bdlora", {"nblocks": 1}),
        ("arrow_config", {"top_k": 1}),
        ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("invented_later", 1),
        ("invented_later", 0),
        ("invented_later", "x"),
    ],
)
def test_refuses_features_by_name(tmp_path: Path, key: str, value: object) -> None:
    error = refused_config(tmp_path, **{key: value})
    assert type(error) is UnsupportedFeature
    assert key in str(error)


def test_lists_all_refused_features_at_once(tmp_path: Path) -> None:
    error = refused_config(tmp_path, use_dora=True, modules_to_save=["x"], bias="all", invented_later=[1])
    for name in ("use_dora", "modules_to_save", "bias", "invented_later"):
        assert name in str(error)


def test_every_switch_of_peft_is_refused_when_on(tmp_path: Path) -> None:
    """Whatever PEFT adds is off by default and refused by name when it is on."""
    no_effect = {"inference_mode", "use_rslora", "init_lora_weights"}
    served = {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules"}
    switches = {key for key, value in LoraConfig().to_dict().items() if value is None or value is False or value == {}}
    labels = {"base_model_name_or_path", "revision", "task_type", "auto_mapping", "target_modules"}
    assert len(switches) > 25
    for key in switches - no_effect - labels - served:
        error = refused_config(tmp_path, **{key: True})
        assert type(error) is UnsupportedFeature
        assert key in str(error)
    assert served <= switches
    for key in served - {"layers_pattern"}:
        error = refused_config(tmp_path, **{key: True})
        assert type(error) is InvalidAdapter
        assert key in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "peft_version": "0.9.0",
            "inference_mode": True,
            "lora_dropout": 0.5,
            "revision": "main",
            "invented_later": None,
        },
        {"base_model_name_or_path": "../../etc/passwd"},
        {"base_model_name_or_path": None},
        {"init_lora_weights": "gaussian"},
        {
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
            }
        },
        {"auto_map": None},
        {"corda_config": {"corda_method": "kpm"}, "lora_ga_config": {"direction": "ArB2r"}},
        {
            "rank_pattern": {},
            "alpha_pattern": {},
            "exclude_modules": [],
            "layers_to_transform": [],
            "layers_pattern": [],
        },
        {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
        {"target_modules": [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.down_proj")]},
    ],
)
def test_accepts_what_does_not_change_inference(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert accepted(tmp_path, **changes).target_modules == ("q_proj", "down_proj")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "x--y.Z"}},
        {"trust_remote_code": True},
        {"peft_version": "../../x"},
        {"qalora_group_size": "/etc/x"},
        {"megatron_core": "https://x"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}},
    ],
)
def test_refuses_paths_and_remote_code(tmp_path: Path, changes: dict[str, Any]) -> None:
    error = refused_config(tmp_path, **changes)
    assert type(error) is InvalidAdapter
    assert next(iter(changes)) in str(error)


@pytest.mark.parametrize("rank", [0, -1, 2.0, "2", None, True, [2], 10**400])
def test_refuses_ranks(tmp_path: Path, rank: object) -> None:
    assert type(refused_config(tmp_path, r=rank)) is (RankTooLarge if rank == 10**400 else InvalidAdapter)


@pytest.mark.parametrize("alpha", [0, -1, 65537, 1e300, 10**400, "4", None, True])
def test_refuses_alphas(tmp_path: Path, alpha: object) -> None:
    assert type(refused_config(tmp_path, lora_alpha=alpha)) is InvalidAdapter


@pytest.mark.parametrize("rslora", [1, "true", None])
def test_refuses_rslora_that_is_no_bool(tmp_path: Path, rslora: object) -> None:
    assert type(refused_config(tmp_path, use_rslora=rslora)) is InvalidAdapter


def test_rank_over_the_limit_names_both(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", lora_config(r=9), lora_tensors(BASE, ["q_proj", "down_proj"], 9))
    (error,) = refusals(folder, max_rank=8)
    assert type(error) is RankTooLarge
    assert "9" in str(error)
    assert "8" in str(error)


def test_fractional_alpha_and_rslora_scale(tmp_path: Path) -> None:
    assert accepted(tmp_path, lora_alpha=0.5).modules[0].scale == 0.25
    assert accepted(tmp_path, lora_alpha=3, use_rslora=True).modules[0].scale == 3 / math.sqrt(2)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b'{"r":NaN}',
        b'{"r":Infinity}',
        b'{"lora_alpha":1e999}',
        b'{"r":1,"r":2}',
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b'{"r":' + b"1" * 5000 + b"}",
        b" " * ((1 << 20) + 1),
    ],
)
def test_refuses_configurations_that_are_not_strict_json(tmp_path: Path, config: bytes) -> None:
    folder = write_adapter(tmp_path / "a", config, lora_tensors(BASE, ["q_proj"], 2))
    (error,) = refusals(folder)
    assert type(error) is MalformedFile


@pytest.mark.parametrize("targets", [[], None, [""], [1], {"q_proj": 1}])
def test_refuses_target_modules_that_are_no_names(tmp_path: Path, targets: object) -> None:
    assert type(refused_config(tmp_path, target_modules=targets)) is InvalidAdapter


def test_unknown_targets_are_all_listed(tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj", "lm_head", "embed_tokens", "proj", "model.layers.7.self_attn.q_proj", "\u202ex"]
    error = refused_config(tmp_path, target_modules=targets)
    assert type(error) is UnsupportedFeature
    for name in ("lm_head", "embed_tokens", "proj", "model.layers.7.self_attn.q_proj", "\\u202ex"):
        assert name in str(error)


def test_adapter_name_in_tensor_names_is_tolerated(tmp_path: Path) -> None:
    plain = lora_tensors(BASE, ["q_proj", "down_proj"], 2)
    tensors = {name.replace(".weight", ".default.weight"): value for name, value in plain.items()}
    assert len(validate_folder(write_adapter(tmp_path / "a", lora_config(), tensors), BASE).modules) == 4
    twice = plain | {f"{Q0}.lora_A.default.weight": plain[f"{Q0}.lora_A.weight"]}
    (error,) = refusals(write_adapter(tmp_path / "a", lora_config(), twice))
    assert type(error) is InvalidAdapter
    assert "twice" in str(error)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(tmp_path: Path, side: str) -> None:
    tensors = lora_tensors(BASE, ["q_proj", "down_proj"], 2)
    del tensors[f"{Q0}.{side}.weight"]
    (error,) = refusals(write_adapter(tmp_path / "a", lora_config(), tensors))
    assert type(error) is InvalidAdapter
    assert f"layers.0.self_attn.q_proj.{side}" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        f"{Q0}.lora_magnitude_vector",
        f"{Q0}.lora_B.bias",
        f"{Q0}.base_layer.weight",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        f"{Q0}.lora_A.other.weight",
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_is_not_used_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = lora_tensors(BASE, ["q_proj", "down_proj"], 2) | {name: np.zeros((2, 16), dtype=np.float32)}
    (error,) = refusals(write_adapter(tmp_path / "a", lora_config(), tensors))
    assert type(error) is UnsupportedFeature
    assert name in str(error)


@pytest.mark.parametrize(
    ("side", "shape", "kind"),
    [
        ("lora_A", (2, 17), BaseMismatch),
        ("lora_A", (3, 16), InvalidAdapter),
        ("lora_A", (16, 2), BaseMismatch),
        ("lora_B", (17, 2), BaseMismatch),
        ("lora_B", (16, 3), InvalidAdapter),
        ("lora_A", (32,), BaseMismatch),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, side: str, shape: tuple[int, ...], kind: type[AdapterError]) -> None:
    tensors = lora_tensors(BASE, ["q_proj", "down_proj"], 2)
    tensors[f"{Q0}.{side}.weight"] = np.zeros(shape, dtype=np.float32)
    (error,) = refusals(write_adapter(tmp_path / "a", lora_config(), tensors))
    assert type(error) is kind
    assert f"{Q0}.{side}" in str(error)


def test_another_base_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", lora_config(), lora_tensors(BASE, ["q_proj", "down_proj"], 2))
    assert {type(error) for error in refusals(folder, llama_shapes(hidden=32))} == {BaseMismatch}
    assert {type(error) for error in refusals(folder, llama_shapes(layers=1))} == {UnsupportedFeature}
    assert {type(error) for error in refusals(folder, llama_shapes(layers=3))} == {InvalidAdapter}


def with_values(dtype: str, raw: bytes) -> dict[str, np.ndarray | Tensor]:
    """All weights fine but B of the first q_proj, `[16, 2]`, which holds `raw` again and again."""
    tensors: dict[str, np.ndarray | Tensor] = dict(lora_tensors(BASE, ["q_proj", "down_proj"], 2))
    tensors[f"{Q0}.lora_B.weight"] = (dtype, (16, 2), raw * 32)
    return tensors


MAX_BF16 = 0x7F7F0000


@pytest.mark.parametrize(
    ("dtype", "raw", "bad_for"),
    [
        ("F32", np.float32(np.nan).tobytes(), "both"),
        ("F32", np.float32(-np.inf).tobytes(), "both"),
        ("F32", np.float32(3.4e38).tobytes(), "bfloat16"),
        ("F32", np.uint32(MAX_BF16 + 0x8000).tobytes(), "bfloat16"),
        ("F32", np.uint32(MAX_BF16 + 0x7FFF).tobytes(), "none"),
        ("F32", np.float32(-0.0).tobytes(), "none"),
        ("F64", np.float64(1e39).tobytes(), "both"),
        ("F64", np.float64(np.nan).tobytes(), "both"),
        ("F64", np.float64(1.5).tobytes(), "none"),
        ("F16", np.float16(np.nan).tobytes(), "both"),
        ("F16", np.float16(np.inf).tobytes(), "both"),
        ("F16", np.float16(65504).tobytes(), "none"),
        ("BF16", np.uint16(0x7F80).tobytes(), "both"),
        ("BF16", np.uint16(0xFFC0).tobytes(), "both"),
        ("BF16", np.uint16(0x7F7F).tobytes(), "none"),
    ],
)
def test_values_that_the_serving_dtype_cannot_hold(tmp_path: Path, dtype: str, raw: bytes, bad_for: str) -> None:
    folder = write_adapter(tmp_path / "a", lora_config(), with_values(dtype, raw))
    for serving in ("float32", "bfloat16"):
        base = llama_shapes(dtype=serving)
        if bad_for in ("both", serving):
            (error,) = refusals(folder, base)
            assert type(error) is InvalidAdapter
            assert f"{Q0}.lora_B.weight" in str(error)
        else:
            assert len(validate_folder(folder, base).modules) == 4


NEAR_OVERFLOW = st.integers(MAX_BF16 + 0x7FF0, MAX_BF16 + 0x8010)


@settings(max_examples=100)
@given(NEAR_OVERFLOW | st.integers(0, (1 << 32) - 1), st.booleans())
def test_overflow_agrees_with_torch(bits: int, negative: bool) -> None:
    value = np.array([bits ^ (negative << 31)], dtype=np.uint32).view(np.float32)
    entry = TensorEntry(name="a", dtype="F32", shape=(1,), begin=0, end=4)
    errors = bad_values(io.BytesIO(value.tobytes()), [entry], "bfloat16")
    assert bool(errors) != bool(torch.tensor(value).to(torch.bfloat16).isfinite().all())


def test_a_late_nan_is_found_and_integers_are_refused(tmp_path: Path) -> None:
    tensors = lora_tensors(BASE, ["q_proj", "down_proj"], 2)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][15, 1] = np.nan
    (error,) = refusals(write_adapter(tmp_path / "a", lora_config(), tensors))
    assert "layers.1.mlp.down_proj.lora_B" in str(error)
    (error,) = refusals(write_adapter(tmp_path / "a", lora_config(), with_values("I8", b"\1")))
    assert type(error) is UnsupportedFeature
    assert "I8" in str(error)


def test_all_zero_adapter_is_accepted(tmp_path: Path) -> None:
    zeros = {name: np.zeros_like(value) for name, value in lora_tensors(BASE, ["q_proj", "down_proj"], 2).items()}
    assert len(validate_folder(write_adapter(tmp_path / "a", lora_config(), zeros), BASE).modules) == 4


def test_pickles_missing_files_and_pipes_are_refused(tmp_path: Path) -> None:
    pickled = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, pickled)
    (error,) = refusals(write_adapter(tmp_path / "a", lora_config(), pickled.getvalue()))
    assert type(error) is MalformedFile
    assert "pickle" in str(error)
    (tmp_path / "a" / WEIGHTS_FILE).rename(tmp_path / "a" / "adapter_model.bin")
    assert [type(error) for error in refusals(tmp_path / "a")] == [MalformedFile]
    (tmp_path / "a" / CONFIG_FILE).unlink()
    (tmp_path / "a" / CONFIG_FILE).mkdir()
    assert [type(error) for error in refusals(tmp_path / "a")] == [MalformedFile, MalformedFile]


def test_all_reasons_are_collected(tmp_path: Path) -> None:
    config = lora_config(r=0, lora_alpha=-1, use_dora=True, target_modules=[], auto_map={"a": "b"})
    errors = refusals(write_adapter(tmp_path / "a", config, safetensors_bytes({"a b": np.zeros((1, 1), np.float32)})))
    assert {type(error) for error in errors} == {InvalidAdapter, UnsupportedFeature, MalformedFile}
    assert len(errors) == 6


def test_what_is_kept_of_one_adapters_reading_serves_no_other(tmp_path: Path) -> None:
    """Equal headers and configurations have one spec; one byte else in either, or another limit, has its own."""
    base = llama_shapes()
    folders = {"first": lora_config(), "alike": lora_config(), "scaled": lora_config(lora_alpha=8)}
    for seed, (name, config) in enumerate(folders.items()):
        write_adapter(tmp_path / name, config, lora_tensors(base, config["target_modules"], 2, seed))
    files = {
        name: ((tmp_path / name / CONFIG_FILE).read_bytes(), (tmp_path / name / WEIGHTS_FILE).read_bytes())
        for name in folders
    }

    def spec_of(config: bytes, weights: bytes, max_rank: int = 256) -> AdapterSpec:
        return read_spec(config, io.BytesIO(weights), base, max_rank)

    specs = {name: spec_of(*each) for name, each in files.items()}
    assert files["first"][1] != files["alike"][1] and specs["alike"] is specs["first"]
    for name, spec in specs.items():
        assert spec == replace(validate_folder(tmp_path / name, base), serving=None)
    assert [m.scale for m in specs["scaled"].modules] == [2 * m.scale for m in specs["first"].modules]
    config, weights = files["first"]
    for wrong, limit in (((config, weights[:-1]), 256), ((config, weights + b"0"), 256), ((config, weights), 1)):
        with pytest.raises(ContentRefused):
            spec_of(*wrong, limit)
    assert spec_of(config, weights) == specs["first"]
