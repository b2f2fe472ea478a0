"""Which modules an adapter targets, at which rank and scale: what PEFT itself makes of the same folder."""

import json
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_files import ALL_TARGETS, llama_shapes, lora_config, lora_tensors, write_adapter
from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.errors import (
    AdapterError,
    BaseMismatch,
    ContentRefused,
    InvalidAdapter,
    RankTooLarge,
    UnsupportedFeature,
)
from lorasrv_adapters.manifest import CONFIG_FILE
from lorasrv_adapters.peft_config import MAX_REGEXES, parse_peft_config
from lorasrv_adapters.peft_format import AdapterSpec, validate_folder

NUM_LAYERS = 12
BASE = llama_shapes(layers=NUM_LAYERS, hidden=8, intermediate=12, heads=2, kv_heads=1)
PATHS = [BASE.module_key(layer, module) for layer in range(NUM_LAYERS) for module in range(len(BASE.modules))]
TARGETS: list[Any] = [
    "all-linear",
    "ALL-LINEAR",
    r".*\.(q|v)_proj",
    r"model\.layers\.(1|10|3)\.(self_attn|mlp)\..*_proj",
    r"model\.layers\.\d\.mlp\.(gate|down)_proj",
    r".*\b1[01]?\b.*proj",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up_proj)",
    ["q_proj", "v_proj"],
    ["self_attn.o_proj", "down_proj", "model.layers.11.mlp.up_proj"],
    ["model.layers.1.self_attn.k_proj", "layers.2.mlp.gate_proj", "2.mlp.up_proj"],
    list(ALL_TARGETS),
]
EXCLUDES: list[Any] = [
    None,
    None,
    ["lm_head"],
    ["v_proj", "layers.1.self_attn.q_proj"],
    ["model.layers.0.mlp.down_proj"],
    r".*layers\.(0|1)\..*",
    r".*\.1\d\..*",
]
PATTERN_KEYS = [
    "q_proj",
    "down_proj",
    "self_attn.v_proj",
    "layers.1.self_attn.q_proj",
    "^model.layers.1.mlp.down_proj",
    "^layers.1.mlp.down_proj",
    r"layers\.1\d\..*_proj",
    r"model\.layers\.[02468]\..*",
    r"(q|k|v)_proj",
    r".*mlp.*",
    "proj",
    ".*",
    "mlp.(gate|up)_proj$",
    r"\d+\.self_attn\.o_proj",
]


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """PEFT warns of keys and exclusions that match nothing, which is what some of these are for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tiny_llama(layers: int = NUM_LAYERS) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
    )
    return LlamaForCausalLM(config)


def random_config(rng: random.Random) -> LoraConfig:
    targets = rng.choice(TARGETS)
    layers: Any = None
    pattern: Any = None
    if isinstance(targets, list) and rng.random() < 0.6:
        layers = rng.choice([0, 3, [1], [0, 1, 10], [11, 2], []])
        pattern = rng.choice([None, "layers", ["h", "layers"], [], "model.layers", "la.*"])
    pattern = None if layers is None else pattern

    def some_keys() -> list[str]:
        return rng.sample(PATTERN_KEYS, rng.choice((0, 1, 2, 4)))

    return LoraConfig(
        r=rng.choice((1, 2, 5)),
        lora_alpha=rng.choice((1, 3, 16)),
        use_rslora=rng.random() < 0.5,
        target_modules=targets,
        exclude_modules=rng.choice(EXCLUDES),
        layers_to_transform=layers,
        layers_pattern=pattern,
        rank_pattern={key: rng.choice((1, 2, 3, 7)) for key in some_keys()},
        alpha_pattern={key: rng.choice((2, 5, 0.5)) for key in some_keys()},
        init_lora_weights=rng.choice((True, False, "gaussian")),
        task_type="CAUSAL_LM",
    )


def of_spec(spec: AdapterSpec, base: BaseShapes) -> dict[str, tuple[int, float]]:
    return {base.module_key(m.layer, m.module): (m.rank, m.scale) for m in spec.modules}


def of_peft(model: Any) -> dict[str, tuple[int, float]]:
    return {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def save_and_load(config: LoraConfig, folder: Path) -> dict[str, tuple[int, float]] | str:
    """What PEFT makes of its own folder, or why it does not."""
    with peft_warnings_ignored():
        try:
            get_peft_model(tiny_llama(), config).save_pretrained(str(folder))
            return of_peft(PeftModel.from_pretrained(tiny_llama(), str(folder)))
        except (ValueError, RuntimeError) as error:
            return str(error)


def test_random_configurations_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    """PEFT sorts a pattern's keys when it saves: where that changes a rank, PEFT cannot load its own file again."""
    rng = random.Random(7)
    torch.manual_seed(7)
    num_read = num_patterned = num_unloadable = 0
    for index in range(14):
        folder = tmp_path / str(index)
        expected = save_and_load(random_config(rng), folder)
        if isinstance(expected, str):
            if folder.exists():
                assert "size mismatch" in expected
                assert [type(reason) for reason in refusals(folder)] == [InvalidAdapter]
                num_unloadable += 1
            else:
                assert "target" in expected.lower()
            continue
        spec = validate_folder(folder, BASE, 256)
        assert of_spec(spec, BASE) == expected, (folder / CONFIG_FILE).read_text()
        ranks = [rank for rank, _ in expected.values()]
        assert (spec.rank_min, spec.rank_max) == (min(ranks), max(ranks))
        num_read += 1
        num_patterned += len(set(expected.values())) > 1
    assert num_read > 8 and num_patterned > 3 and num_unloadable > 0, (num_read, num_patterned, num_unloadable)


