"""A real engine on a small model of random weights, in this process: what the simulator is held against."""

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lorasrv.config import DType, EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.build import build_core
from lorasrv.engine.core import EngineCore
from lorasrv.model.families import read_architecture
from lorasrv.model.shape import ModelShape
from lorasrv.sim.workload import Arrival
from lorasrv.types import AdapterUse, EngineInfo, EngineRequest
from lorasrv_adapters.blobs import BlobStore
from lorasrv_adapters.manifest import CONFIG_FILE, WEIGHTS_FILE, ManifestFile, make_manifest

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
_PEFT_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PATHS = dict(zip(_PEFT_NAMES, ("self_attn",) * 4 + ("mlp",) * 3, strict=True))


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
    digests = tuple(_publish(blobs, shape, ranks[number % len(ranks)], number) for number in range(num_adapters))
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


def _publish(blobs: BlobStore, shape: ModelShape, rank: int, seed: int) -> str:
    """An adapter of random weights on all modules, as PEFT would save it; its digest."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "bias": "none",
        "target_modules": list(_PEFT_NAMES),
    }
    files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(_weights(shape, rank, seed))}
    manifest = make_manifest(
        [ManifestFile(name=name, size_bytes=len(data), sha256=blobs.put_bytes(data)) for name, data in files.items()]
    )
    return blobs.put_bytes(manifest.to_bytes())


def _weights(shape: ModelShape, rank: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def values(*size: int) -> np.ndarray:
        return 0.02 * rng.standard_normal(size, dtype=np.float32)

    tensors: dict[str, np.ndarray] = {}
    for layer in range(shape.num_layers):
        for name, (_, num_in, num_out) in zip(_PEFT_NAMES, shape.module_shapes, strict=True):
            key = f"base_model.model.model.layers.{layer}.{_PATHS[name]}.{name}"
            tensors[f"{key}.lora_A.weight"] = values(rank, num_in)
            tensors[f"{key}.lora_B.weight"] = values(num_out, rank)
    return tensors
