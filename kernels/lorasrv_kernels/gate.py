"""What the launchers may ask Triton's compiler for, compiled with no GPU: registers, spills, tensor cores, vectors.

`python -m lorasrv_kernels.gate` prints the table of every variant, and ends with status 1 if one of them is wrong.
Words behind it choose: a compute capability such as 90, a part of the variants' names, such as a kernel or a type, or
what is not to be part of them, behind a hyphen.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorasrv_kernels.variant import Variant

KERNEL_MODULES = ("sgmv", "fused", "norm", "attention", "sampling")  # those of them that are there
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
    spills: int  # STL and LDL instructions
    mma: int
    wgmma: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]

    @property
    def faults(self) -> list[str]:
        found: list[str] = []
        if self.stack_bytes or self.spills:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spills} spill instructions")
        if self.shared_bytes > ARCHS[self.arch]:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.variant.tensor_cores and not self.mma + self.wgmma:
            found.append("no tensor core instruction")
        return found

    @property
    def row(self) -> str:
        loads = " ".join(f"ld{bits}:{count}" for bits, count in self.loads.items())
        stores = " ".join(f"st{bits}:{count}" for bits, count in self.stores.items())
        return (
            f"sm_{self.arch} regs {self.registers:3d} smem {self.shared_bytes:6d} spills {self.spills:3d} "
            f"HMMA {self.mma:4d} HGMMA {self.wgmma:3d} {loads:25s} {stores:15s} {self.variant.name} "
            f"{'; '.join(self.faults)}"
        ).rstrip()


def variants() -> Iterator[Variant]:
    """Those of every kernel module, from the tables that their launchers use."""
    for name in KERNEL_MODULES:
        if find_spec(f"lorasrv_kernels.{name}") is not None:
            yield from import_module(f"lorasrv_kernels.{name}").variants()


def compile_variant(variant: Variant, arch: int) -> Compiled:
    compiled = triton.compile(
        _source(variant),
        target=GPUTarget("cuda", arch, 32),
        options=variant.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = _tool("cuobjdump", "-res-usage", cubin.name), _tool("nvdisasm", "-c", cubin.name)
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE))
    return Compiled(
        variant=variant,
        arch=arch,
        registers=_usage(usage, "REG"),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=_usage(usage, "STACK"),
        spills=_count(opcodes, "STL", "LDL"),
        mma=_count(opcodes, "HMMA"),
        wgmma=_count(opcodes, "HGMMA"),
        loads=_widths(opcodes, "LDG", "LDGSTS"),
        stores=_widths(opcodes, "STG"),
    )


def _source(variant: Variant) -> ASTSource:
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


def _tool(name: str, *arguments: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([folder / name, *arguments], capture_output=True, text=True, check=True).stdout


def _usage(text: str, field: str) -> int:
    found = re.search(rf"\b{field}:(\d+)", text)
    assert found is not None, text
    return int(found[1])


def _count(opcodes: Mapping[str, int], *names: str) -> int:
    return sum(count for opcode, count in opcodes.items() if opcode.split(".")[0] in names)


def _widths(opcodes: Mapping[str, int], *names: str) -> dict[int, int]:
    found: Counter[int] = Counter()
    for opcode, count in opcodes.items():
        base, *suffixes = opcode.split(".")
        if base in names:
            bits = next((s for s in suffixes if re.fullmatch(r"U?(8|16|64|128)|S(8|16)", s)), "32")
            found[int(bits.lstrip("US"))] += count
    return dict(sorted(found.items()))


def main(words: Sequence[str]) -> int:
    """Print a line for each chosen variant; how many are wrong."""
    archs = [arch for arch in ARCHS if str(arch) in words] or list(ARCHS)
    parts = [word for word in words if not word.isdecimal()]
    chosen = [v for v in variants() if all((p.lstrip("-") in v.name) != p.startswith("-") for p in parts)]
    num_wrong = 0
    wanted = [(variant, arch) for variant, arch in product(chosen, archs) if arch >= variant.since]
    # Most of a compilation is not Python.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for compiled in pool.map(compile_variant, *zip(*wanted, strict=True)):
            num_wrong += bool(compiled.faults)
            print(compiled.row, flush=True)
    return num_wrong


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
