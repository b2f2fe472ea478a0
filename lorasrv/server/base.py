"""The base model as adapters are validated against it."""

from lorasrv_adapters.base import BaseModule, BaseShapes

from lorasrv.model.families import fingerprint, read_architecture


def read_base_shapes(folder: str, dtype: str) -> BaseShapes:
    """Shapes and fingerprint of a model folder; no weights are read. Raises UnsupportedModel."""
    architecture = read_architecture(folder)
    return BaseShapes(
        num_layers=architecture.num_layers,
        modules=tuple(
            BaseModule(path=path, in_features=in_features, out_features=out_features)
            for path, in_features, out_features in architecture.module_shapes()
        ),
        fingerprint=fingerprint(folder),
        dtype=dtype,
    )
