"""Puts an engine together: model, pool, tiers and core."""

from collections.abc import Callable
from dataclasses import dataclass

from lorasrv.config import EngineConfig
from lorasrv.engine.builder import BuilderSettings
from lorasrv.engine.builder_child import BuilderChild
from lorasrv.engine.builder_pool import BuilderPool
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.engine.image_readers import ImageSource, ThreadReader
from lorasrv.engine.packer import Packer, pageable
from lorasrv.engine.runner import build_runner
from lorasrv.engine.threads import use_threads
from lorasrv.engine.tiers import Tiers, unfelt_copy_bytes
from lorasrv.engine.warm_up import warm_up
from lorasrv.errors import ConfigurationError
from lorasrv.memory.arena import HostArena
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.storage import PinnedArena, pinned_pages
from lorasrv.types import EngineInfo

# Reads that are under way take up to this share of the host cache beside it.
_AHEAD = 8


@dataclass(frozen=True, kw_only=True)
class Assembly:
    core: EngineCore
    info: EngineInfo
    packer: Packer


def build_core(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """The engine of a server: adapters come from the registry's blobs, read by processes of their own. Raises
    UnsupportedModel, ConfigurationError."""
    if config.blob_root is None:
        raise ConfigurationError("an engine process needs blob_root, the registry's blob folder")
    blob_root = config.blob_root
    use_threads(config.model)
    assembly = _assemble(config, lambda packer, on_gpu: _builders(config, blob_root, packer, on_gpu))
    return assembly.core, assembly.info


def assemble(config: EngineConfig, read: Callable[[str, Packer], PackedAdapter]) -> Assembly:
    """An engine whose adapters' page images come from `read(digest, packer)`, called in worker threads."""

    def source(packer: Packer, on_gpu: bool) -> ImageSource[PackedAdapter]:
        return ThreadReader(lambda digest: read(digest, packer), size_of=lambda image: image.nbytes)

    return _assemble(config, source)


def _builders(config: EngineConfig, blob_root: str, packer: Packer, on_gpu: bool) -> BuilderPool:
    page_bytes = packer.layout.page_bytes
    num_pages = config.tiers.host_cache_bytes // page_bytes
    if not num_pages:
        raise ConfigurationError(
            f"host_cache_bytes {config.tiers.host_cache_bytes} holds no page of {page_bytes} bytes"
        )
    num_ahead = num_pages // _AHEAD
    arena = (PinnedArena if on_gpu else HostArena)(num_pages + num_ahead, page_bytes)
    settings = BuilderSettings(
        blob_root=blob_root,
        model_path=config.model.path,
        dtype=config.model.dtype,
        block_tokens=config.pool.block_tokens,
        max_rank=config.max_rank,
        num_pages=num_pages + num_ahead,
    )
    return BuilderPool(
        arena,
        num_headers=packer.layout.num_layers * len(packer.module_shapes),
        spawn=lambda: BuilderChild(settings, arena.descriptor),
        num_builders=config.tiers.num_builders,
        num_ahead=num_ahead,
        read_timeout_s=config.tiers.read_timeout_s,
    )


def _assemble(config: EngineConfig, make_source: Callable[[Packer, bool], ImageSource[PackedAdapter]]) -> Assembly:
    runner, storage, architecture, info = build_runner(config)
    modules = architecture.module_shapes()
    on_gpu = storage.bytes.is_cuda
    if on_gpu:
        if not config.model.deterministic:
            max_blocks = min(info.num_pages, storage.layout.pages_for_tokens(info.context_tokens))
            runner.capture_graphs(config.scheduler.max_running, max_blocks, config.max_rank)
        warm_up(runner, storage, modules, info.context_tokens, config.max_rank)
    packer = Packer(layout=storage.layout, module_shapes=modules, allocate=pinned_pages if on_gpu else pageable)
    limits = Limits(
        num_pages=info.num_pages,
        page_bytes=info.page_bytes,
        block_tokens=info.block_tokens,
        context_tokens=info.context_tokens,
        vocab_size=info.vocab_size,
        eos_token_ids=frozenset(architecture.eos_token_ids),
    )
    copy_bytes = config.tiers.copy_bytes_per_step or unfelt_copy_bytes(beside_steps=on_gpu)
    tiers = Tiers(storage, make_source(packer, on_gpu), config.tiers.host_cache_bytes, copy_bytes)
    return Assembly(
        core=EngineCore(config=config.scheduler, limits=limits, runner=runner, tiers=tiers), info=info, packer=packer
    )
