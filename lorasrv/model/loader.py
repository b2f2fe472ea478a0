"""Weights of the base model: streamed from safetensors straight into their final tensors, or drawn at random.

A tensor is read in bounded chunks, cast chunk by chunk and copied into its place (q, k and v are rows of one weight,
so are gate and up), so that host memory never holds more than the model and one chunk.
"""

import json
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lorasrv.errors import UnsupportedModel
from lorasrv.model.families import MODULE_PATHS, Architecture
from lorasrv_adapters.errors import MalformedFile
from lorasrv_adapters.safetensors_header import HeaderLimits, TensorEntry, read_header

CHUNK_BYTES = 64 << 20
_LIMITS = HeaderLimits(max_header_bytes=64 << 20, max_tensors=1 << 20, max_ndim=8)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None  # [(num_heads + 2 * num_kv_heads) * head_dim]
    qk_norms: tuple[Tensor, Tensor] | None  # [head_dim], twice
    o: Tensor  # [hidden, num_heads * head_dim]
    o_bias: Tensor | None  # [hidden]
    post_attention_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """The base model's tensors; `lm_head` is `embed` itself where the embeddings are tied."""

    embed: Tensor  # [vocab_size, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab_size, hidden]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """One tensor of a checkpoint, in a file of the folder."""

    file: str
    entry: TensorEntry