def test_many_configurations_select_what_peft_selects() -> None:
    """The functions by which PEFT decides, asked one by one of every module: no model, so many more configurations."""
    rng = random.Random(8)
    sizes: set[int] = set()
    for _ in range(300):
        peft: Any = random_config(rng)
        fields = {key: sorted(value) if isinstance(value, set) else value for key, value in peft.to_dict().items()}
        config, errors = parse_peft_config(json.dumps(fields).encode(), 256)
        assert config is not None, errors
        targeted = 0
        if str(peft.target_modules).lower() == "all-linear":
            peft.target_modules = set(PATHS)
        for path in PATHS:
            selected = config.targets.selects(path, int(path.split(".")[2]))
            assert selected == bool(check_target_module_exists(peft, path)), (path, fields)
            rank = peft.rank_pattern.get(get_pattern_key(list(peft.rank_pattern), path), peft.r)
            alpha = peft.alpha_pattern.get(get_pattern_key(list(peft.alpha_pattern), path), peft.lora_alpha)
            assert config.rank_and_scale(path) == (rank, alpha / (math.sqrt(rank) if peft.use_rslora else rank))
            targeted += selected
        sizes.add(targeted)
    assert {0, len(PATHS)} < sizes and len(sizes) > 20, sizes


def refusals(folder: Path, base: BaseShapes = BASE, max_rank: int = 256) -> tuple[AdapterError, ...]:
    with pytest.raises(ContentRefused) as refused:
        validate_folder(folder, base, max_rank)
    return refused.value.errors


def adapter(tmp_path: Path, keys: list[str] | None = None, rank: int = 2, **changes: Any) -> Path:
    """An adapter with tensors of these module paths, of q_proj everywhere if not given, whatever its configuration."""
    every = lora_tensors(BASE, list(ALL_TARGETS), rank)
    chosen = keys if keys is not None else [path for path in PATHS if path.endswith(".q_proj")]
    tensors = {name: t for name, t in every.items() if any(f".{key}.lora_" in name for key in chosen)}
    return write_adapter(tmp_path / "a", lora_config(**{"target_modules": ["q_proj"], **changes}), tensors)


def test_a_rank_pattern_over_the_maximum_names_the_limit(tmp_path: Path) -> None:
    folder = adapter(tmp_path, rank_pattern={"layers.3.self_attn.q_proj": 65, "v_proj": 10**30}, r=2)
    errors = refusals(folder, max_rank=64)
    assert [type(error) for error in errors] == [RankTooLarge, RankTooLarge]
    for part in ("rank_pattern", "layers.3.self_attn.q_proj", "65", "64"):
        assert part in str(errors[0])


