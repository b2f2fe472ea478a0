"""The native kernels of every kind that this CPU runs; tests of what is not built here are skipped and say so."""

import pytest

from lorasrv_kernels import native
from lorasrv_kernels.cpu import CpuKernels

KINDS = [target.name for target in native.targets()]


def kernels_of(kind: str) -> CpuKernels:
    target = next(target for target in native.targets() if target.name == kind)
    if target not in native.runnable():
        pytest.skip(f"this CPU is no {kind}")
    if not target.library.exists():
        pytest.skip(f"the native kernels for {kind} are not built: python -m lorasrv_kernels.native")
    return CpuKernels(target.library)