def load_weights(
    folder: str | Path, architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> ModelWeights:
    """Read `model.safetensors`, or the shards of its index. Peak host memory is the model plus `CHUNK_BYTES`.

    Raises UnsupportedModel naming every tensor that is missing, not expected, or of another shape or dtype.
    """
    folder = Path(folder)
    stored = {
        name: tensor
        for file in checkpoint_files(folder)
        for name, tensor in _read_tensors(folder, file).items()
        if not _is_recomputed(name, architecture)
    }
    weights = empty_weights(architecture, dtype, device)
    targets = _targets(weights, architecture)
    _refuse_mismatch(stored, targets)
    buffer = bytearray(min(CHUNK_BYTES, max(tensor.entry.num_bytes for tensor in stored.values())))
    for file in sorted({tensor.file for tensor in stored.values()}):
        with (folder / file).open("rb", buffering=0) as source:
            for name, tensor in stored.items():
                if tensor.file == file:
                    _read_tensor(source, tensor.entry, buffer, targets[name])
    return weights


def dummy_weights(architecture: Architecture, dtype: torch.dtype, device: torch.device, seed: int) -> ModelWeights:
    """Random weights of the model's shape: normal, of deviation 0.02; norms are ones, biases zeros."""
    weights = empty_weights(architecture, dtype, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, target in _targets(weights, architecture).items():
        if target.ndim == 1:
            target.fill_(0.0 if name.endswith(".bias") else 1.0)
        else:
            target.normal_(0.0, 0.02, generator=generator)
    return weights


def empty_weights(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, intermediate, head_dim = architecture.hidden, architecture.intermediate, architecture.head_dim
    query, key_value = architecture.num_heads * head_dim, architecture.num_kv_heads * head_dim
    embed = empty(architecture.vocab_size, hidden)
    layers = tuple(
        LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(query + 2 * key_value, hidden),
            qkv_bias=empty(query + 2 * key_value) if architecture.qkv_bias else None,
            qk_norms=(empty(head_dim), empty(head_dim)) if architecture.family.qk_norm else None,
            o=empty(hidden, query),
            o_bias=empty(hidden) if architecture.o_bias else None,
            post_attention_norm=empty(hidden),
            gate_up=empty(2 * intermediate, hidden),
            down=empty(hidden, intermediate),
        )
        for _ in range(architecture.num_layers)
    )
    lm_head = embed if architecture.tie_word_embeddings else empty(architecture.vocab_size, hidden)
    return ModelWeights(embed=embed, layers=layers, norm=empty(hidden), lm_head=lm_head)


def _targets(weights: ModelWeights, architecture: Architecture) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: contiguous views of the weights, by name."""
    names = architecture.family.names
    targets = {names.embed: weights.embed, names.norm: weights.norm}
    if not architecture.tie_word_embeddings:
        targets[names.lm_head] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        gate, up = layer.gate_up.chunk(2)
        modules = (*_split_qkv(layer.qkv, architecture), layer.o, gate, up, layer.down)
        targets |= {names.in_layer(index, path): part for path, part in zip(MODULE_PATHS, modules, strict=True)}
        targets[names.in_layer(index, names.input_norm)] = layer.input_norm
        targets[names.in_layer(index, names.post_attention_norm)] = layer.post_attention_norm
        if layer.qkv_bias is not None:
            biases = _split_qkv(layer.qkv_bias, architecture)
            targets |= {
                names.in_layer(index, path, "bias"): b for path, b in zip(MODULE_PATHS[:3], biases, strict=True)
            }
        if layer.o_bias is not None:
            targets[names.in_layer(index, MODULE_PATHS[3], "bias")] = layer.o_bias
        if layer.qk_norms is not None:
            targets[names.in_layer(index, names.q_norm)] = layer.qk_norms[0]
            targets[names.in_layer(index, names.k_norm)] = layer.qk_norms[1]
    return targets


def _split_qkv(stacked: Tensor, architecture: Architecture) -> tuple[Tensor, ...]:
    """Rows of q, k and v."""
    key_value = architecture.num_kv_heads * architecture.head_dim
    return stacked.split((architecture.num_heads * architecture.head_dim, key_value, key_value))


def _is_recomputed(name: str, architecture: Architecture) -> bool:
    """Buffers that old checkpoints hold, and a second copy of tied embeddings."""
    names = architecture.family.names
    return name.endswith(names.ignored_suffix) or (architecture.tie_word_embeddings and name == names.lm_head)


def _refuse_mismatch(stored: dict[str, _Stored], targets: dict[str, Tensor]) -> None:
    if missing := sorted(targets.keys() - stored.keys()):
        raise UnsupportedModel(f"the checkpoint lacks {len(missing)} tensors: {_first(missing)}")
    if unexpected := sorted(stored.keys() - targets.keys()):
        raise UnsupportedModel(f"the checkpoint holds {len(unexpected)} tensors not expected: {_first(unexpected)}")
    for name, tensor in stored.items():
        shape = tuple(targets[name].shape)
        entry = tensor.entry
        if entry.shape != shape:
            raise UnsupportedModel(f"tensor {name} has shape {list(entry.shape)}; the config asks for {list(shape)}")
        if entry.dtype not in _DTYPES:
            raise UnsupportedModel(f"tensor {name} has dtype {entry.dtype}; served are {', '.join(_DTYPES)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _read_tensor(source: FileIO, tensor: TensorEntry, buffer: bytearray, target: Tensor) -> None:
    dtype, flat = _DTYPES[tensor.dtype], target.view(-1)
    chunk_elems = len(buffer) // dtype.itemsize
    source.seek(tensor.begin)
    for first in range(0, flat.numel(), chunk_elems):
        num_elems = min(chunk_elems, flat.numel() - first)
        _read_exactly(source, memoryview(buffer)[: num_elems * dtype.itemsize])
        flat[first : first + num_elems].copy_(torch.frombuffer(buffer, dtype=dtype, count=num_elems))


def _read_exactly(source: FileIO, into: memoryview) -> None:
    done = 0
    while done < len(into):
        num_bytes = source.readinto(into[done:])
        if not num_bytes:
            raise UnsupportedModel("a safetensors file of the model ends before its tensors do")
        done += num_bytes


def checkpoint_files(folder: Path) -> list[str]:
    """The names of the files that hold a model's weights, all of them there. Raises UnsupportedModel."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise UnsupportedModel(f"model {folder.name!r} has neither model.safetensors nor model.safetensors.index.json")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(cast(dict[str, str], weight_map).values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnsupportedModel(f"model.safetensors.index.json has no usable weight_map: {error!r}") from error
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise UnsupportedModel(f"model.safetensors.index.json names {file!r}, which is no file of the model folder")
    return files


def _read_tensors(folder: Path, file: str) -> dict[str, _Stored]:
    with (folder / file).open("rb") as source:
        try:
            tensors = read_header(source, _LIMITS).tensors
        except MalformedFile as error:
            raise UnsupportedModel(f"{file}: {error}") from error
    return {name: _Stored(file=file, entry=entry) for name, entry in tensors.items()}
