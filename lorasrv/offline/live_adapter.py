"""A PEFT adapter that lives in memory, as the two files that PEFT would save of it: then it is read like any other."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from enum import Enum
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from lorasrv_adapters.errors import ContentError, ContentRefused, InvalidAdapter, UnsupportedFeature, listing, quote

_PREFIX = "base_model.model."
# What PeftModel.state_dict, get_peft_model_state_dict and transformers' own get_adapter_state_dict call a tensor.
_NAME = re.compile(
    rf"(?:{re.escape(_PREFIX)})?(?P<module>.+)\.(?P<side>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight", re.DOTALL
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class LiveConfig(Protocol):
    """peft.LoraConfig, of which nothing else is needed."""

    def to_dict(self) -> dict[str, Any]: ...


def adapter_files(state_dict: Mapping[str, Tensor], config: LiveConfig | Mapping[str, Any]) -> tuple[bytes, bytes]:
    """adapter_config.json and adapter_model.safetensors: copies, so that the tensors may change afterwards.

    The same tensors and settings give the same bytes, in whatever order they come and with the adapter's name in the
    tensors' names or without. Raises ContentRefused with every reason that is found before the files are read.
    """
    errors: list[ContentError] = []
    config_bytes = _config_file(config if isinstance(config, Mapping) else config.to_dict(), errors)
    tensors = _plain_names(state_dict, errors)
    _check_tensors(tensors, errors)
    if errors:
        raise ContentRefused(errors)
    return config_bytes, save({name: _copy(tensors[name]) for name in sorted(tensors)})


def _config_file(fields: Mapping[str, Any], errors: list[ContentError]) -> bytes:
    """As `PeftConfig.save_pretrained` writes it, with sets in order."""

    def plain(value: object) -> object:
        if isinstance(value, set | frozenset):
            return sorted(value, key=str)
        if isinstance(value, Enum):
            return value.value
        raise TypeError(f"a {type(value).__name__}")

    found: dict[str, Any] = {}
    for key, value in (dict(fields) | {"inference_mode": True}).items():
        try:
            found[key] = json.loads(json.dumps(value, default=plain))
        except (TypeError, ValueError, RecursionError) as error:
            errors.append(InvalidAdapter(f"config: {quote(key)} cannot be written as JSON: {quote(str(error))}"))
    return json.dumps(found, sort_keys=True).encode()


def _plain_names(state_dict: Mapping[str, Tensor], errors: list[ContentError]) -> dict[str, Tensor]:
    """Tensors by the names that PEFT saves them under."""
    tensors: dict[str, Tensor] = {}
    named: defaultdict[str | None, list[str]] = defaultdict(list)
    foreign: list[str] = []
    twice: list[str] = []
    for name, tensor in state_dict.items():
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            foreign.append(quote(name))
            continue
        named[match["adapter"]].append(name)
        plain = f"{_PREFIX}{match['module']}.{match['side']}.weight"
        if plain in tensors:
            twice.append(name)
        tensors[plain] = tensor
    if foreign:
        hint = "peft.get_peft_model_state_dict gives an adapter's own"
        errors.append(UnsupportedFeature(f"tensors that are no LoRA matrices ({hint}): {listing(foreign)}"))
    if len(named) > 1:
        adapters = listing(f"{names[0]} of {'no name' if name is None else name}" for name, names in named.items())
        errors.append(InvalidAdapter(f"tensors of several adapters: {adapters}"))
    elif twice:
        errors.append(InvalidAdapter(f"tensors given twice, with and without {_PREFIX}: {listing(twice)}"))
    if not state_dict:
        errors.append(InvalidAdapter("a state dict without tensors"))
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor], errors: list[ContentError]) -> None:
    kinds: list[str] = []
    dtypes: list[str] = []
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            kinds.append(f"{name} is a {type(tensor).__name__}")
        elif tensor.dtype not in _DTYPES:
            dtypes.append(f"{name} is {tensor.dtype}")
    if kinds:
        errors.append(InvalidAdapter(f"values that are no dense tensors with data: {listing(kinds)}"))
    if dtypes:
        allowed = ", ".join(str(dtype) for dtype in _DTYPES)
        errors.append(UnsupportedFeature(f"weights that are not one of {allowed}: {listing(dtypes)}"))


def _is_plain(tensor: object) -> bool:
    """Subclasses may hold something else than their shape says: a shard, a quantized matrix."""
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.layout is torch.strided and not tensor.is_meta


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