@pytest.mark.parametrize(
    ("changes", "kind", "part"),
    [
        ({"rank_pattern": {"q_proj": 0}}, InvalidAdapter, "rank_pattern of 'q_proj': 0"),
        ({"rank_pattern": {"q_proj": 2.0}}, InvalidAdapter, "2.0"),
        ({"rank_pattern": {"q_proj": True}}, InvalidAdapter, "True"),
        ({"rank_pattern": {"q_proj": "2"}}, InvalidAdapter, "'2'"),
        ({"rank_pattern": [["q_proj", 2]]}, InvalidAdapter, "rank_pattern"),
        ({"rank_pattern": {"(q_proj": 2}}, UnsupportedFeature, "missing )"),
        ({"rank_pattern": {"(?=q)q_proj": 2}}, UnsupportedFeature, "(?=q)q_proj"),
        ({"rank_pattern": {str(i): 2 for i in range(5000)}}, UnsupportedFeature, "2048"),
        ({"alpha_pattern": {"q_proj": 0}}, InvalidAdapter, "alpha_pattern of 'q_proj': 0"),
        ({"alpha_pattern": {"q_proj": 65537}}, InvalidAdapter, "65536"),
        ({"alpha_pattern": {"q_proj": None}}, InvalidAdapter, "None"),
        ({"alpha_pattern": {"../../q_proj": 2}}, InvalidAdapter, "path"),
        ({"target_modules": "/etc/passwd"}, InvalidAdapter, "path"),
        ({"target_modules": ".*(q_proj"}, UnsupportedFeature, "missing )"),
        ({"target_modules": r".*(q)_proj\1"}, UnsupportedFeature, r"holds '\\1'"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, InvalidAdapter, "layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": []}, InvalidAdapter, "layers_to_transform"),
        ({"target_modules": "all-linear", "layers_pattern": ""}, InvalidAdapter, "layers_pattern"),
        ({"layers_pattern": "layers"}, InvalidAdapter, "layers_pattern"),
        ({"layers_pattern": [3], "layers_to_transform": [0]}, InvalidAdapter, "layers_pattern"),
        ({"layers_pattern": "a|b", "layers_to_transform": [0]}, UnsupportedFeature, "layers_pattern"),
        ({"layers_to_transform": [-1]}, InvalidAdapter, "layers_to_transform"),
        ({"layers_to_transform": [1.0]}, InvalidAdapter, "layers_to_transform"),
        ({"layers_to_transform": "0"}, InvalidAdapter, "layers_to_transform"),
        ({"layers_to_transform": True}, InvalidAdapter, "layers_to_transform"),
        ({"exclude_modules": {"v_proj": 1}}, InvalidAdapter, "exclude_modules"),
        ({"exclude_modules": ["v_proj", 3]}, InvalidAdapter, "exclude_modules"),
        ({"exclude_modules": "(v_proj"}, UnsupportedFeature, "missing )"),
        ({"target_modules": "(.{0,900}){900}"}, UnsupportedFeature, "repetition size"),
    ],
)
def test_refused_by_name(tmp_path: Path, changes: dict[str, Any], kind: type[AdapterError], part: str) -> None:
    (error,) = refusals(adapter(tmp_path, **changes))
    assert type(error) is kind
    assert part in str(error)


def test_a_flood_of_bad_pattern_keys_is_cut(tmp_path: Path) -> None:
    assert len(refusals(adapter(tmp_path, rank_pattern={f"({index}": 0 for index in range(MAX_REGEXES)}))) < 25


