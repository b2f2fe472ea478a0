"""adapter_config.json of a PEFT folder, read by allow-list.

Four keys say how an adapter is served; a few change nothing at inference; a few more have harmless values. Every
other key, known to PEFT today or not, must be null, false or empty, or the adapter is refused by that key's name.

No value is ever dereferenced as a path. `base_model_name_or_path` and `revision` are opaque labels that PEFT fills
with whatever the trainer used, absolute paths included: they are accepted and never looked at. A path, a URL or
remote code anywhere else is refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lorasrv_adapters.errors import ContentError, InvalidAdapter, RankTooLarge, UnsupportedFeature, listing, quote
from lorasrv_adapters.strict_json import parse_object

MAX_LORA_ALPHA = 65536

_WHAT = "adapter_config.json"
_SERVED = frozenset({"r", "lora_alpha", "use_rslora", "target_modules"})
_LABELS = frozenset({"base_model_name_or_path", "revision"})
# Training-time values and bookkeeping. qalora_group_size and megatron_core act only with keys that are refused.
_NO_EFFECT = frozenset({"peft_version", "inference_mode", "lora_dropout", "qalora_group_size", "megatron_core"})
# The initialisations listed leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA shift them.
_ALLOWED_VALUES: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "peft_type": ("LORA",),
        "task_type": (None, "CAUSAL_LM"),
        "bias": ("none", None),
        "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
    }
)
_REMOTE_CODE = frozenset({"auto_map", "trust_remote_code", "custom_objects"})
_PATH = re.compile(r"^[/\\~]|^[A-Za-z]:[/\\]|\.\.[/\\]|^\.\.$|://|\x00")


@dataclass(frozen=True, kw_only=True)
class PeftLoraConfig:
    """What of the configuration is served. `scale` is alpha/r, or alpha/sqrt(r) with rsLoRA."""

    rank: int
    scale: float
    target_modules: tuple[str, ...]


def parse_peft_config(data: bytes, max_rank: int) -> tuple[PeftLoraConfig | None, list[ContentError]]:
    """The served part, or None with every reason for refusing it; raises MalformedFile when it is not strict JSON."""
    fields = parse_object(data, _WHAT)
    errors = _refused_features(fields) + _refused_paths(fields)
    rank = _rank(fields, max_rank, errors)
    alpha = _alpha(fields, errors)
    targets = _target_modules(fields, errors)
    rslora = fields.get("use_rslora", False)
    if not isinstance(rslora, bool):
        errors.append(InvalidAdapter(f"use_rslora {quote(rslora)} is not true or false"))
    if errors or rank is None or alpha is None or targets is None:
        return None, errors
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    return PeftLoraConfig(rank=rank, scale=scale, target_modules=targets), errors


def _refused_features(fields: Mapping[str, Any]) -> list[ContentError]:
    refused: list[str] = []
    for key, value in fields.items():
        if key in _SERVED | _LABELS | _NO_EFFECT or (key == "auto_mapping" and _is_plain_mapping(value)):
            continue
        if key in _REMOTE_CODE or (key == "auto_mapping" and value):
            continue  # reported by _refused_paths
        if key in _ALLOWED_VALUES:
            allowed = any(
                value is known or (isinstance(known, str) and value == known) for known in _ALLOWED_VALUES[key]
            )
        else:
            allowed = value is None or value is False or value in ("", [], {})
        if not allowed:
            refused.append(f"{_name(key)}={quote(value)}")
    if "peft_type" not in fields:
        refused.append("a missing peft_type")
    return [UnsupportedFeature(f"features not served: {listing(refused)}")] if refused else []


def _refused_paths(fields: Mapping[str, Any]) -> list[ContentError]:
    errors: list[ContentError] = []
    for key, value in fields.items():
        if value and (key in _REMOTE_CODE or (key == "auto_mapping" and not _is_plain_mapping(value))):
            errors.append(InvalidAdapter(f"{key} {quote(value)} asks for remote code, which is never loaded"))
        if key in _LABELS:
            if value is not None and not isinstance(value, str):
                errors.append(InvalidAdapter(f"{key} {quote(value)} is not a string"))
            continue
        path = next((text for text in _strings(value) if _PATH.search(text)), None)
        if path is not None:
            errors.append(InvalidAdapter(f"{_name(key)} holds the path {quote(path)}; paths are never followed"))
    return errors


def _is_plain_mapping(value: Any) -> bool:
    """What PEFT writes when no task type was given: the class of the base model, within transformers."""
    if not isinstance(value, dict) or not value.keys() <= {"base_model_class", "parent_library", "unsloth_fixed"}:
        return False
    library, model_class = value.get("parent_library"), value.get("base_model_class")
    return isinstance(library, str) and library.startswith("transformers.") and isinstance(model_class, str)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _rank(fields: Mapping[str, Any], max_rank: int, errors: list[ContentError]) -> int | None:
    rank = fields.get("r")
    if type(rank) is not int or rank < 1:
        errors.append(InvalidAdapter(f"r {quote(rank)} is not an integer >= 1"))
        return None
    if rank > max_rank:
        errors.append(RankTooLarge(f"rank {quote(rank)} is over the limit of {max_rank}"))
        return None
    return rank


def _alpha(fields: Mapping[str, Any], errors: list[ContentError]) -> float | None:
    alpha = fields.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_LORA_ALPHA:
        errors.append(InvalidAdapter(f"lora_alpha {quote(alpha)} is not a number > 0 and <= {MAX_LORA_ALPHA}"))
        return None
    return float(alpha)


def _target_modules(fields: Mapping[str, Any], errors: list[ContentError]) -> tuple[str, ...] | None:
    targets = fields.get("target_modules")
    if isinstance(targets, str):
        errors.append(UnsupportedFeature(f"target_modules given as the pattern {quote(targets)} instead of a list"))
        return None
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) and t for t in targets):
        errors.append(InvalidAdapter(f"target_modules {quote(targets)} is not a non-empty list of names"))
        return None
    return tuple(targets)


def _name(key: str) -> str:
    return key if key.isidentifier() and key.isascii() and len(key) <= 120 else quote(key)
