"""Picks what computes: the kernels of a GPU or a CPU, the oracles where there are none, or their fixed forms."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lorasrv_kernels import cpu, fixed, reference
from lorasrv_kernels.attention_work import Tiling, tiling
from lorasrv_kernels.forward import ForwardKernels, LoraKernels


def forward_kernels(device: torch.device, *, deterministic: bool) -> ForwardKernels:
    """What a decoder on this device calls. Triton is loaded on a GPU only."""
    if deterministic:
        return fixed
    if device.type == "cuda":
        from lorasrv_kernels import gpu

        return gpu
    return _cpu_kernels(device)


def lora_kernels(device: torch.device) -> LoraKernels:
    """`sgmv_shrink` and `sgmv_expand` for this device."""
    if device.type == "cuda":
        from lorasrv_kernels import sgmv

        return sgmv
    return _cpu_kernels(device)


def _cpu_kernels(device: torch.device) -> ForwardKernels:
    found = _native(device)
    return reference if found is None else found


def _native(device: torch.device) -> cpu.CpuKernels | None:
    found = cpu.load() if device.type == "cpu" else None
    return None if isinstance(found, str) else found


def attention_tiling(
    kernels: ForwardKernels, device: torch.device, dtype: torch.dtype, head_dim: int, group: int
) -> Tiling | None:
    """How these kernels want attention cut, `group` being the query heads of a kv head; None where they do not ask."""
    if kernels is reference or kernels is fixed or isinstance(kernels, cpu.CpuKernels):
        return None
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return tiling(head_dim, group, dtype, capability=10 * major + minor)


@lru_cache
def sampler(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """`reference.sample`, or what computes the same on this device."""
    if device.type == "cuda":
        from lorasrv_kernels import sampling

        return sampling.sample
    found = _native(device)
    return reference.sample if found is None else found.sample
