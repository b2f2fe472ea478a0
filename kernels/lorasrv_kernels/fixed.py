"""Batch-invariant forms of what a forward pass calls, under the names and signatures of `reference`.

Semantics: those of `reference`, and a row's bits follow from that row alone: from its own inputs, and in attention from
its position and the keys and values up to it. They do not follow from how many rows there are, from the other rows'
values, or from the row's place among them. So a request's bits are the same alone and in a batch, in chunks of any
size, recomputed after a preemption, and behind cached blocks. See He and Thinking Machines Lab, "Defeating
Nondeterminism in LLM Inference" (2025).

How: no library call is trusted to be batch-invariant, so each is made in one shape, whatever the step.

- Rows go through in tiles of one height, the last one padded with zeros. A tile is contiguous.
- A query row at position p is computed in the tile of `QUERY_ROWS` positions aligned around it, whether the other rows
  of that tile are there or not, over the keys up to that tile's end: shapes and the row's place follow from p alone.
  Keys that a row does not see get the weight 0 and what is not there is 0, so both add nothing.
- Only sums, comparisons, products and conversions of single elements run untiled elsewhere: IEEE 754 fixes their bits.
  Functions such as exp have no such rule: CPU libraries compute them differently in a loop's vectors and in its tail.

- On a CPU, rows meet weights in oneDNN, whose kernels treat the rows of a tile alike. MKL's fp32 product does not, even
  in one shape: with 3 outputs, say, bits depend on a row's place. Attention may use it: rows have fixed places there.

What is left to trust is that a call of one shape treats its rows alike and apart; `tests/test_fixed.py` shows it. A
kernel that stands in for one of these must keep the same: its tiles, its split of K and of the keys, and the order in
which partial sums meet are functions of the weights' shape and the row's position, never of the number of rows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lorasrv_kernels import reference
from lorasrv_kernels.attention_work import AttentionWork
from lorasrv_kernels.tiles import Delta

# A decode step pays for whole tiles, a prefill for calls. On a CPU a call over LoRA's thin matrices costs more than its
# rows do, and every row of a decoding sequence has a query tile of its own.
TILE_ROWS = 16
LORA_ROWS = 32
QUERY_ROWS = 8
# What torch gives to one thread (at::internal::GRAIN_SIZE), so that a tile's columns are not cut by thread counts.
_SERIAL_ELEMS = 32768


def by_rows(
    function: Callable[[Tensor], Tensor],  # of [height, ...], row by row
    x: Tensor,  # [num_rows, ...]
    height: int = TILE_ROWS,
) -> Tensor:  # [num_rows, ...]
    """function(x), called for tiles of `height` rows."""
    num_rows = x.shape[0]
    num_tiles = max(1, -(-num_rows // height))
    if num_rows < num_tiles * height:
        padded = x.new_zeros(num_tiles * height, *x.shape[1:])
        padded[:num_rows] = x
        x = padded
    return _joined([function(tile.contiguous()) for tile in x.split(height)])[:num_rows]


def _joined(tiles: list[Tensor]) -> Tensor:
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has here what these functions call: on a CPU, oneDNN for this dtype."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and (
        dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_linear(
    weight: Tensor,  # [out_features, in_features]
    *,
    keep: bool = False,  # as it always is
) -> Tensor:
    """On a CPU an opaque tensor in the layout that oneDNN reads fastest for a tile."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, TILE_ROWS) if weight.device.type == "cpu" else weight


def linear(
    x: Tensor,  # [num_rows, in_features]
    weight: Tensor,  # as `pack_linear` gave it, or itself
    bias: Tensor | None,  # [out_features]
) -> Tensor:  # [num_rows, out_features]
    return by_rows(lambda tile: _linear_tile(tile, weight, bias), x)


