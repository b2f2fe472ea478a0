"""`name:key=value,…` to a frozen dataclass and back: what a workload may be given, in one notation."""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from lorasrv.errors import ConfigurationError
from lorasrv_bench.draws import Span


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of S-LoRA's: the base model's shape, and its adapters' ranks, in turn."""

    base: str
    ranks: tuple[int, ...]


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "S1": Setting(base="7B", ranks=(8,)),
        "S2": Setting(base="7B", ranks=(64, 32, 16, 8)),
        "S3": Setting(base="13B", ranks=(16,)),
        "S4": Setting(base="13B", ranks=(64, 32, 16)),
    }
)


def bounded(
    default: Any, *, at_least: float | None = None, above: float | None = None, at_most: float = math.inf
) -> Any:
    """A number's field with the bounds that `parse` holds it to."""
    return dataclasses.field(default=default, metadata={"at_least": at_least, "above": above, "at_most": at_most})


def one_of(default: str, choices: tuple[str, ...]) -> Any:
    """A word's field."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def parse(text: str, kinds: Mapping[str, type]) -> tuple[str, Any]:
    """The name and an instance of its dataclass, built of the given values.

    Raises:
        ConfigurationError: the name or a key is unknown, or given twice, or a value is not of its type and range.
    """
    name, _, rest = text.strip().partition(":")
    if name not in kinds:
        raise ConfigurationError(f"workload {name!r} is none of {', '.join(kinds)}")
    kind = kinds[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if key not in fields:
            raise ConfigurationError(f"{name} has no {key!r}; it takes {', '.join(fields)}")
        if not equals or key in values:
            raise ConfigurationError(f"{name}: {item!r} must be key=value, each key once")
        values[key] = _value(f"{name}: {key}", value, types[key], fields[key].metadata)
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ConfigurationError(f"{name} needs {missing[0]}=…")
    return name, kind(**values)


def canonical(name: str, given: Any) -> str:
    """The text that says every value, defaults included; parsed again it gives the same."""
    shown = ((field.name, getattr(given, field.name)) for field in dataclasses.fields(given))
    return f"{name}:" + ",".join(f"{key}={_shown(value)}" for key, value in shown if value is not None)


def _value(place: str, text: str, kind: Any, bounds: Mapping[str, Any]) -> Any:
    wanted = next((each for each in get_args(kind) if each is not type(None)), kind) if not _is_ranks(kind) else kind
    if wanted is str:
        choices = bounds.get("choices")
        if choices and text not in choices:
            raise ConfigurationError(f"{place} is {text!r}; it must be one of {', '.join(choices)}")
        return text
    if wanted is Span:
        return _span(place, text)
    if _is_ranks(wanted):
        return _ranks(place, text)
    return _number(place, text, wanted, bounds)


def _ranks(place: str, text: str) -> tuple[int, ...]:
    if text in SETTINGS:
        return SETTINGS[text].ranks
    return tuple(int(_number(place, each, int, {"at_least": 1, "at_most": 4096})) for each in text.split("/"))


def _is_ranks(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is tuple


def _span(place: str, text: str) -> Span:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ConfigurationError(f"{place} is {text!r}; it must be LOW..HIGH with 1 <= LOW < HIGH, HIGH left out")
    return Span(low=int(match[1]), high=int(match[2]))


def _number(place: str, text: str, kind: type, bounds: Mapping[str, Any]) -> float:
    try:
        value = kind(text)
    except ValueError:
        raise ConfigurationError(
            f"{place} is {text!r}; it must be {'a whole number' if kind is int else 'a number'}"
        ) from None
    at_least, above, at_most = bounds.get("at_least"), bounds.get("above"), bounds.get("at_most", math.inf)
    if not math.isfinite(value) or value > at_most:
        raise ConfigurationError(f"{place} is {text}; it must be <= {at_most:g}")
    if at_least is not None and value < at_least:
        raise ConfigurationError(f"{place} is {text}; it must be >= {at_least:g}")
    if above is not None and value <= above:
        raise ConfigurationError(f"{place} is {text}; it must be > {above:g}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, Span):
        return f"{value.low}..{value.high}"
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
