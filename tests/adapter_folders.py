"""Small PEFT folders for the sample base model, written byte by byte: needs numpy only."""

import json
from pathlib import Path

import numpy as np

from fake_engine import BASE_MODEL
from lorasrv.model.base_shapes import base_shapes


def write_adapter(folder: Path, *, rank: int = 4, seed: int = 0, **config: object) -> Path:
    """An adapter of q_proj in all layers; `config` replaces fields of its adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    base = base_shapes(BASE_MODEL, "float32")
    query = next(module for module in base.modules if module.path == "self_attn.q_proj")
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(base.num_layers):
        prefix = f"base_model.model.{base.layer_prefix}.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, query.in_features)).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((query.out_features, rank)).astype(np.float32)
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    return folder


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header: dict[str, object] = {}
    data = b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data
