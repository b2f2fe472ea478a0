"""A base model of random weights on disk, from a seed, that any server can load: what peers are compared on.

Its vocabulary is byte-level, and its words are four letters behind a space. Rows of the output head for all else
are zero, so that greedy answers are words alone: a text says its tokens, and no answer ends early.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

Size = Literal["125m", "tiny"]
_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 1024,
    }
)
CONFIGS: Mapping[Size, Mapping[str, Any]] = MappingProxyType(
    {
        "125m": {
            **_COMMON,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "vocab_size": 26_000,
        },
        "tiny": {
            **_COMMON,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 600,
        },
    }
)
BOS, EOS = 256, 257
# A vocabulary without a merge is none to llama.cpp.
MERGED = 258
FIRST_WORD = 259
# As byte-level vocabularies write it.
SPACE = "\u0120"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_model(folder: Path, size: Size, seed: int) -> Path:
    """A Hugging Face folder with weights in bfloat16, so that those who compute in float32 have the same values."""
    config = write_config(folder, size)
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = _tokenizer(config["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")
    return folder


def write_config(folder: Path, size: Size, **changed: Any) -> Mapping[str, Any]:
    """The folder with the config alone, which is enough for dummy weights; and the config."""
    folder.mkdir(parents=True)
    config = {**CONFIGS[size], "bos_token_id": BOS, "eos_token_id": EOS, "dtype": "bfloat16", **changed}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def word(token_id: int) -> str:
    """The four letters of a word's token."""
    number, letters = token_id - FIRST_WORD, ""
    for _ in range(4):
        number, place = divmod(number, len(LETTERS))
        letters = LETTERS[place] + letters
    return letters


def tokens_of_text(text: str) -> tuple[int, ...] | None:
    """The tokens of an answer that is words alone; None where it is not."""
    found: list[int] = []
    for letters in text.split():
        if len(letters) != 4 or not set(letters) <= set(LETTERS):
            return None
        number = 0
        for letter in letters:
            number = number * len(LETTERS) + LETTERS.index(letter)
        found.append(number + FIRST_WORD)
    return tuple(found)


def _weights(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    hidden, inner, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        # As at initialisation: outputs deviate as much as inputs.
        return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).bfloat16()

    head = draw(vocab, hidden)
    head[:FIRST_WORD] = 0
    tensors = {"model.embed_tokens.weight": draw(vocab, hidden), "lm_head.weight": head}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def _tokenizer(vocab_size: int) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate(letters)} | {"<s>": BOS, "</s>": EOS}
    vocab |= {SPACE + word(token_id): token_id for token_id in range(FIRST_WORD, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {"aa": MERGED}, merges=[("a", "a")]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
