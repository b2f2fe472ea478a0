"""The integers that a base model's bytes and operations follow from, and the models known by name. Standard library
only."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorasrv.model.families import Architecture


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder's shape, or what one of several tensor-parallel ranks holds of it."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False

    @classmethod
    def of(cls, architecture: Architecture) -> "ModelShape":
        return cls(
            name=architecture.name,
            hidden=architecture.hidden,
            intermediate=architecture.intermediate,
            num_layers=architecture.num_layers,
            num_heads=architecture.num_heads,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            vocab_size=architecture.vocab_size,
            tied=architecture.tie_word_embeddings,
        )

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

    @property
    def params(self) -> int:
        """Weights in memory: linear modules, embedding and, where it is not the same, the head."""
        return self.linear_params + self.head_params * (1 if self.tied else 2)

    @property
    def kv_elems_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def adapter_params(self, rank: int) -> int:
        """Weights of an adapter of this rank on all modules of all layers."""
        return self.num_layers * rank * sum(num_in + num_out for _, num_in, num_out in self.module_shapes)


def _llama(name: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> ModelShape:
    return ModelShape(
        name=name,
        hidden=hidden,
        intermediate=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
    )


# Llama 2's 7B and 13B, which published figures are of, and Llama 3's 8B and 70B.
MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {
        "7B": _llama("7B", 4096, 11008, 32, 32, 32, 32000),
        "8B": _llama("8B", 4096, 14336, 32, 32, 8, 128256),
        "13B": _llama("13B", 5120, 13824, 40, 40, 40, 32000),
        "70B": _llama("70B", 8192, 28672, 80, 64, 8, 128256),
    }
)
