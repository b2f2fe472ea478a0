"""What config.json says about rotary positions, as transformers reads it. Standard library only; `rope.py` computes.

A kind is a dataclass of what its algorithm needs. transformers 5 writes all of it into `rope_parameters`; older files
have `rope_theta` at the top level and the rest in `rope_scaling`, where `type` may stand for `rope_type`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from lorasrv.errors import UnsupportedModel
from lorasrv.model.config_fields import MAX_INTEGER, Fields

DEFAULT_THETA = 10000.0
ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})


@dataclass(frozen=True, kw_only=True)
class DefaultRope:
    theta: float
    kind: Literal["default"] = "default"


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    theta: float
    factor: float
    kind: Literal["linear"] = "linear"


@dataclass(frozen=True, kw_only=True)
class DynamicRope:
    theta: float
    factor: float
    original_tokens: int  # up to here nothing is scaled
    kind: Literal["dynamic"] = "dynamic"


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """`attention_factor` None: it follows from `factor`, and `mscale` and `mscale_all_dim` where both are given."""

    theta: float
    factor: float
    original_tokens: int
    attention_factor: float | None
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool
    kind: Literal["yarn"] = "yarn"


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    theta: float
    factor: float
    original_tokens: int
    low_freq_factor: float
    high_freq_factor: float
    kind: Literal["llama3"] = "llama3"


Rope = DefaultRope | LinearRope | DynamicRope | YarnRope | Llama3Rope


def read_rope(config: Fields, max_positions: int) -> tuple[Rope, int]:
    """The rope, and the tokens a sequence may have. `max_positions` is config.json's `max_position_embeddings`.

    That is the length before scaling for the kinds linear and dynamic, by transformers' convention; YaRN says the
    length before scaling itself; for llama3 it is the length after.
    """
    config.refuse_unless({"partial_rotary_factor": 1.0})
    theta = config.number("rope_theta", DEFAULT_THETA)
    old, new = config.nested("rope_scaling"), config.nested("rope_parameters")
    if old is not None and new is not None and old.values != new.values:
        raise config.refusal("rope_scaling", f"rope_parameters says otherwise: {dict(new.values)!r}")
    rope = old or new
    if rope is None:
        return DefaultRope(theta=theta), max_positions
    rope.refuse_unless({"partial_rotary_factor": 1.0})
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UnsupportedModel(f"{rope.where}: rope_type {kind!r} is not served; served are {', '.join(_KINDS)}")
    if rope.values.get("type", kind) != kind:
        raise rope.refusal("type", f"rope_type says otherwise: {kind!r}")
    read, keys = _KINDS[kind]
    rope.refuse_unknown(keys | {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    return read(rope, rope.number("rope_theta", theta), max_positions)


def _default(rope: Fields, theta: float, max_positions: int) -> tuple[Rope, int]:
    return DefaultRope(theta=theta), max_positions


def _linear(rope: Fields, theta: float, max_positions: int) -> tuple[Rope, int]:
    factor = rope.number("factor", least=1)
    return LinearRope(theta=theta, factor=factor), _stretched(max_positions, factor)


def _dynamic(rope: Fields, theta: float, max_positions: int) -> tuple[Rope, int]:
    factor = rope.number("factor", least=1)
    return DynamicRope(theta=theta, factor=factor, original_tokens=max_positions), _stretched(max_positions, factor)


def _yarn(rope: Fields, theta: float, max_positions: int) -> tuple[Rope, int]:
    original = rope.integer("original_max_position_embeddings", max_positions)
    if rope.values.get("factor", 1) is None:  # null means the ratio, in transformers; absent means nothing
        factor = max_positions / original
    else:
        factor = rope.number("factor", least=1)
    found = YarnRope(
        theta=theta,
        factor=factor,
        original_tokens=original,
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        mscale=rope.optional_number("mscale", least=0),
        mscale_all_dim=rope.optional_number("mscale_all_dim", least=0),
        truncate=rope.flag("truncate", True),
    )
    if found.beta_fast < found.beta_slow:
        raise rope.refusal("beta_fast", f"it must not be less than beta_slow, {found.beta_slow:g}")
    if theta <= 1:
        raise UnsupportedModel(f"{rope.where}: rope_theta is {theta:g}; yarn needs it > 1")
    return found, max(max_positions, _stretched(original, factor))


def _llama3(rope: Fields, theta: float, max_positions: int) -> tuple[Rope, int]:
    found = Llama3Rope(
        theta=theta,
        factor=rope.number("factor", least=1),
        original_tokens=rope.integer("original_max_position_embeddings", max_positions),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
    )
    if found.high_freq_factor <= found.low_freq_factor:
        raise rope.refusal("high_freq_factor", f"it must be more than low_freq_factor, {found.low_freq_factor:g}")
    return found, max_positions


def _stretched(num_tokens: int, factor: float) -> int:
    return int(min(num_tokens * factor, MAX_INTEGER))


_Reader = Callable[[Fields, float, int], tuple[Rope, int]]
_SCALED = frozenset({"factor", "original_max_position_embeddings"})
_YARN = frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
_KINDS: Mapping[str, tuple[_Reader, frozenset[str]]] = {
    "default": (_default, frozenset()),
    "linear": (_linear, frozenset({"factor"})),
    "dynamic": (_dynamic, frozenset({"factor"})),
    "yarn": (_yarn, _SCALED | _YARN),
    "llama3": (_llama3, _SCALED | {"low_freq_factor", "high_freq_factor"}),
}