def test_layers_beyond_the_base_are_another_base(tmp_path: Path) -> None:
    (error,) = refusals(adapter(tmp_path, PATHS[:1], layers_to_transform=[0, 12, 40]))
    assert type(error) is BaseMismatch
    for part in ("12", "40", "12 layers"):
        assert part in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "q_proj"},
        {"target_modules": r"model\.layers\.12\..*"},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": ".*"},
        {"layers_to_transform": 3, "layers_pattern": "blocks"},
    ],
)
def test_an_adapter_that_targets_nothing_is_never_the_bare_base(tmp_path: Path, changes: dict[str, Any]) -> None:
    (error,) = refusals(adapter(tmp_path, [], **changes))
    assert type(error) is UnsupportedFeature
    assert "targets no module" in str(error)


def test_an_excluded_name_may_be_one_that_is_not_served(tmp_path: Path) -> None:
    folder = adapter(tmp_path, target_modules=["q_proj", "lm_head", "x.y"], exclude_modules=["lm_head", "y"])
    assert len(validate_folder(folder, BASE).modules) == NUM_LAYERS
    (error,) = refusals(adapter(tmp_path, target_modules=["q_proj", "lm_head"], exclude_modules=["head"]))
    assert "lm_head" in str(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": ["layers.5.self_attn.q_proj"]},
        {"target_modules": r".*\.[0-9]\.self_attn\.q_proj"},
    ],
)
def test_tensors_and_configuration_agree_on_the_layers(tmp_path: Path, changes: dict[str, Any]) -> None:
    """All layers have tensors, some are not targeted; then one layer too few has them."""
    (error,) = refusals(adapter(tmp_path, **changes))
    assert type(error) is UnsupportedFeature
    assert "no targeted module" in str(error)
    two_layers: dict[str, Any] = {"layers_to_transform": [0, 1]}
    if "target_modules" in changes:
        two_layers = {"target_modules": r".*\.[01]\..*q_proj"}
    (error,) = refusals(adapter(tmp_path, PATHS[7:8], **{**changes, **two_layers}))
    assert type(error) is InvalidAdapter
    assert "layers.0.self_attn.q_proj.lora_A" in str(error)


def test_tensors_and_configuration_agree_on_the_ranks(tmp_path: Path) -> None:
    (error,) = refusals(adapter(tmp_path, rank_pattern={r"layers\.3\..*": 3}))
    assert type(error) is InvalidAdapter
    assert "layers.3.self_attn.q_proj.lora_A.weight is [2, 8] at r=3" in str(error)
    assert "layers.4" not in str(error)


def test_the_first_key_that_matches_wins(tmp_path: Path) -> None:
    folder = adapter(tmp_path, alpha_pattern={"layers.1.self_attn.q_proj": 6, "q_proj": 8, ".*": 10}, lora_alpha=1)
    scales = {m.layer: m.scale for m in validate_folder(folder, BASE).modules}
    assert scales == {layer: 3.0 if layer == 1 else 4.0 for layer in range(NUM_LAYERS)}


def test_an_evil_pattern_is_read_at_once(tmp_path: Path) -> None:
    folder = adapter(tmp_path, rank_pattern={"(.*)*(.*)*!": 3, r"((\w+\.?)+)+!": 4}, exclude_modules="(.*.*)*x")
    assert len(validate_folder(folder, BASE).modules) == NUM_LAYERS


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_shifting_initialisation_is_served_once_converted(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    base = tiny_llama(2)
    shapes = llama_shapes(layers=2, hidden=8, intermediate=12, heads=2, kv_heads=1)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        init_lora_weights=kind,
        rank_pattern={"1.self_attn.q_proj": 3},
        task_type="CAUSAL_LM",
    )
    with peft_warnings_ignored():
        model: Any = get_peft_model(base, config)
        model.peft_config["default"].init_lora_weights = True
        start = str(tmp_path / "start")
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = kind
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(str(tmp_path / "raw"))
        model.save_pretrained(
            str(tmp_path / "served"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    (error,) = refusals(tmp_path / "raw", shapes)
    assert type(error) is UnsupportedFeature
    assert f"init_lora_weights='{kind}'" in str(error)
    assert json.loads((tmp_path / "served" / CONFIG_FILE).read_text())["init_lora_weights"] is True
    spec = validate_folder(tmp_path / "served", shapes)
    assert [(m.rank, m.scale) for m in spec.modules] == [(4, 3.0), (6, 2.0)]
