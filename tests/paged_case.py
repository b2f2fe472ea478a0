"""A batch of sequences over scattered pages, with NaN wherever nobody may read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_device import DEVICE
from lorasrv_kernels import reference

LAYERS = 2
NOWHERE = 10**6


@dataclass(frozen=True, kw_only=True)
class Shape:
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 8
    block_tokens: int = 4
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Case:
    """`sequences` are (rows, context)."""

    sequences: Sequence[tuple[int, int]]
    query: Tensor
    kv: Tensor
    block_tables: Tensor
    window: int | None

    @property
    def rows(self) -> list[int]:
        return [rows for rows, _ in self.sequences]

    @property
    def contexts(self) -> list[int]:
        return [context for _, context in self.sequences]

    def arguments(self) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, int | None]:
        """Those of `paged_attention` up to `out`, for layer 1."""
        starts = torch.tensor([0, *self.rows]).cumsum(0).to(torch.int32)
        contexts = torch.tensor(self.contexts, dtype=torch.int32)
        return (self.query, self.kv, 1, self.block_tables, starts.to(DEVICE), contexts.to(DEVICE), self.window)

    def expected(self) -> Tensor:
        """The oracle's answer, on numbers in float32, in float32."""
        out = torch.empty(self.query.shape, device=DEVICE)
        query, kv, *others = self.arguments()
        reference.paged_attention(query.float(), kv.float().nan_to_num(0.0), *others, out)
        return out


def random_case(
    sequences: Sequence[tuple[int, int]], window: int | None = None, shape: Shape | None = None, seed: int = 0
) -> Case:
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-context // shape.block_tokens) for _, context in sequences]
    # Page 0, which a masked look-up may name, is nobody's.
    pages = (torch.randperm(sum(num_blocks), generator=generator) + 1).to(torch.int32)
    page = (LAYERS, 2, shape.block_tokens, shape.kv_heads, shape.head_dim)
    kv = torch.full((len(pages) + 1, *page), float("nan"), dtype=shape.dtype)
    tables = torch.full((len(sequences), max(num_blocks)), NOWHERE, dtype=torch.int32)
    heads = shape.kv_heads * shape.group
    query = torch.randn(sum(rows for rows, _ in sequences), heads, shape.head_dim, generator=generator)
    for index, ((rows, context), own) in enumerate(zip(sequences, pages.split(num_blocks), strict=True)):
        tables[index, : len(own)] = own
        values = torch.randn(2, context, shape.kv_heads, shape.head_dim, generator=generator).to(shape.dtype)
        oldest = 0 if window is None else max(0, context - rows - window + 1)
        for position in range(oldest, context):
            kv[own[position // shape.block_tokens], 1, :, position % shape.block_tokens] = values[:, position]
    return Case(
        sequences=sequences,
        query=query.to(shape.dtype).to(DEVICE),
        kv=kv.to(DEVICE),
        block_tables=tables.to(DEVICE),
        window=window,
    )
