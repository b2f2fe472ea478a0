"""The model shapes that the GPU benchmark knows: integers, and the config.json that a model of random weights needs."""

from lorasrv.model.shape import ModelShape

# Modules that share an input, by their places in the directory: q k v o gate up down.
GROUPS = {"qkv": (0, 1, 2), "o": (3,), "gate_up": (4, 5), "down": (6,)}


def llama_config(shape: ModelShape, context_tokens: int) -> dict[str, object]:
    """A config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": context_tokens,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }


LLAMA_8B = ModelShape(
    name="8b",
    hidden=4096,
    intermediate=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
# What one of eight tensor-parallel ranks holds of a 70B.
LLAMA_70B_TP8 = ModelShape(
    name="70b-tp8",
    hidden=8192,
    intermediate=3584,
    num_layers=80,
    num_heads=8,
    num_kv_heads=1,
    head_dim=128,
    vocab_size=128256,
)
SMALL = ModelShape(
    name="small",
    hidden=256,
    intermediate=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
)
TINY = ModelShape(
    name="tiny",
    hidden=64,
    intermediate=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,
)
