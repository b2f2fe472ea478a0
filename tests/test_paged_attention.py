"""The oracle of paged attention, its batch-invariant form and the CPU's kernels against plain attention, row by row,
with windows."""

import pytest
import torch

from lorasrv_kernels import fixed, reference
from lorasrv_kernels.forward import ForwardKernels
from native_kernels import KINDS, kernels_of

BLOCK, LAYERS, KV_HEADS, GROUP, HEAD_DIM = 4, 2, 2, 3, 8
SEQUENCES = ((1, 1), (1, 22), (9, 9), (5, 18), (16, 16), (3, 4), (20, 45))  # (rows, context)


def plain(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: range) -> torch.Tensor:
    """One row over the positions it sees, in double precision, head by head."""
    out = torch.empty(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]):
        k, v = (t[seen.start : seen.stop, head // GROUP].double() for t in (keys, values))
        out[head] = torch.softmax(k @ query[head].double() * HEAD_DIM**-0.5, dim=0) @ v
    return out


KERNELS: dict[str, ForwardKernels] = {"reference": reference, "fixed": fixed}


@pytest.mark.parametrize("kernels", [*KERNELS, *KINDS])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 9, 100])
def test_rows_see_their_window_and_pages_that_no_row_sees_are_not_read(window: int | None, kernels: str) -> None:
    generator = torch.Generator().manual_seed(window or 0)
    num_blocks = [-(-context // BLOCK) for _, context in SEQUENCES]
    pages = torch.randperm(sum(num_blocks), generator=generator).to(torch.int32)
    kv = torch.full((len(pages), LAYERS, 2, BLOCK, KV_HEADS, HEAD_DIM), float("nan"))
    tables = torch.full((len(SEQUENCES), max(num_blocks)), 10**6, dtype=torch.int32)
    query = torch.randn(sum(rows for rows, _ in SEQUENCES), KV_HEADS * GROUP, HEAD_DIM, generator=generator)
    want, first_row = torch.empty(query.shape, dtype=torch.float64), 0
    for index, ((rows, context), own) in enumerate(zip(SEQUENCES, pages.split(num_blocks), strict=True)):
        tables[index, : len(own)] = own
        keys, values = torch.randn(2, context, KV_HEADS, HEAD_DIM, generator=generator)
        oldest = 0 if window is None else max(0, context - rows - window + 1)
        for position in range(oldest // BLOCK * BLOCK, context):
            page = own[position // BLOCK]
            kv[page, 1, 0, position % BLOCK], kv[page, 1, 1, position % BLOCK] = keys[position], values[position]
        for row in range(rows):
            end = context - rows + row + 1
            seen = range(0 if window is None else max(0, end - window), end)
            want[first_row + row] = plain(query[first_row + row], keys, values, seen)
        first_row += rows
    starts = torch.tensor([0, *(rows for rows, _ in SEQUENCES)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    contexts = torch.tensor([context for _, context in SEQUENCES], dtype=torch.int32)
    out = torch.full_like(query, float("nan"))
    (KERNELS.get(kernels) or kernels_of(kernels)).paged_attention(query, kv, 1, tables, starts, contexts, window, out)
    torch.testing.assert_close(out, want.float(), atol=1e-5, rtol=0)
