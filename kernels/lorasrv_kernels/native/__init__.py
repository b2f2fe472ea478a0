"""The native code of `cpu`: its sources, how they are compiled, and which of the compiled libraries runs here.

Loads no torch and needs nothing but a C++ compiler: the build of the package runs it as a program.
"""

import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno")
COMPILE_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of CPU that a library is compiled for; it runs where /proc/cpuinfo lists all `needs`."""

    name: str
    machines: frozenset[str]
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()

    @property
    def library(self) -> Path:
        return FOLDER / f"{self.name}.so"


_X86 = frozenset({"x86_64", "AMD64"})
# The fastest first.
TARGETS = (
    Target(
        name="avx512_bf16",
        machines=_X86,
        flags=("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
        needs=frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16"}),
    ),
    Target(name="avx2", machines=_X86, flags=("-march=x86-64-v3",), needs=frozenset({"avx2", "fma", "bmi2", "movbe"})),
    Target(name="neon", machines=frozenset({"aarch64", "arm64"}), flags=()),
)


def targets() -> tuple[Target, ...]:
    """What this machine's compiler is asked for."""
    if sys.platform != "linux":
        return ()
    return tuple(target for target in TARGETS if platform.machine() in target.machines)


def runnable(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[Target, ...]:
    """Those that this CPU can run, the fastest first."""
    features = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    return tuple(target for target in targets() if target.needs <= features)


def find(cpuinfo: Path = Path("/proc/cpuinfo")) -> Path | str:
    """The library for this CPU, or why there is none."""
    if not targets():
        return f"not written for {sys.platform} on {platform.machine()}"
    kinds = runnable(cpuinfo)
    if not kinds:
        return f"this CPU has neither {' nor '.join(target.name for target in targets())}"
    built = next((target.library for target in kinds if target.library.exists()), None)
    return built or "not built"


def compile_all(compiler: str | None = None) -> list[str]:
    """Compile for every target. What went wrong, if anything did; what could be compiled is there all the same."""
    compiler = compiler or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return ["there is no C++ compiler"]
    return [failure for target in targets() if (failure := _compile(compiler, target)) is not None]


def _compile(compiler: str, target: Target) -> str | None:
    # A running process keeps the library that it has loaded: the new one comes by another file.
    made = target.library.with_suffix(".tmp")
    command = [compiler, *COMMON_FLAGS, *target.flags, *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{target.name}: {error}"
    if done.returncode != 0:
        return f"{target.name}: {done.stderr.strip()[-2000:]}"
    made.replace(target.library)
    return None
