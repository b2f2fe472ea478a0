"""adapter_config.json of a PEFT folder, read by allow-list.

A few keys say how an adapter is served; a few change nothing at inference; a few more have harmless values. Every
other key, known to PEFT today or not, must be null, false or empty, or the adapter is refused by that key's name.

An adapter whose initialisation shifted the base's weights (PiSSA, OLoRA, CorDA, LoRA-GA) is served when PEFT saved it
with `path_initial_model_for_weight_conversion`: it is then a plain adapter of twice the rank, and its configuration
says `init_lora_weights: true`.

No value is ever dereferenced as a path. `base_model_name_or_path` and `revision` are opaque labels that PEFT fills
with whatever the trainer used, absolute paths included: they are accepted and never looked at. A path, a URL or
remote code anywhere else is refused.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from lorasrv_adapters.errors import ContentError, InvalidAdapter, RankTooLarge, UnsupportedFeature, listing, quote
from lorasrv_adapters.patterns import PathMatcher, is_name, path_end
from lorasrv_adapters.peft_targets import TARGET_KEYS, Targets, parse_targets
from lorasrv_adapters.strict_json import parse_object

MAX_LORA_ALPHA = 65536
# In all. A rank and an alpha for each of the seven modules of 126 layers are below it.
MAX_PATTERNS = 2048
MAX_REGEXES = 128  # of these, patterns that are no plain names
MAX_PATTERN_ERRORS = 20

Value = TypeVar("Value")

_WHAT = "adapter_config.json"
_PATTERN_KEYS = frozenset({"rank_pattern", "alpha_pattern"})
_SERVED = frozenset({"r", "lora_alpha", "use_rslora"}) | TARGET_KEYS | _PATTERN_KEYS
_LABELS = frozenset({"base_model_name_or_path", "revision"})
# Training-time values and bookkeeping. qalora_group_size and megatron_core act only with keys that are refused.
_NO_EFFECT = frozenset({"peft_version", "inference_mode", "lora_dropout", "qalora_group_size", "megatron_core"})
# Settings of initialisations: a converted adapter keeps them, and `init_lora_weights` says that they were not used.
_INITIALISATION = frozenset({"corda_config", "lora_ga_config"})
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
_PATH_IN_PATTERN = re.compile(r"[/\x00]")  # patterns are full of backslashes and dots, module paths have no slash


@dataclass(frozen=True, kw_only=True)
class PeftLoraConfig:
    """What of the configuration is served. The first key of a pattern that matches a module's path gives its value."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: tuple[tuple[PathMatcher, int], ...]
    alpha_pattern: tuple[tuple[PathMatcher, float], ...]
    targets: Targets

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """Of one module; the scale is alpha/r, or alpha/sqrt(r) with rsLoRA."""
        rank = next((value for matches, value in self.rank_pattern if matches(path)), self.rank)
        alpha = next((value for matches, value in self.alpha_pattern if matches(path)), self.alpha)
        return rank, alpha / math.sqrt(rank) if self.rslora else alpha / rank


def parse_peft_config(data: bytes, max_rank: int) -> tuple[PeftLoraConfig | None, list[ContentError]]:
    """The served part, or None with every reason for refusing it; raises MalformedFile when it is not strict JSON."""
    fields = parse_object(data, _WHAT)
    errors = _refused_features(fields) + _refused_paths(fields)
    too_many = _too_many_patterns(fields)
    if too_many:
        return None, errors + too_many
    rank = _rank("r", fields.get("r"), max_rank, errors)
    alpha = _alpha("lora_alpha", fields.get("lora_alpha"), errors)
    rank_pattern = _pattern(
        fields, "rank_pattern", lambda what, value, found: _rank(what, value, max_rank, found), errors
    )
    alpha_pattern = _pattern(fields, "alpha_pattern", _alpha, errors)
    targets = parse_targets(fields, errors)
    rslora = fields.get("use_rslora", False)
    if not isinstance(rslora, bool):
        errors.append(InvalidAdapter(f"use_rslora {quote(rslora)} is not true or false"))
    if errors or rank is None or alpha is None or targets is None:
        return None, errors
    config = PeftLoraConfig(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        targets=targets,
    )
    return config, errors


def _refused_features(fields: Mapping[str, Any]) -> list[ContentError]:
    refused: list[str] = []
    for key, value in fields.items():
        if key in _SERVED | _LABELS | _NO_EFFECT or (key == "auto_mapping" and _is_plain_mapping(value)):
            continue
        if key in _REMOTE_CODE or (key == "auto_mapping" and value):
            continue  # reported by _refused_paths
        if key in _INITIALISATION and isinstance(value, dict):
            continue  # `init_lora_weights` decides
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
        looks_like_path = _PATH_IN_PATTERN if key in TARGET_KEYS | _PATTERN_KEYS else _PATH
        path = next((text for text in _strings(value) if looks_like_path.search(text)), None)
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


def _rank(what: str, rank: object, max_rank: int, errors: list[ContentError]) -> int | None:
    if type(rank) is not int or rank < 1:
        errors.append(InvalidAdapter(f"{what} {quote(rank)} is not an integer >= 1"))
        return None
    if rank > max_rank:
        errors.append(RankTooLarge(f"{what} {quote(rank)} is over the maximum rank of {max_rank}"))
        return None
    return rank


def _alpha(what: str, alpha: object, errors: list[ContentError]) -> float | None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_LORA_ALPHA:
        errors.append(InvalidAdapter(f"{what} {quote(alpha)} is not a number > 0 and <= {MAX_LORA_ALPHA}"))
        return None
    return float(alpha)


def _too_many_patterns(fields: Mapping[str, Any]) -> list[ContentError]:
    """Bounds what is matched against every module's path, all together; other types are refused elsewhere."""
    keys = ("rank_pattern", "alpha_pattern", "layers_pattern")
    texts = [text for key in keys if isinstance(fields.get(key), dict | list) for text in fields[key]]
    num_regexes = sum(isinstance(text, str) and not is_name(text) for text in texts)
    errors: list[ContentError] = []
    if len(texts) > MAX_PATTERNS:
        errors.append(UnsupportedFeature(f"{len(texts)} patterns in {listing(keys)}; the limit is {MAX_PATTERNS}"))
    if num_regexes > MAX_REGEXES:
        what = f"{num_regexes} patterns in {listing(keys)} that are no plain names"
        errors.append(UnsupportedFeature(f"{what}; the limit is {MAX_REGEXES}"))
    return errors


def _pattern(
    fields: Mapping[str, Any],
    key: str,
    parse_value: Callable[[str, object, list[ContentError]], Value | None],
    errors: list[ContentError],
) -> tuple[tuple[PathMatcher, Value], ...]:
    """What a rank or alpha pattern maps, in the file's order; after MAX_PATTERN_ERRORS errors the rest is not read."""
    pattern = fields.get(key)
    if pattern is not None and not isinstance(pattern, dict):
        errors.append(InvalidAdapter(f"{key} {quote(pattern)} is not an object"))
        return ()
    pattern = pattern or {}
    found: list[tuple[PathMatcher, Value]] = []
    refused: list[ContentError] = []
    for text, item in pattern.items():
        value = parse_value(f"{key} of {quote(text)}:", item, refused)
        try:
            matches = path_end(text)
        except ContentError as error:
            refused.append(error)
        else:
            found += [] if value is None else [(matches, value)]
        if len(refused) >= MAX_PATTERN_ERRORS:
            break
    errors += refused
    return tuple(found)


def _name(key: str) -> str:
    return key if key.isidentifier() and key.isascii() and len(key) <= 120 else quote(key)
