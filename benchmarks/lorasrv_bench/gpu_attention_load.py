"""A step's attention on several layers of a pool of its own: each layer is the same work on other data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_bench.gpu_models import ModelShape
from lorasrv_bench.gpu_pool import BLOCK_TOKENS, DTYPE, fill_random, page_layout
from lorasrv_bench.gpu_section import NotRun, Section

Parts = tuple[tuple[int, int, int], ...]  # (sequences, rows of each, context of each)


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


def labels(parts: Parts) -> dict[str, object]:
    """Of a mixed step those of its parts, joined by a plus."""
    names = ("sequences", "rows", "context")
    return {name: "+".join(map(str, values)) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def lay_load(section: Section, parts: Parts) -> Load:
    """As many layers as make three times the cache. Raises NotRun where they do not fit."""
    model, device = section.size.model, section.device
    rows = [rows for sequences, rows, _ in parts for _ in range(sequences)]
    contexts = [context for sequences, _, context in parts for _ in range(sequences)]
    counts = [-(-context // BLOCK_TOKENS) for context in contexts]
    blocks = sum(counts)
    layer_bytes = blocks * page_layout(model, 1).page_bytes
    layers = max(2, -(-3 * section.size.cache_bytes // layer_bytes))
    if layers * layer_bytes > section.size.pool_bytes:
        raise NotRun(f"{layers} layers of {layer_bytes} bytes do not fit {section.size.pool_bytes} bytes")
    kv = torch.empty(blocks, layers, 2, BLOCK_TOKENS, model.num_kv_heads, model.head_dim, dtype=DTYPE, device=device)
    fill_random(kv.view(torch.uint8), 1.0, section.seed)
    pages = torch.randperm(blocks, generator=torch.Generator().manual_seed(section.seed)).split(counts)
    query = torch.randn(sum(rows), model.num_heads, model.head_dim, dtype=DTYPE, device=device)
    return Load(
        model=model,
        rows=tuple(rows),
        contexts=tuple(contexts),
        kv=kv,
        tables=torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True).to(device, torch.int32),
        starts=torch.tensor([0, *rows]).cumsum(0).to(device, torch.int32),
        lengths=torch.tensor(contexts, dtype=torch.int32, device=device),
        query=query,
        out=torch.empty_like(query),
    )
