"""The base model as adapters are validated against it. Loads no torch: front processes use it too."""

from pathlib import Path

from lorasrv.config import DType
from lorasrv.model.families import fingerprint, read_architecture
from lorasrv_adapters.base import BaseModule, BaseShapes


def base_shapes(folder: str | Path, dtype: DType) -> BaseShapes:
    """Describe a Hugging Face folder as served in `dtype`. Raises UnsupportedModel."""
    architecture = read_architecture(folder)
    modules = tuple(
        BaseModule(path=path, in_features=in_features, out_features=out_features)
        for path, in_features, out_features in architecture.module_shapes()
    )
    return BaseShapes(num_layers=architecture.num_layers, modules=modules, fingerprint=fingerprint(folder), dtype=dtype)
