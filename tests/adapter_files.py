"""Adapter files for tests: real ones saved by PEFT, and hand-made ones that PEFT would never write."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorasrv_adapters.base import BaseModule, BaseShapes
from lorasrv_adapters.manifest import CONFIG_FILE, FILE_NAMES, SERVING_FILE, WEIGHTS_FILE
from lorasrv_adapters.records import UploadFile

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Tensor = tuple[str, tuple[int, ...], bytes]


def llama_shapes(
    *,
    layers: int = 2,
    hidden: int = 16,
    intermediate: int = 24,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: str = "float32",
) -> BaseShapes:
    """The linear modules of a Llama of this shape."""
    kv = hidden // heads * kv_heads
    sizes = [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", hidden, kv),
        ("self_attn.v_proj", hidden, kv),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", hidden, intermediate),
        ("mlp.up_proj", hidden, intermediate),
        ("mlp.down_proj", intermediate, hidden),
    ]
    modules = tuple(BaseModule(path=path, in_features=i, out_features=o) for path, i, o in sizes)
    return BaseShapes(num_layers=layers, modules=modules, fingerprint="test-base", dtype=dtype)


def lora_config(**changes: Any) -> dict[str, Any]:
    """A plain configuration of rank 2 on q_proj and down_proj."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "/home/me/base",
        **changes,
    }


def lora_tensors(base: BaseShapes, targets: Sequence[str], rank: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random A and B of every layer, under PEFT's names."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(base.num_layers):
        for module in base.modules:
            if module.path.rpartition(".")[2] in targets:
                key = f"base_model.model.{base.layer_prefix}.{layer}.{module.path}"
                tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, module.in_features), dtype=np.float32)
                tensors[f"{key}.lora_B.weight"] = rng.standard_normal((module.out_features, rank), dtype=np.float32)
    return tensors


def safetensors_bytes(tensors: Mapping[str, np.ndarray | Tensor]) -> bytes:
    """The file's bytes; an array is F32, a tuple gives dtype, shape and bytes itself."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        dtype, shape, raw = ("F32", tensor.shape, tensor.tobytes()) if isinstance(tensor, np.ndarray) else tensor
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write_adapter(
    folder: Path, config: Mapping[str, Any] | bytes, tensors: Mapping[str, np.ndarray | Tensor] | bytes
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    (folder / WEIGHTS_FILE).write_bytes(tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors))
    return folder


def small_adapter(folder: Path, base: BaseShapes, *, seed: int = 0) -> Path:
    """A valid adapter that differs by `seed`."""
    return write_adapter(folder, lora_config(r=2), lora_tensors(base, ["q_proj", "down_proj"], 2, seed))


def upload_files(folder: Path) -> list[UploadFile]:
    """What a client announces of a folder."""
    names = (*FILE_NAMES, SERVING_FILE) if (folder / SERVING_FILE).exists() else FILE_NAMES
    contents = [(name, (folder / name).read_bytes()) for name in names]
    return [UploadFile(name=n, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for n, data in contents]
