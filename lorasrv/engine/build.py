"""Puts an engine together: model, pool, tiers and core."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorasrv.config import EngineConfig
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.engine.packer import Packer
from lorasrv.engine.runner import build_runner
from lorasrv.engine.tiers import Tiers
from lorasrv.engine.warm_up import warm_up
from lorasrv.errors import ConfigurationError
from lorasrv.memory.packing import PackedAdapter
from lorasrv.model.base_shapes import base_shapes
from lorasrv.types import EngineInfo
from lorasrv_adapters.blobs import BlobStore
from lorasrv_adapters.published import open_version


@dataclass(frozen=True, kw_only=True)
class Assembly:
    core: EngineCore
    info: EngineInfo
    packer: Packer


def build_core(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """The engine of a server: adapters come from the registry's blobs. Raises UnsupportedModel, ConfigurationError."""
    if config.blob_root is None:
        raise ConfigurationError("an engine process needs blob_root, the registry's blob folder")
    blobs = BlobStore(Path(config.blob_root))
    base = base_shapes(config.model.path, config.model.dtype)

    def read(digest: str, packer: Packer) -> PackedAdapter:
        return packer.pack(open_version(blobs, digest, base, config.max_rank))

    assembly = assemble(config, read)
    return assembly.core, assembly.info


def assemble(config: EngineConfig, read: Callable[[str, Packer], PackedAdapter]) -> Assembly:
    """An engine whose adapters' page images come from `read(digest, packer)`, called in worker threads."""
    runner, storage, architecture, info = build_runner(config)
    modules = architecture.module_shapes()
    if storage.bytes.is_cuda:
        if not config.model.deterministic:
            max_blocks = min(info.num_pages, storage.layout.pages_for_tokens(info.context_tokens))
            runner.capture_graphs(config.scheduler.max_running, max_blocks, config.max_rank)
        warm_up(runner, storage, modules, info.context_tokens, config.max_rank)
    packer = Packer(layout=storage.layout, module_shapes=modules, dtype=storage.kv.dtype, pinned=storage.bytes.is_cuda)
    limits = Limits(
        num_pages=info.num_pages,
        page_bytes=info.page_bytes,
        block_tokens=info.block_tokens,
        context_tokens=info.context_tokens,
        vocab_size=info.vocab_size,
        eos_token_ids=frozenset(architecture.eos_token_ids),
    )
    tiers = Tiers(storage, lambda digest: read(digest, packer), config.host_cache_bytes)
    return Assembly(
        core=EngineCore(config=config.scheduler, limits=limits, runner=runner, tiers=tiers), info=info, packer=packer
    )
