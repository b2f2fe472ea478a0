"""What a forward pass calls on a GPU, under the names and signatures of `reference`.

Products of the base model are the library's; what reads their output next is ours and adds what adapters add.
"""

import torch
from torch import Tensor

from lorasrv_kernels import reference
from lorasrv_kernels.attention import paged_attention as paged_attention
from lorasrv_kernels.fused import add as add
from lorasrv_kernels.fused import rope_write_kv as rope_write_kv
from lorasrv_kernels.fused import silu_mul as silu_mul
from lorasrv_kernels.norm import add_rms_norm as add_rms_norm
from lorasrv_kernels.norm import rms_norm as rms_norm
from lorasrv_kernels.sgmv import sgmv_expand as sgmv_expand
from lorasrv_kernels.sgmv import sgmv_shrink as sgmv_shrink
from lorasrv_kernels.tiles import TILE_ROWS, Delta, Module, Segments
from lorasrv_kernels.work import num_splits

pack_linear = reference.pack_linear
linear = reference.linear
logits = reference.logits
by_rows = reference.by_rows


def project(
    x: Tensor,  # [num_tokens, in_features]
    weight: Tensor,  # [sum of out_features, in_features]
    bias: Tensor | None,  # [sum of out_features]
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments | None,
    layer: int,
    modules: tuple[Module, ...],
) -> tuple[Tensor, Delta | None]:  # [num_tokens, sum of out_features]
    """In a captured graph the shrink is a branch of its own beside the product, which leaves room on the device where
    few rows are read by many weights."""
    if segments is None:
        return linear(x, weight, bias), None
    max_rank = -(-segments.max_rank // TILE_ROWS) * TILE_ROWS  # whole vectors
    shape = (num_splits(x.shape[1], x.shape[0]), len(modules), x.shape[0], max_rank)
    h = torch.empty(shape, dtype=torch.float32, device=x.device)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        current, branch = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
        branch.wait_stream(current)
        with torch.cuda.stream(branch):
            sgmv_shrink(x, pool, segments, layer, modules, h)
        out = linear(x, weight, bias)
        current.wait_stream(branch)
    else:
        sgmv_shrink(x, pool, segments, layer, modules, h)
        out = linear(x, weight, bias)
    return out, Delta(h=h, pool=pool, segments=segments, layer=layer, modules=modules)
