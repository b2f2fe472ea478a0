"""The pages that a model's pool will have, and whether an adapter can lie in them. Loads no torch: front processes ask
before an engine exists."""

from lorasrv.config import EngineConfig
from lorasrv.errors import ConfigurationError
from lorasrv.memory.layout import MatrixShape, PageLayout, min_page_bytes
from lorasrv.model.families import Architecture, read_architecture
from lorasrv_adapters.errors import AdapterTooLarge, ContentError
from lorasrv_adapters.peft_format import AdapterSpec, SpecCheck

ITEMSIZES = {"float32": 4, "bfloat16": 2}


def page_layout(architecture: Architecture, block_tokens: int, itemsize: int) -> PageLayout:
    """The pool's layout for a model. Raises ConfigurationError when its pages cannot be aligned."""
    try:
        return PageLayout(
            num_layers=architecture.num_layers,
            block_tokens=block_tokens,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            itemsize=itemsize,
        )
    except ValueError as error:
        raise ConfigurationError(f"block_tokens {block_tokens} does not suit this model: {error}") from error


def page_check(config: EngineConfig) -> SpecCheck:
    """For validation: refuses an adapter whose tile directory, or a tile, exceeds a page of this engine's pool."""
    architecture = read_architecture(config.model.path)
    modules = architecture.module_shapes()
    layout = page_layout(architecture, config.pool.block_tokens, ITEMSIZES[config.model.dtype])

    def check(spec: AdapterSpec) -> list[ContentError]:
        matrices = [
            MatrixShape(rank=found.rank, cols=cols) for found in spec.modules for cols in modules[found.module][1:]
        ]
        needed = min_page_bytes(matrices, layout.num_layers * len(modules), layout.page_bytes, layout.itemsize)
        if needed <= layout.page_bytes:
            return []
        return [
            AdapterTooLarge(
                f"the adapter needs pages of {needed} bytes for its tile directory and tiles, and this server's pages "
                f"have {layout.page_bytes} bytes"
            )
        ]

    return check
