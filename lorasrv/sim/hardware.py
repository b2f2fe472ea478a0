"""What a machine can do, as one small table each: the ceilings and overheads that the cost model asks for."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

from lorasrv.errors import ConfigurationError
from lorasrv.sim.measured import MeasuredSteps


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One accelerator and its host. Rates are per second; bandwidths and operations are what programs reach, the former
    apart for the base's weights, adapters' and KV.

    `kernel_s` is what a kernel that waits for the one before it adds to a step, `step_s` and `row_s` what the engine's
    own code takes per step and per sequence in it, `adapter_s` per adapter in it. With `runs_ahead` that code runs
    beside the device's step. `read_s` is what opening and checking an adapter's files takes before its bytes come.
    `steps` stand in place of all that concerns steps, where they were measured.
    """

    name: str
    memory_bytes: float
    read_bytes_per_s: float
    adapter_bytes_per_s: float
    kv_bytes_per_s: float
    flops_per_s: float
    copy_bytes_per_s: float
    disk_bytes_per_s: float
    read_s: float = 0.002
    kernel_s: float = 0.0
    step_s: float = 0.0
    row_s: float = 0.0
    adapter_s: float = 0.0
    runs_ahead: bool = True
    steps: MeasuredSteps | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            positive = name.endswith(("_bytes", "_per_s"))
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ConfigurationError(
                    f"hardware {self.name}: {name} is {value}; it must be {'> 0' if positive else '>= 0'}"
                )


_GB, _TB, _GIB = 1e9, 1e12, 2.0**30


def _gpu(name: str, memory_gib: float, read_tb: float, tflops: float, copy_gb: float) -> Hardware:
    return Hardware(
        name=name,
        memory_bytes=memory_gib * _GIB,
        read_bytes_per_s=read_tb * _TB,
        adapter_bytes_per_s=read_tb * _TB,
        kv_bytes_per_s=read_tb * _TB,
        flops_per_s=tflops * _TB,
        copy_bytes_per_s=copy_gb * _GB,
        disk_bytes_per_s=3 * _GB,
        kernel_s=1.8e-6,
        step_s=0.2e-3,
        row_s=4e-6,
    )


# It is assumed, not measured, that programs reach 90 % of the data sheets' bandwidth and 70 % of their dense bf16 rate.
HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        each.name: each
        for each in (
            _gpu("h200", 139, 4.3, 700, 50),
            _gpu("h100", 78, 3.0, 700, 50),
            _gpu("a100", 80, 1.8, 220, 25),
            _gpu("l40s", 48, 0.78, 250, 25),
            _gpu("l4", 24, 0.27, 85, 12),
        )
    }
)


def find_hardware(name: str) -> Hardware:
    """A machine of the table, or one of a JSON file that `write_hardware` wrote. Raises ConfigurationError."""
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"hardware {name!r} is no file and none of {', '.join(HARDWARE)}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigurationError(f"{name}: not JSON: {error}") from None
    known = {field.name: field.type for field in fields(Hardware)}
    if not isinstance(values, dict) or values.keys() - known.keys():
        unknown = sorted(values.keys() - known.keys()) if isinstance(values, dict) else "no object"
        raise ConfigurationError(f"{name}: {unknown}; a hardware table has {', '.join(known)}")
    steps = values.pop("steps", None)
    for key, value in values.items():
        kind = {"str": str, "bool": bool, "int": int}.get(
            str(getattr(known[key], "__name__", known[key])), (int, float)
        )
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigurationError(f"{name}: {key} is {value!r}")
    try:
        return Hardware(**values, steps=None if steps is None else MeasuredSteps.of(steps))
    except TypeError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def write_hardware(hardware: Hardware, path: Path) -> None:
    path.write_text(json.dumps(asdict(hardware), indent=2) + "\n")
