"""Picks what computes: the oracles, their batch-invariant forms, or the kernels of a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorasrv_kernels import fixed, reference
from lorasrv_kernels.attention_work import Tiling, tiling
from lorasrv_kernels.forward import ForwardKernels, LoraKernels


def forward_kernels(device: torch.device, *, deterministic: bool) -> ForwardKernels:
    """What a decoder on this device calls. Triton is loaded on a GPU only."""
    if deterministic:
        return fixed
    if device.type == "cuda":
        from lorasrv_kernels import gpu

        return gpu
    return reference


def lora_kernels(device: torch.device) -> LoraKernels:
    """`sgmv_shrink` and `sgmv_expand` for this device."""
    if device.type == "cuda":
        from lorasrv_kernels import sgmv

        return sgmv
    return reference


def attention_tiling(
    kernels: ForwardKernels, device: torch.device, dtype: torch.dtype, head_dim: int, group: int
) -> Tiling | None:
    """How these kernels want attention cut, `group` being the query heads of a kv head; None where they do not ask."""
    if kernels is reference or kernels is fixed:
        return None
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return tiling(head_dim, group, dtype, capability=10 * major + minor)


def sampler(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """`reference.sample`, or what computes the same on this device."""
    if device.type == "cuda":
        from lorasrv_kernels import sampling

        return sampling.sample
    return reference.sample
