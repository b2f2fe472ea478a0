"""A PEFT adapter's two files against the base model: every file, tensor and value is accounted for, or it is refused.

The result says which tensor is A and B of which module, where its bytes are and at which scale it acts; the
weights stay in the file, untouched. All reasons for a refusal are collected, not only the first.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.errors import (
    BaseMismatch,
    ContentError,
    ContentRefused,
    InvalidAdapter,
    MalformedFile,
    UnsupportedFeature,
    listing,
    quote,
)
from lorasrv_adapters.manifest import CONFIG_FILE, SERVING_FILE, WEIGHTS_FILE
from lorasrv_adapters.peft_config import PeftLoraConfig, parse_peft_config
from lorasrv_adapters.safetensors_header import (
    SafetensorsHeader,
    TensorEntry,
    parse_header,
    read_header,
    read_header_bytes,
)
from lorasrv_adapters.strict_json import parse_object
from lorasrv_adapters.values import bad_values

MAX_CONFIG_BYTES = 1 << 20
MAX_SERVING_BYTES = 16 << 10
DEFAULT_MAX_RANK = 256

_TENSOR_PREFIX = "base_model.model."
_WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, kw_only=True)
class LoraModuleSpec:
    """LoRA of one module of one layer: delta = scale * B @ (A @ x).

    `module` indexes `BaseShapes.modules`; `a` is `[rank, in_features]`, `b` is `[out_features, rank]`.
    """

    layer: int
    module: int
    rank: int
    scale: float
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """A validated adapter; `modules` by layer, then in directory order. `target_modules` names them, say `q_proj`.

    `serving` is the JSON object in the folder's serving.json, the defaults of its generations, in one spelling; None
    when there is none. What it may say is for whoever serves the adapter to check.
    """

    rank_min: int
    rank_max: int
    target_modules: tuple[str, ...]
    modules: tuple[LoraModuleSpec, ...]
    serving: str | None = None


# What else a server asks of an adapter, say that its pool can hold it and that its defaults are in bounds; returns the
# reasons to refuse it.
SpecCheck = Callable[[AdapterSpec], list[ContentError]]


def accept_all(spec: AdapterSpec) -> list[ContentError]:
    """The check of whoever serves nothing."""
    return []


def validate_folder(
    path: Path, base: BaseShapes, max_rank: int = DEFAULT_MAX_RANK, check: SpecCheck = accept_all
) -> AdapterSpec:
    """Everything about an adapter folder, all weights included; raises ContentRefused with every reason."""
    errors: list[ContentError] = []
    config_bytes = _read_capped(path / CONFIG_FILE, MAX_CONFIG_BYTES, errors)
    serving = _read_serving(path / SERVING_FILE, errors)
    try:
        with open_regular(path / WEIGHTS_FILE) as weights:
            return _validate(config_bytes, weights, serving, base, max_rank, check, errors)
    except MalformedFile as error:
        raise ContentRefused([*errors, error]) from None


def validate_bytes(
    config_bytes: bytes, weights: bytes, base: BaseShapes, max_rank: int, check: SpecCheck = accept_all
) -> AdapterSpec:
    """The same of an adapter whose two files are in memory; it has no serving.json."""
    errors: list[ContentError] = []
    config = _capped(BytesIO(config_bytes), CONFIG_FILE, MAX_CONFIG_BYTES, errors)
    try:
        return _validate(config, BytesIO(weights), None, base, max_rank, check, errors)
    except MalformedFile as error:
        raise ContentRefused([*errors, error]) from None


def read_spec(config_bytes: bytes, weights: BinaryIO, base: BaseShapes, max_rank: int) -> AdapterSpec:
    """The spec of files whose values were checked when they were published; raises ContentRefused."""
    try:
        header, file_bytes = read_header_bytes(weights)
    except MalformedFile as error:
        raise ContentRefused([error]) from None
    return _spec_of(config_bytes, header, file_bytes, base, max_rank)


@lru_cache(maxsize=16)
def _spec_of(config_bytes: bytes, header: bytes, file_bytes: int, base: BaseShapes, max_rank: int) -> AdapterSpec:
    """Kept, since adapters that were trained alike differ in their weights alone."""
    errors: list[ContentError] = []
    spec = _collect(config_bytes, lambda: parse_header(header, file_bytes), base, max_rank, errors)
    if errors or spec is None:
        raise ContentRefused(errors)
    return spec


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; raises MalformedFile for what is missing or is a folder, a pipe or a device."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MalformedFile(f"{path.name} is not a regular file")
        return path.open("rb")
    except FileNotFoundError:
        raise MalformedFile(f"{path.name} is missing; only safetensors adapters are accepted") from None


def max_file_bytes(base: BaseShapes, max_rank: int) -> dict[str, int]:
    """The most bytes each file of an adapter of this base can have: all modules at `max_rank` in float64."""
    elements = sum(module.in_features + module.out_features for module in base.modules) * base.num_layers * max_rank
    weights_bytes = 8 * elements + (1 << 20) + 8
    return {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: weights_bytes, SERVING_FILE: MAX_SERVING_BYTES}


def _read_capped(path: Path, max_bytes: int, errors: list[ContentError]) -> bytes | None:
    try:
        with open_regular(path) as file:
            return _capped(file, path.name, max_bytes, errors)
    except MalformedFile as error:
        errors.append(error)
        return None


def _capped(file: BinaryIO, name: str, max_bytes: int, errors: list[ContentError]) -> bytes | None:
    data = file.read(max_bytes + 1)
    if len(data) <= max_bytes:
        return data
    errors.append(MalformedFile(f"{name} is over the limit of {max_bytes} bytes"))
    return None


def _read_serving(path: Path, errors: list[ContentError]) -> str | None:
    if not os.path.lexists(path):
        return None
    data = _read_capped(path, MAX_SERVING_BYTES, errors)
    try:
        return None if data is None else json.dumps(parse_object(data, path.name), sort_keys=True)
    except MalformedFile as error:
        errors.append(error)
    except RecursionError:
        errors.append(MalformedFile(f"{path.name}: JSON nested too deep"))
    return None


def _validate(
    config_bytes: bytes | None,
    weights: BinaryIO,
    serving: str | None,
    base: BaseShapes,
    max_rank: int,
    check: SpecCheck,
    errors: list[ContentError],
) -> AdapterSpec:
    spec = _collect(config_bytes, lambda: read_header(weights), base, max_rank, errors)
    if spec is not None:
        spec = replace(spec, serving=serving)
        errors += check(spec)
        errors += bad_values(weights, _entries(spec), base.dtype)
    if errors or spec is None:
        raise ContentRefused(errors)
    return spec


def _collect(
    config_bytes: bytes | None,
    read: Callable[[], SafetensorsHeader],
    base: BaseShapes,
    max_rank: int,
    errors: list[ContentError],
) -> AdapterSpec | None:
    """The spec, or None after adding to `errors`."""
    config: PeftLoraConfig | None = None
    header: SafetensorsHeader | None = None
    try:
        if config_bytes is not None:
            config, found = parse_peft_config(config_bytes, max_rank)
            errors += found
    except MalformedFile as error:
        errors.append(error)
    try:
        header = read()
    except MalformedFile as error:
        errors.append(error)
    if config is None or header is None:
        return None
    num_errors = len(errors)
    modules = _match(config, header, base, errors)
    if len(errors) > num_errors:
        return None
    targeted = {spec.module for spec in modules}
    return AdapterSpec(
        rank_min=min(spec.rank for spec in modules),
        rank_max=max(spec.rank for spec in modules),
        target_modules=tuple(base.modules[module].path.rpartition(".")[2] for module in sorted(targeted)),
        modules=tuple(modules),
    )


def _match(
    config: PeftLoraConfig, header: SafetensorsHeader, base: BaseShapes, errors: list[ContentError]
) -> list[LoraModuleSpec]:
    """Pair tensors with the modules that the configuration targets; every tensor must be used."""
    targeted = _targeted(config, base, errors)
    remaining = _by_plain_name(header, errors)
    modules: list[LoraModuleSpec] = []
    missing: list[str] = []
    for layer, module, rank, scale in targeted:
        key = base.module_key(layer, module)
        a = remaining.pop(f"{_TENSOR_PREFIX}{key}.lora_A.weight", None)
        b = remaining.pop(f"{_TENSOR_PREFIX}{key}.lora_B.weight", None)
        missing += [f"{key}.lora_{side}" for side, entry in (("A", a), ("B", b)) if entry is None]
        if a is not None and b is not None:
            modules.append(LoraModuleSpec(layer=layer, module=module, rank=rank, scale=scale, a=a, b=b))
    if missing:
        errors.append(InvalidAdapter(f"targeted modules without their tensors: {listing(missing)}"))
    if remaining:
        names = listing(entry.name for entry in remaining.values())
        errors.append(UnsupportedFeature(f"tensors that no targeted module of this base model uses: {names}"))
    errors += _shape_errors(modules, base)
    return modules


def _targeted(
    config: PeftLoraConfig, base: BaseShapes, errors: list[ContentError]
) -> list[tuple[int, int, int, float]]:
    """(layer, module, rank, scale) of what the configuration targets, by layer, then in directory order."""
    places = [(layer, module) for layer in range(base.num_layers) for module in range(len(base.modules))]
    unknown = config.targets.unknown_names(base.module_key(layer, module) for layer, module in places)
    if unknown:
        errors.append(UnsupportedFeature(f"target_modules not served: {listing(unknown)}"))
    too_deep = sorted(layer for layer in config.targets.layers or () if layer >= base.num_layers)
    if too_deep:
        layers = listing(quote(layer) for layer in too_deep)
        errors.append(BaseMismatch(f"layers_to_transform {layers} of a base model of {base.num_layers} layers"))
    found = [
        (layer, module, *config.rank_and_scale(base.module_key(layer, module)))
        for layer, module in places
        if config.targets.selects(base.module_key(layer, module), layer)
    ]
    if not found and not unknown and not too_deep:
        errors.append(UnsupportedFeature("a configuration that targets no module of this base model"))
    return found


def _by_plain_name(header: SafetensorsHeader, errors: list[ContentError]) -> dict[str, TensorEntry]:
    """Tensors by name, without the adapter name that some files hold."""
    found: dict[str, TensorEntry] = {}
    twice: list[str] = []
    for entry in header.tensors.values():
        name = entry.name
        for side in ("lora_A", "lora_B"):
            if name.endswith(f".{side}.default.weight"):
                name = f"{name.removesuffix('.default.weight')}.weight"
        if name in found:
            twice.append(entry.name)
        found[name] = entry
    if twice:
        errors.append(InvalidAdapter(f"tensors given twice, with and without an adapter name: {listing(twice)}"))
    return found


def _shape_errors(modules: list[LoraModuleSpec], base: BaseShapes) -> Iterator[ContentError]:
    dtypes: list[str] = []
    ranks: list[str] = []
    shapes: list[str] = []
    for spec in modules:
        module = base.modules[spec.module]
        expected: Mapping[str, tuple[TensorEntry, tuple[int, ...], int]] = {
            "A": (spec.a, (spec.rank, module.in_features), 0),
            "B": (spec.b, (module.out_features, spec.rank), 1),
        }
        for entry, shape, rank_dim in expected.values():
            if entry.dtype not in _WEIGHT_DTYPES:
                dtypes.append(f"{entry.name} is {entry.dtype}")
            if len(entry.shape) != 2 or entry.shape[1 - rank_dim] != shape[1 - rank_dim]:
                shapes.append(f"{entry.name} is {list(entry.shape)}, not {list(shape)}")
            elif entry.shape[rank_dim] != spec.rank:
                ranks.append(f"{entry.name} is {list(entry.shape)} at r={spec.rank}")
    if dtypes:
        yield UnsupportedFeature(f"weights that are not one of {', '.join(_WEIGHT_DTYPES)}: {listing(dtypes)}")
    if ranks:
        yield InvalidAdapter(f"tensors whose rank is not r: {listing(ranks)}")
    if shapes:
        yield BaseMismatch(f"tensors that do not fit the base model: {listing(shapes)}")


def _entries(spec: AdapterSpec) -> Iterator[TensorEntry]:
    for module in spec.modules:
        yield module.a
        yield module.b