def _linear_tile(tile: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if tile.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(tile, weight, bias, "none", [], "")
    return torch.nn.functional.linear(tile, weight, bias)


def rms_norm(
    x: Tensor,  # [num_rows, ..., hidden]
    weight: Tensor,  # [hidden]
    eps: float,
) -> Tensor:  # [num_rows, ..., hidden]
    return by_rows(lambda tile: reference.rms_norm(tile, weight, eps), x)


def silu_mul(
    gate_up: Tensor,  # [num_tokens, 2 * intermediate]
    delta: Delta | None = None,
) -> Tensor:  # [num_tokens, intermediate]
    expand(delta, gate_up)
    return by_rows(_silu_mul_tile, gate_up)


def _silu_mul_tile(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    parts = [torch.nn.functional.silu(part) for part in gate.split(_SERIAL_ELEMS // TILE_ROWS, dim=-1)]
    return torch.cat(parts, dim=-1) * up


def paged_attention(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    layer: int,
    block_tables: Tensor,  # int32 [num_sequences, max_blocks]
    query_starts: Tensor,  # int32 [num_sequences + 1]
    context_lengths: Tensor,  # int32 [num_sequences]
    window: int | None,
    out: Tensor,  # [num_tokens, num_heads, head_dim]
    *,
    work: AttentionWork | None = None,  # not read here
) -> None:
    starts, contexts = query_starts.tolist(), context_lengths.tolist()
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        first_row = context - (end - start)
        first, keys, values = _aligned_kv(kv, layer, block_tables[sequence], first_row, context, window)
        lead = first_row % QUERY_ROWS
        rows = query.new_zeros(_up_to_tile(context) - first_row + lead, *query.shape[1:])
        rows[lead : lead + end - start] = query[start:end]
        places = range(first_row - lead, context, QUERY_ROWS)
        tiles = [
            _attend_tile(tile, place, keys, values, first, window)
            for place, tile in zip(places, rows.split(QUERY_ROWS), strict=True)
        ]
        out[start:end] = _joined(tiles)[lead : lead + end - start]


def _attend_tile(
    query: Tensor,  # [QUERY_ROWS, num_heads, head_dim], of the positions [place, place + QUERY_ROWS)
    place: int,
    keys: Tensor,  # float32 [num_keys, kv_heads, head_dim], of the positions from `first` on
    values: Tensor,  # float32 [num_keys, kv_heads, head_dim]
    first: int,
    window: int | None,
) -> Tensor:  # [QUERY_ROWS, num_heads, head_dim]
    seen_from = _first_key(place, window)
    seen = slice(seen_from - first, place + QUERY_ROWS - first)
    return reference.attend(query, keys[seen], values[seen], place, seen_from, window)


def _aligned_kv(
    kv: Tensor, layer: int, block_table: Tensor, first_row: int, context: int, window: int | None
) -> tuple[int, Tensor, Tensor]:
    """(first, keys, values) of the positions [first, end of the last query tile); 0 where no row may look."""
    block_tokens = kv.shape[3]
    first = _first_key(first_row // QUERY_ROWS * QUERY_ROWS, window)
    visible = 0 if window is None else max(0, first_row - window + 1)
    first_block = visible // block_tokens
    skipped = first_block * block_tokens
    pages = block_table[first_block : -(-context // block_tokens)].long()
    aligned = kv.new_zeros(2, _up_to_tile(context) - first, *kv.shape[4:], dtype=torch.float32)
    for which in (0, 1):
        stored = kv[pages, layer, which].flatten(0, 1)  # [tokens of these pages, kv_heads, head_dim]
        aligned[which, visible - first : context - first] = stored[visible - skipped : context - skipped]
    return first, aligned[0], aligned[1]


def _up_to_tile(num_tokens: int) -> int:
    return -(-num_tokens // QUERY_ROWS) * QUERY_ROWS


def _first_key(place: int, window: int | None) -> int:
    """Where the keys begin that a tile of rows from `place` on may see, down to a tile's border."""
    return 0 if window is None else max(0, place - window + 1) // QUERY_ROWS * QUERY_ROWS


def _matmul(
    a: Tensor,  # [num_rows, k]
    b: Tensor,  # [k, num_cols]
) -> Tensor:  # [num_rows, num_cols]
    return by_rows(lambda tile: _linear_tile(tile, b.T, None), a, LORA_ROWS)


sgmv_shrink = partial(reference.sgmv_shrink, matmul=_matmul)
sgmv_expand = partial(reference.sgmv_expand, matmul=_matmul)
expand = partial(reference.expand, sgmv=sgmv_expand)
logits = partial(reference.logits, linear=linear)
project = partial(reference.project, linear=linear, shrink=sgmv_shrink)
add = partial(reference.add, expand=expand)
add_rms_norm = partial(reference.add_rms_norm, expand=expand, norm=rms_norm)
rope_write_kv = partial(reference.rope_write_kv, expand=expand, norm=rms_norm)
