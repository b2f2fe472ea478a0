"""A step's attention on several layers of a pool of its own: each layer is the same work on other data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_bench.gpu_models import ModelShape
from lorasrv_bench.gpu_pool import BLOCK_TOKENS, DTYPE, fill_random, page_layout
from lorasrv_bench.gpu_section import NotRun, Section


@dataclass(frozen=True, kw_only=True)
class Load:
    model: ModelShape
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    kv: Tensor  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    tables: Tensor  # int32 [num_sequences, max_blocks]
    starts: Tensor  # int32 [num_sequences + 1]
    lengths: Tensor  # int32 [num_sequences]
    query: Tensor  # [num_tokens, num_heads, head_dim]
    out: Tensor  # [num_tokens, num_heads, head_dim]

    @property
    def num_layers(self) -> int:
        return self.kv.shape[1]


def lay_load(section: Section, sequences: int, rows: int, context: int) -> Load:
    """As many layers as make three times the cache. Raises NotRun where they do not fit."""
    model, device = section.size.model, section.device
    blocks = sequences * -(-context // BLOCK_TOKENS)
    layer_bytes = blocks * page_layout(model, 1).page_bytes
    layers = max(2, -(-3 * section.size.cache_bytes // layer_bytes))
    if layers * layer_bytes > section.size.pool_bytes:
        raise NotRun(f"{layers} layers of {layer_bytes} bytes do not fit {section.size.pool_bytes} bytes")
    kv = torch.empty(blocks, layers, 2, BLOCK_TOKENS, model.num_kv_heads, model.head_dim, dtype=DTYPE, device=device)
    fill_random(kv.view(torch.uint8), 1.0, section.seed)
    pages = torch.randperm(blocks, generator=torch.Generator().manual_seed(section.seed))
    query = torch.randn(sequences * rows, model.num_heads, model.head_dim, dtype=DTYPE, device=device)
    return Load(
        model=model,
        rows=(rows,) * sequences,
        contexts=(context,) * sequences,
        kv=kv,
        tables=pages.view(sequences, -1).to(device, torch.int32),
        starts=torch.arange(0, (sequences + 1) * rows, rows).to(device, torch.int32),
        lengths=torch.full((sequences,), context, dtype=torch.int32, device=device),
        query=query,
        out=torch.empty_like(query),
    )
