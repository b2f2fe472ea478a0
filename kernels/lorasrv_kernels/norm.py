"""RMSNorm on Triton, alone and behind the sum that it reads.

Semantics: those of `reference`, under the same names and signatures, but that x / sqrt(mean(x^2) + eps) * weight is
rounded once. A program has a row. What adapters add to a linear module's output comes before it (`fused.add`), spread
over the device: a program would wait long for all of B. What is tuned and what plain is as in `sgmv`.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels import fused
from lorasrv_kernels.sgmv import TRITON_TYPES, is_tuned
from lorasrv_kernels.tiles import Delta
from lorasrv_kernels.variant import ArgumentType, Variant

# The widest rows that a program holds in registers.
_BLOCKS = (256, 1024, 2048, 4096, 8192, 16384)


@triton.jit(do_not_specialize=("x_stride", "other_stride", "sum_stride", "normed_stride", "hidden"))
def _norm_kernel(
    x_ptr,
    x_stride,
    other_ptr,
    other_stride,
    sum_ptr,
    sum_stride,
    weight_ptr,
    normed_ptr,
    normed_stride,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < tl.multiple_of(tl.minimum(hidden, BLOCK), ALIGN)
    x = tl.load(x_ptr + tl.multiple_of(row * x_stride, ALIGN) + c, mask=mask, other=0.0)
    if other_ptr is not None:
        other = tl.load(other_ptr + tl.multiple_of(row * other_stride, ALIGN) + c, mask=mask, other=0.0)
        # What the next layer adds to is what is normed here.
        x = (x.to(tl.float32) + other.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + tl.multiple_of(row * sum_stride, ALIGN) + c, x, mask=mask)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    tl.store(normed_ptr + tl.multiple_of(row * normed_stride, ALIGN) + c, x * scale * weight, mask=mask)


def rms_norm(
    x: Tensor,  # [num_tokens, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
) -> Tensor:  # [num_tokens, hidden]
    normed = torch.empty_like(x)
    _launch((x, x.stride(0), None, 0, None, 0), normed, weight, eps)
    return normed


def add_rms_norm(
    residual: Tensor,  # [num_tokens, hidden]
    out: Tensor,  # [num_tokens, hidden], of a linear module
    delta: Delta | None,
    weight: Tensor,  # [hidden]
    eps: float,
) -> tuple[Tensor, Tensor]:  # [num_tokens, hidden], [num_tokens, hidden]
    if delta is not None:
        x = fused.add(residual, out, delta)
        return x, rms_norm(x, weight, eps)
    x, normed = torch.empty_like(residual), torch.empty_like(residual)
    _launch((residual, residual.stride(0), out, out.stride(0), x, x.stride(0)), normed, weight, eps)
    return x, normed


def _launch(rows: tuple[object, ...], normed: Tensor, weight: Tensor, eps: float) -> None:
    num_rows, hidden = normed.shape
    if not num_rows:
        return
    strides = (*rows[1::2], normed.stride(0))
    assert hidden <= _BLOCKS[-1], f"rows of {hidden} elements; at most {_BLOCKS[-1]} can be normed"
    tuned = is_tuned(normed.dtype, hidden, *(stride for stride in strides if isinstance(stride, int)))
    block = next(block for block in _BLOCKS if block >= hidden) if tuned else _BLOCKS[-1]
    variant = norm_variant(normed.dtype, rows[2] is not None, block, tuned)
    variant.launch(num_rows, *rows, weight, normed, normed.stride(0), hidden, eps)


@lru_cache
def norm_variant(dtype: torch.dtype, adds: bool, block: int, tuned: bool) -> Variant:
    pointer = f"*{TRITON_TYPES[dtype]}:16"
    arguments: dict[str, ArgumentType] = {
        **dict.fromkeys(("x_ptr", "weight_ptr", "normed_ptr"), pointer),
        **dict.fromkeys(("other_ptr", "sum_ptr"), pointer if adds else "none"),
        **dict.fromkeys(("x_stride", "other_stride", "sum_stride", "normed_stride", "hidden"), "i32"),
        "eps": "fp32",
    }
    return Variant(
        kernel=_norm_kernel,
        arguments=arguments,
        constexprs={"BLOCK": block, "ALIGN": 8 if tuned else 1},
        num_warps=min(16, max(1, block // 512)),
        num_stages=1,
        tensor_cores=False,
    )


def variants() -> Iterator[Variant]:
    """Everything that the launchers can choose on a GPU."""
    for adds in (False, True):
        for block in _BLOCKS:
            yield norm_variant(torch.bfloat16, adds, block, True)
        for dtype in TRITON_TYPES:
            yield norm_variant(dtype, adds, _BLOCKS[-1], False)
