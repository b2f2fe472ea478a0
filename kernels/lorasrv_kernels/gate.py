"""What the launchers may ask Triton's compiler for, compiled with no GPU: registers, spills, tensor cores, vectors.

`python -m lorasrv_kernels.gate` prints the table of every variant, and ends with status 1 if one of them is wrong.
Registers and the stack, where registers would be spilled to, are the assembler's; instructions are counted in the PTX,
which names widths of accesses and tensor cores as the machine code does.
Words behind it choose: a compute capability such as 90, a part of the variants' names, such as a kernel or a type, or
what is not to be part of them, behind a hyphen.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorasrv_kernels.variant import Variant

KERNEL_MODULES = ("sgmv", "fused", "norm", "attention", "sampling")
# Compute capability and the shared memory, in bytes, that a block may have there.
ARCHS = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What came of a variant. Accesses of global memory are counted by their width in bits."""

    variant: Variant
    arch: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    mma: int
    wgmma: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]

    @property
    def faults(self) -> list[str]:
        found: list[str] = []
        if self.stack_bytes:
            found.append(f"spills to {self.stack_bytes} bytes of stack")
        if self.shared_bytes > ARCHS[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.variant.tensor_cores and not self.mma + self.wgmma:
            found.append("no tensor core instruction")
        return found

    @property
    def row(self) -> str:
        loads = " ".join(f"ld{bits}:{count}" for bits, count in sorted(self.loads.items()))
        stores = " ".join(f"st{bits}:{count}" for bits, count in sorted(self.stores.items()))
        return (
            f"sm_{self.arch} regs {self.registers:3d} smem {self.shared_bytes:6d} stack {self.stack_bytes:3d} "
            f"mma {self.mma:3d} wgmma {self.wgmma:2d} {loads:25s} {stores:15s} {self.variant.name} "
            f"{'; '.join(self.faults)}"
        ).rstrip()


@cache
def variants() -> tuple[Variant, ...]:
    """Those of every kernel module, from the tables that their launchers use."""
    modules = (import_module(f"lorasrv_kernels.{name}") for name in KERNEL_MODULES)
    return tuple(variant for module in modules for variant in module.variants())


def compile_variant(variant: Variant, arch: int) -> Compiled:
    compiled = triton.compile(source(variant), target=GPUTarget("cuda", arch, 32), options=variant.options)
    usage, ptx = _resource_usage(compiled.asm["cubin"]), compiled.asm["ptx"]
    return Compiled(
        variant=variant,
        arch=arch,
        registers=_field(usage, "REG"),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=_field(usage, "STACK"),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        loads=_widths(ptx, "ld") + _async_widths(ptx),
        stores=_widths(ptx, "st"),
    )


def source(variant: Variant) -> ASTSource:
    """What Triton compiles when the launcher calls the kernel."""
    names = variant.kernel.arg_names
    assert set(names) == {*variant.arguments, *variant.constexprs}, (variant.kernel.__name__, names)
    signature: dict[str, object] = {}
    divisible: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(names):
        kind = variant.arguments.get(name, "constexpr")
        parts = kind if isinstance(kind, tuple) else (kind,)
        types = [part.partition(":")[0] for part in parts]
        signature[name] = tuple(types) if isinstance(kind, tuple) else types[0]
        for place, part in enumerate(parts):
            if part.endswith(":16"):
                divisible[(index, place) if isinstance(kind, tuple) else (index,)] = [["tt.divisibility", 16]]
    absent = [name for name, kind in variant.arguments.items() if kind == "none"]
    constexprs = {(names.index(n),): v for n, v in [*variant.constexprs.items(), *((name, None) for name in absent)]}
    signature |= dict.fromkeys(absent, "constexpr")
    return ASTSource(variant.kernel, signature, constexprs, divisible)


def _resource_usage(cubin: bytes) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [folder / "cuobjdump", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found is not None, usage
    return int(found[1])


def _widths(ptx: str, opcode: str) -> Counter[int]:
    """Bits of an access of global memory, and how many such instructions there are."""
    found = re.findall(rf"\b{opcode}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return Counter(int(length or 1) * int(bits) for length, bits in found)


def _async_widths(ptx: str) -> Counter[int]:
    found = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)", ptx)
    return Counter(8 * int(num_bytes, 0) for num_bytes in found)


def row_of(number: int, arch: int) -> tuple[str, bool]:
    """A variant's row, and whether something is wrong with it. Processes cannot send variants to each other."""
    compiled = compile_variant(variants()[number], arch)
    return compiled.row, bool(compiled.faults)


def main(words: Sequence[str]) -> int:
    """Print a line for each chosen variant, and a summary; how many are wrong."""
    archs = [arch for arch in ARCHS if str(arch) in words] or list(ARCHS)
    parts = [word for word in words if not word.isdecimal()]
    wanted = [
        (number, arch)
        for number, variant in enumerate(variants())
        for arch in archs
        if arch >= variant.since and all((p.lstrip("-") in variant.name) != p.startswith("-") for p in parts)
    ]
    num_wrong, begin = 0, time.monotonic()
    # Half of a compilation is Python, or holds its lock.
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row, is_wrong in pool.map(row_of, *zip(*wanted, strict=True), chunksize=4):
            num_wrong += is_wrong
            print(row, flush=True)
    print(f"{len(wanted)} compiled, {num_wrong} wrong, {time.monotonic() - begin:.0f} s")
    return num_wrong


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
