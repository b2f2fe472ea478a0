"""The model shapes that the GPU benchmark knows: integers, and the config.json that a model of random weights needs."""

from dataclasses import dataclass

# Modules that share an input, by their places in the directory: q k v o gate up down.
GROUPS = {"qkv": (0, 1, 2), "o": (3,), "gate_up": (4, 5), "down": (6,)}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama's shape, or what one of several tensor-parallel ranks holds of it."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def module_shapes(self) -> tuple[tuple[str, int, int], ...]:
        """(name, in_features, out_features) in directory order."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            ("q", self.hidden, query),
            ("k", self.hidden, key_value),
            ("v", self.hidden, key_value),
            ("o", query, self.hidden),
            ("gate", self.hidden, self.intermediate),
            ("up", self.hidden, self.intermediate),
            ("down", self.intermediate, self.hidden),
        )

    @property
    def linear_params(self) -> int:
        """Weights of all layers' linear modules."""
        return self.num_layers * sum(num_in * num_out for _, num_in, num_out in self.module_shapes)

    @property
    def head_params(self) -> int:
        return self.hidden * self.vocab_size

    def adapter_params(self, rank: int) -> int:
        """Weights of an adapter of this rank on all modules of all layers."""
        return self.num_layers * rank * sum(num_in + num_out for _, num_in, num_out in self.module_shapes)

    def config(self, context_tokens: int) -> dict[str, object]:
        """A config.json."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
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
