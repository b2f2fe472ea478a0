"""Which modules a PEFT configuration targets: its `target_modules`, `exclude_modules`, `layers_to_transform` and
`layers_pattern`, read and applied as PEFT does."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorasrv_adapters.errors import ContentError, InvalidAdapter, quote
from lorasrv_adapters.patterns import PathMatcher, layer_list, whole_path

TARGET_KEYS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A module is targeted by the pattern, else by a name: its path, or what follows a dot of it.

    `layers` and `layer_lists` narrow what is targeted by less than its full path; None and empty are no restriction.
    """

    names: frozenset[str]
    pattern: PathMatcher | None
    excluded_names: frozenset[str]
    excluded_pattern: PathMatcher | None
    layers: frozenset[int] | None
    layer_lists: tuple[PathMatcher, ...]

    def selects(self, path: str, layer: int) -> bool:
        """Whether a module of this layer is targeted."""
        if self.excluded_pattern is not None and self.excluded_pattern(path):
            return False
        if not self.excluded_names.isdisjoint(dotted_ends(path)):
            return False
        if self.pattern is not None:
            return self.pattern(path)
        if path in self.names:
            return True
        if self.names.isdisjoint(dotted_ends(path)):
            return False
        if self.layers is None:
            return True
        return layer in self.layers and (not self.layer_lists or any(matches(path) for matches in self.layer_lists))

    def unknown_names(self, paths: Iterable[str]) -> list[str]:
        """Names that none of `paths` has, but for those that are excluded anyway."""
        used = {end for path in paths for end in dotted_ends(path)}
        return sorted(
            name for name in self.names if name not in used and self.excluded_names.isdisjoint(dotted_ends(name))
        )


def dotted_ends(path: str) -> Iterator[str]:
    """The path itself and what follows each of its dots: `a.b.c`, `b.c`, `c`."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def parse_targets(fields: Mapping[str, Any], errors: list[ContentError]) -> Targets | None:
    """The targets, or None after adding to `errors`."""
    num_errors = len(errors)
    names, pattern = _target_modules(fields.get("target_modules"), errors)
    excluded_names, excluded_pattern = _exclude_modules(fields.get("exclude_modules"), errors)
    layers = _layers(fields.get("layers_to_transform"), errors)
    layer_lists = _layer_lists(fields.get("layers_pattern"), errors)
    if isinstance(fields.get("target_modules"), str):
        clashes = [key for key in ("layers_to_transform", "layers_pattern") if fields.get(key) is not None]
        errors += [InvalidAdapter(f"{key} together with target_modules given as a pattern") for key in clashes]
    elif fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
        errors.append(InvalidAdapter("layers_pattern without layers_to_transform"))
    if len(errors) > num_errors:
        return None
    return Targets(
        names=names,
        pattern=pattern,
        excluded_names=excluded_names,
        excluded_pattern=excluded_pattern,
        layers=layers,
        layer_lists=layer_lists,
    )


def _target_modules(value: object, errors: list[ContentError]) -> tuple[frozenset[str], PathMatcher | None]:
    if isinstance(value, str) and value:
        # All that the base model's shapes list is linear, and its head, which PEFT leaves out, is not listed.
        pattern = _every_path if value.lower() == _ALL_LINEAR else _pattern(whole_path, value, errors)
        return frozenset(), pattern
    names = _names(value)
    if not names:
        errors.append(InvalidAdapter(f"target_modules {quote(value)} is not a pattern or a non-empty list of names"))
        return frozenset(), None
    return names, None


def _exclude_modules(value: object, errors: list[ContentError]) -> tuple[frozenset[str], PathMatcher | None]:
    if value is None or value == "":
        return frozenset(), None
    if isinstance(value, str):
        return frozenset(), _pattern(whole_path, value, errors)
    names = _names(value)
    if names is None:
        errors.append(InvalidAdapter(f"exclude_modules {quote(value)} is not a pattern or a list of names"))
    return names or frozenset(), None


def _layers(value: object, errors: list[ContentError]) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        errors.append(InvalidAdapter(f"layers_to_transform {quote(value)} is not an integer >= 0 or a list of them"))
        return None
    return frozenset(layers)


def _layer_lists(value: object, errors: list[ContentError]) -> tuple[PathMatcher, ...]:
    texts = _names([value] if isinstance(value, str) and value else value or [])
    if texts is None:
        errors.append(InvalidAdapter(f"layers_pattern {quote(value)} is not a name or a list of names"))
        return ()
    found = (_pattern(layer_list, text, errors) for text in sorted(texts))
    return tuple(matcher for matcher in found if matcher is not None)


def _names(value: object) -> frozenset[str] | None:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        return None
    return frozenset(value)


def _every_path(path: str) -> bool:
    return True


def _pattern(kind: Callable[[str], PathMatcher], text: str, errors: list[ContentError]) -> PathMatcher | None:
    try:
        return kind(text)
    except ContentError as error:
        errors.append(error)
        return None
