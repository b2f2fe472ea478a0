"""A real engine on a small model of random weights, in this process: what the simulator is held against."""

import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasrv.config import DType, EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.build import build_core
from lorasrv.engine.core import EngineCore
from lorasrv.model.base_shapes import base_shapes
from lorasrv.model.families import read_architecture
from lorasrv.model.shape import ModelShape
from lorasrv.sim.workload import Arrival
from lorasrv.types import AdapterUse, EngineInfo, EngineRequest
from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.blobs import BlobStore
from lorasrv_adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, ManifestFile, make_manifest
from lorasrv_bench.fresh_adapters import write_adapter

# Steps of a few milliseconds on two cores.
SMALL_CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MAX_RANK = 64


@dataclass(frozen=True, kw_only=True)
class RealEngine:
    """`digests` are of the adapters, whose ranks are `ranks` in turn."""

    core: EngineCore
    info: EngineInfo
    shape: ModelShape
    config: EngineConfig
    digests: tuple[str, ...]
    ranks: tuple[int, ...]

    def make_request(self, number: int, arrival: Arrival) -> EngineRequest:
        """With random token ids: equal in the prefix that the arrival names, and in no other."""
        prefix = self._tokens(f"prefix {arrival.prefix}", arrival.prefix_tokens)
        own = self._tokens(f"request {number}", arrival.prompt_tokens - arrival.prefix_tokens)
        return EngineRequest(
            request_id=str(number),
            token_ids=prefix + own,
            adapter=None if arrival.adapter is None else AdapterUse(digest=self.digests[arrival.adapter]),
            max_tokens=arrival.output_tokens,
            seed=0,
            temperature=0.0,
            ignore_eos=True,
            tenant=str(arrival.tenant),
        )

    def _tokens(self, seed: str, count: int) -> tuple[int, ...]:
        return tuple(random.Random(seed).choices(range(3, self.info.vocab_size), k=count))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model's folder, and adapters of random weights for it in a blob folder."""

    model: Path
    blobs: Path
    shape: ModelShape
    digests: tuple[str, ...]
    ranks: tuple[int, ...]


def prepare(folder: Path, *, num_adapters: int, ranks: tuple[int, ...], model: Path | None = None) -> Prepared:
    """Adapter number i has `ranks[i % len(ranks)]`. Without `model` there is a small one, its config in `folder`."""
    if model is None:
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(SMALL_CONFIG))
    shape, blobs = ModelShape.of(read_architecture(model)), BlobStore(folder / "blobs")
    base = base_shapes(model, "float32")
    digests = tuple(_publish(blobs, base, ranks[number % len(ranks)], number) for number in range(num_adapters))
    return Prepared(model=model, blobs=folder / "blobs", shape=shape, digests=digests, ranks=ranks)


@contextmanager
def real_engine(
    prepared: Prepared, *, pool_bytes: int, scheduler: SchedulerConfig, dtype: DType = "float32"
) -> Iterator[RealEngine]:
    """A model of random weights."""
    config = EngineConfig(
        model=ModelConfig(path=str(prepared.model), dtype=dtype, dummy_weights=True),
        pool=PoolConfig(pool_bytes=pool_bytes),
        scheduler=scheduler,
        blob_root=str(prepared.blobs),
        max_rank=MAX_RANK,
    )
    core, info = build_core(config)
    try:
        yield RealEngine(
            core=core, info=info, shape=prepared.shape, config=config, digests=prepared.digests, ranks=prepared.ranks
        )
    finally:
        core.close()


def _publish(blobs: BlobStore, base: BaseShapes, rank: int, seed: int) -> str:
    """An adapter of random weights on all modules, as PEFT would save it; its digest."""
    with tempfile.TemporaryDirectory(prefix="lorasrv-adapter-") as folder:
        path = write_adapter(Path(folder), base, rank=rank, seeds=(seed,))
        files = {name: (path / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    manifest = make_manifest(
        [ManifestFile(name=name, size_bytes=len(data), sha256=blobs.put_bytes(data)) for name, data in files.items()]
    )
    return blobs.put_bytes(manifest.to_bytes())
