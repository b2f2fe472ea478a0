"""The base model as adapters see it: the shapes of its linear modules. Described by the caller."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseModule:
    """A linear module that every layer has; `path` is its place in a layer, say `self_attn.q_proj`."""

    path: str
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True)
class BaseShapes:
    """What an adapter is validated against. `modules` in directory order: q, k, v, o, gate, up, down.

    `fingerprint` names the configuration and tokenizer; `dtype` is the serving dtype, "float32" or "bfloat16".
    """

    num_layers: int
    modules: tuple[BaseModule, ...]
    layer_prefix: str = "model.layers"
    fingerprint: str
    dtype: str

    def module_key(self, layer: int, module: int) -> str:
        """A module's full path in the base model, `model.layers.0.self_attn.q_proj`."""
        return f"{self.layer_prefix}.{layer}.{self.modules[module].path}"
