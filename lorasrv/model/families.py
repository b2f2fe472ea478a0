"""The model families served: what their config.json may say and how their weights are named. Standard library only.

A family is an entry of `FAMILIES`. A config that asks for anything the decoder does not compute exactly is refused by
name: every key is read, or may hold one value only, or is known to say nothing about the forward pass. Nothing in a
config file is dereferenced as a path and no remote code is run.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lorasrv.errors import UnsupportedModel
from lorasrv.model.config_fields import Fields, read_fields
from lorasrv.model.config_keys import FIXED, IGNORED, READ
from lorasrv.model.rope_config import ROPE_KEYS, Rope, read_rope

MODULE_PATHS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

MAX_LAYERS = 65536

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
    """Names of a checkpoint's tensors; `layer` is followed by a part, and `.weight` or `.bias`."""

    embed: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    ignored_suffix: str = ".rotary_emb.inv_freq"  # a buffer that old checkpoints hold; recomputed

    def in_layer(self, layer: int, part: str, kind: str = "weight") -> str:
        return f"{self.layer.format(layer=layer)}{part}.{kind}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of the table: how transformers reads the architecture's config, and what its layers have.

    `bias`: of q, k and v ("qkv"), or of q, k, v and o where the config has `attention_bias` ("config").
    `window`: `sliding_window` holds for every layer, or for those that `layer_types` names, or is not served.
    The defaults are those of a key that the config leaves out.
    """

    model_type: str
    default_context_tokens: int
    default_num_kv_heads: int | None  # None: as many as heads
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    default_eos_token_id: int | None = None
    bias: Literal["none", "qkv", "config"] = "none"
    qk_norm: bool = False
    window: Literal["none", "every_layer", "layer_types"] = "none"
    names: WeightNames = field(default_factory=WeightNames)


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        default_context_tokens=2048,
        default_num_kv_heads=None,
        default_eos_token_id=2,
        bias="config",
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        default_context_tokens=131072,
        default_num_kv_heads=8,
        default_eos_token_id=2,
        window="every_layer",
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        default_context_tokens=32768,
        default_num_kv_heads=32,
        bias="qkv",
        window="layer_types",
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        default_context_tokens=32768,
        default_num_kv_heads=32,
        default_head_dim=128,
        bias="config",
        qk_norm=True,
        window="layer_types",
    ),
}

_WINDOW_KEYS = {
    "none": frozenset[str](),
    "every_layer": frozenset({"sliding_window"}),
    "layer_types": frozenset({"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}),
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
    rope: Rope
    windows: tuple[int | None, ...]  # of every layer: the tokens that a token sees, itself included; None for all
    qkv_bias: bool
    o_bias: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

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
    config = read_fields(folder, "config.json")
    architecture, family = _family_of(config)
    _refuse_what_is_not_served(config, family)
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    rope, context_tokens = read_rope(config, config.integer("max_position_embeddings", family.default_context_tokens))
    has_bias = family.bias == "config" and config.flag("attention_bias", False)
    found = Architecture(
        name=folder.resolve().name,
        architecture=architecture,
        num_layers=num_layers,
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.optional_integer("num_key_value_heads", family.default_num_kv_heads) or num_heads,
        head_dim=config.integer("head_dim", family.default_head_dim or hidden // num_heads),
        vocab_size=config.integer("vocab_size"),
        context_tokens=context_tokens,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        windows=_windows(config, family, num_layers),
        qkv_bias=has_bias or family.bias == "qkv",
        o_bias=has_bias,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        eos_token_ids=_eos_token_ids(folder, config, family),
    )
    _refuse_impossible_heads(found)
    return found


def fingerprint(folder: str | Path) -> str:
    """sha256, in hex, over what must agree for an adapter to fit: the architecture and the tokenizer's files.

    What ends a generation may be edited later without making published adapters another base's.
    """
    folder = Path(folder)
    fields = asdict(read_architecture(folder))
    for name in ("name", "eos_token_ids"):
        del fields[name]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            digest.update(f"\n{name} {content}".encode())
    return digest.hexdigest()


def _family_of(config: Fields) -> tuple[str, Family]:
    names = config.names("architectures") or ()
    if len(names) != 1 or names[0] not in FAMILIES:
        raise config.refusal("architectures", f"served are {', '.join(FAMILIES)}")
    return names[0], FAMILIES[names[0]]


def _refuse_what_is_not_served(config: Fields, family: Family) -> None:
    config.refuse_unless({**FIXED, "model_type": family.model_type})
    known = READ | ROPE_KEYS | FIXED.keys() | IGNORED | _WINDOW_KEYS[family.window]
    config.refuse_unknown(known | {"attention_bias"} if family.bias == "config" else known)


def _windows(config: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Where `sliding_window` holds. Its default, 4096, is that of an absent key: null is no window."""
    if family.window == "none":
        return (None,) * num_layers
    if family.window == "every_layer":
        return (config.optional_integer("sliding_window", 4096),) * num_layers
    window = config.optional_integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    types = config.names("layer_types")
    if types is None:
        first = config.integer("max_window_layers", 28, least=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(types) != num_layers or not {"full_attention", "sliding_attention"}.issuperset(types):
        why = f"it must name full_attention or sliding_attention for each of {num_layers} layers"
        raise config.refusal("layer_types", why)
    if window is None and "sliding_attention" in types:
        raise config.refusal("layer_types", "use_sliding_window is false or sliding_window is null")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _eos_token_ids(folder: Path, config: Fields, family: Family) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's, or else config.json's."""
    found = config.token_ids("eos_token_id", family.default_eos_token_id)
    if not (folder / "generation_config.json").exists():
        return found
    return read_fields(folder, "generation_config.json").token_ids("eos_token_id") or found


def _refuse_impossible_heads(found: Architecture) -> None:
    if found.num_heads % found.num_kv_heads:
        raise UnsupportedModel(
            f"config.json: num_attention_heads {found.num_heads} is not a multiple of "
            f"num_key_value_heads {found.num_kv_heads}"
        )
    if found.head_dim % 2:
        raise UnsupportedModel(f"config.json: head_dim {found.head_dim} is odd; rotary embeddings need it even")
    if found.rope.kind == "dynamic" and found.head_dim < 4:
        raise UnsupportedModel(f"config.json: head_dim {found.head_dim} is too small for dynamic rope; it needs 4")
