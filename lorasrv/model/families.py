"""The model families served: what their config.json may say and how their weights are named. Standard library only.

A family is an entry of `FAMILIES`. A config that asks for anything the decoder does not compute exactly is refused by
name. Nothing in a config file is dereferenced as a path and no remote code is run.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from lorasrv.errors import UnsupportedModel

MODULE_PATHS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """Names of a checkpoint's tensors; `layer` is followed by a module path or a norm, and `.weight`."""

    embed: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    ignored_suffix: str = ".rotary_emb.inv_freq"  # a buffer that old checkpoints hold; recomputed

    def in_layer(self, layer: int, part: str) -> str:
        return f"{self.layer.format(layer=layer)}{part}.weight"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of the table. `required` maps a config key to the only value served, which is also its default."""

    names: WeightNames
    required: Mapping[str, object]
    default_rms_norm_eps: float
    default_rope_theta: float
    default_context_tokens: int
    default_tie_word_embeddings: bool


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        names=WeightNames(),
        required={
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "quantization_config": None,
            "auto_map": None,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
        },
        default_rms_norm_eps=1e-6,
        default_rope_theta=10000.0,
        default_context_tokens=2048,
        default_tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A base model's shape and constants, complete. `name` is its folder's name."""

    name: str
    architecture: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    def module_shapes(self) -> tuple[tuple[str, int, int], ...]:
        """(path, in_features, out_features) of every module LoRA can target, in directory order."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        features = (
            (self.hidden, query),
            (self.hidden, key_value),
            (self.hidden, key_value),
            (query, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        )
        return tuple((path, *shape) for path, shape in zip(MODULE_PATHS, features, strict=True))


def read_architecture(folder: str | Path) -> Architecture:
    """Read config.json and generation_config.json of a Hugging Face folder. Raises UnsupportedModel."""
    folder = Path(folder)
    config = _read_json(folder, "config.json")
    generation = _read_json(folder, "generation_config.json") if (folder / "generation_config.json").exists() else {}
    architecture, family = _family_of(config)
    _refuse_other_values(config, family)
    hidden, num_heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    found = Architecture(
        name=folder.resolve().name,
        architecture=architecture,
        num_layers=_positive(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_positive(config, "num_key_value_heads", num_heads),
        head_dim=_positive(config, "head_dim", hidden // num_heads),
        vocab_size=_positive(config, "vocab_size"),
        context_tokens=_positive(config, "max_position_embeddings", family.default_context_tokens),
        rms_norm_eps=_number(config, "rms_norm_eps", family.default_rms_norm_eps),
        rope_theta=_rope_theta(config, family),
        tie_word_embeddings=_flag(config, "tie_word_embeddings", family.default_tie_word_embeddings),
        eos_token_ids=_token_ids(generation, "eos_token_id") or _token_ids(config, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(generation, "bos_token_id") or _token_ids(config, "bos_token_id")), None),
    )
    if found.num_heads % found.num_kv_heads:
        raise UnsupportedModel(
            f"config.json: num_attention_heads {found.num_heads} is not a multiple of "
            f"num_key_value_heads {found.num_kv_heads}"
        )
    if found.head_dim % 2:
        raise UnsupportedModel(f"config.json: head_dim {found.head_dim} is odd; rotary embeddings need it even")
    return found


def fingerprint(folder: str | Path) -> str:
    """sha256, in hex, over what must agree for an adapter to fit: the architecture and the tokenizer's files."""
    folder = Path(folder)
    fields = asdict(read_architecture(folder))
    del fields["name"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            digest.update(f"\n{name} {content}".encode())
    return digest.hexdigest()


def _read_json(folder: Path, name: str) -> dict[str, object]:
    try:
        value = json.loads((folder / name).read_bytes())
    except OSError as error:
        raise UnsupportedModel(f"{name} of model {folder.name!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{name} of model {folder.name!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{name} of model {folder.name!r} is not a JSON object")
    return cast(dict[str, object], value)


def _family_of(config: Mapping[str, object]) -> tuple[str, Family]:
    listed = config.get("architectures")
    names = cast(list[object], listed) if isinstance(listed, list) else []
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in FAMILIES:
        raise UnsupportedModel(f"config.json: architectures {listed!r}; served are {', '.join(FAMILIES)}")
    return names[0], FAMILIES[names[0]]


def _refuse_other_values(config: Mapping[str, object], family: Family) -> None:
    for key, served in family.required.items():
        value = config.get(key, served)
        if value != served:
            raise UnsupportedModel(f"config.json: {key} {value!r} is not served; only {served!r} is")


def _rope_theta(config: Mapping[str, object], family: Family) -> float:
    """The base of the rotary frequencies: at the top level, or (transformers 5) inside `rope_parameters`."""
    theta = _number(config, "rope_theta", family.default_rope_theta)
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise UnsupportedModel(f"config.json: {key} {value!r} is not an object")
        rope = cast(dict[str, object], value)
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if kind != "default" or unknown or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(f"config.json: {key} {value!r} is not served; only the default rope is")
        theta = _number(rope, "rope_theta", theta)
    return theta


def _positive(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"config.json: {key} is {value!r}; it must be an integer >= 1")
    return value


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UnsupportedModel(f"config.json: {key} is {value!r}; it must be a finite number > 0")
    return float(value)


def _flag(config: Mapping[str, object], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise UnsupportedModel(f"config.json: {key} is {value!r}; it must be true or false")
    return value


def _token_ids(config: Mapping[str, object], key: str) -> tuple[int, ...]:
    """A token id field, which may be absent, null, one id or a list of ids."""
    value = config.get(key)
    listed = cast(list[object], value) if isinstance(value, list) else [] if value is None else [value]
    found: list[int] = []
    for item in listed:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise UnsupportedModel(f"{key} is {value!r}; it must be a token id or a list of them")
        found.append(item)
    return tuple(found)
