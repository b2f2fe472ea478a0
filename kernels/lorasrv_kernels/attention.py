"""Paged attention on Triton: prefill chunks and decode rows of one batch, each key and value read once per kv head.

Semantics: `reference.paged_attention`. The query heads of a kv head are packed with their rows into the height of a
tile: packed row m is query row m // group and head m % group of its kv head. A tile meets its keys in blocks at
multiples of the block's width, in ascending order, with an online softmax in fp32 (Dao, "FlashAttention-2", 2023).
A block that a row sees nothing of leaves the row's bits as they are, so these do not follow from what else is in its
tile. Short rows' keys are cut to splits whose partial results, the fp32 triple

    top = the largest score, total = sum of 2^(score - top), sum = sum of 2^(score - top) * value

(scores in units of log 2), are merged in ascending order by a second kernel (Dao et al., "Flash-Decoding", 2023).
What the programs do stands in an `AttentionWork`; no program waits for another, and none asks the host.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.attention_work import ITEM_FIELDS, MAX_SPLITS, MERGE_FIELDS, AttentionWork, Tile, tiling
from lorasrv_kernels.variant import Variant, interpreting

_LOG2_E = 1.4426950408889634
_TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def _readable(position, low, end, WINDOWED: tl.constexpr):
    return ((position >= low) & (position < end)) if WINDOWED else position < end


@triton.jit
def _blocks(
    top,  # float32 [height]
    total,  # float32 [height]
    acc,  # float32 [height, BLOCK_DIM]
    query,  # [height, BLOCK_DIM]
    position,  # int32 [height]
    keys,  # pointer to the kv head in place 0 of page 0
    table,  # pointer to the sequence's first page
    stride_page,
    stride_token,
    scale,  # of scores, to units of log 2
    first,  # a multiple of WIDTH
    end,
    low,  # the lowest key that may be read
    window,
    MASKED: tl.constexpr,  # whether a row may see less than the whole of a block
    WINDOWED: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    dim = tl.arange(0, BLOCK_DIM)
    # A block's pages are looked up one block ahead, so that the loads behind them can start early.
    page = tl.load(
        table + (first + column) // BLOCK_TOKENS, mask=_readable(first + column, low, end, WINDOWED), other=0
    )
    for block in range(first, end, WIDTH):
        key_position = block + column
        at = page.to(tl.int64) * stride_page + key_position % BLOCK_TOKENS * stride_token
        pointers = keys + at[:, None] + dim[None, :]
        ahead = key_position + WIDTH
        page = tl.load(table + ahead // BLOCK_TOKENS, mask=_readable(ahead, low, end, WINDOWED), other=0)
        there = _readable(key_position, low, end, WINDOWED)
        if MASKED or HEAD_DIM != BLOCK_DIM:
            readable = dim[None, :] < HEAD_DIM
            if MASKED:
                readable = readable & there[:, None]
            key = tl.load(pointers, mask=readable, other=0.0)
            value = tl.load(pointers + BLOCK_TOKENS * stride_token, mask=readable, other=0.0)
        else:
            key = tl.load(pointers)
            value = tl.load(pointers + BLOCK_TOKENS * stride_token)
        if WIDEN:
            key, value = key.to(tl.float32), value.to(tl.float32)
        else:
            key, value = key.to(query.dtype), value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MASKED:
            seen = there[None, :] & (key_position[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (key_position[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # A row that has seen nothing yet stays at -inf, from which nothing can be subtracted.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit(
    do_not_specialize=["layer", "stride_table", "window", "group", "kv_heads"],
    do_not_specialize_on_alignment=["block_tables", "items", "counts"],
)
def attend_kernel(
    query,  # [num_tokens, num_heads, HEAD_DIM]
    kv,  # [num_pages, layers, 2, BLOCK_TOKENS, kv_heads, HEAD_DIM]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    sums,  # float32 [num_slots, num_heads, HEAD_DIM]
    stats,  # float32 [num_slots, num_heads, 2], top and total
    block_tables,  # int32 [num_sequences, stride_table]
    items,  # int32 [capacity, FIELDS]
    counts,  # int32 [at least 1], how many items
    layer,
    stride_query,
    stride_out,
    stride_page,
    stride_layer,
    stride_table,
    window,
    group,  # query heads of a kv head
    kv_heads,
    scale,  # float32
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,  # whether an item may be one of several of its rows
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    stride_token = kv_heads * HEAD_DIM
    packed = tl.arange(0, HEIGHT)
    dim = tl.arange(0, BLOCK_DIM)
    for unit in range(tl.program_id(0), tl.load(counts) * kv_heads, tl.num_programs(0)):
        # The heads of an item are neighbours, in programs as in memory.
        item = items + unit // kv_heads * FIELDS
        kv_head = unit % kv_heads  # pyright: ignore[reportOperatorIssue]
        sequence, first_row, num_rows = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        first_position, first_key, end_key = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
        low = first_key
        if WINDOWED:
            low = tl.maximum(low, first_position - window + 1)
        if low < end_key:
            row = packed // group
            head = kv_head * group + packed % group
            live = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
            at = (first_row + row).to(tl.int64)
            offset = head[:, None] * HEAD_DIM + dim[None, :]
            q = tl.load(query + at[:, None] * stride_query + offset, mask=live, other=0.0)
            if WIDEN:
                q = q.to(tl.float32)
            keys = kv + layer.to(tl.int64) * stride_layer + kv_head * HEAD_DIM
            table = block_tables + sequence.to(tl.int64) * stride_table
            position = first_position + row
            top = tl.full([HEIGHT], float("-inf"), tl.float32)
            total = tl.zeros([HEIGHT], tl.float32)
            acc = tl.zeros([HEIGHT, BLOCK_DIM], tl.float32)
            begin = low // WIDTH * WIDTH
            if not (SPLIT or WINDOWED):
                # Up to here every row sees all. A split is read in one loop: a second would start its loads anew.
                whole = tl.maximum(begin, tl.minimum((first_position + 1) // WIDTH * WIDTH, end_key))
                top, total, acc = _blocks(
                    top, total, acc, q, position, keys, table, stride_page, stride_token, scale, begin, whole, low,
                    window, False, WINDOWED, WIDTH, HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS, WIDEN,
                )  # fmt: skip
                begin = whole
            top, total, acc = _blocks(
                top, total, acc, q, position, keys, table, stride_page, stride_token, scale, begin, end_key, low,
                window, True, WINDOWED, WIDTH, HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS, WIDEN,
            )  # fmt: skip
            alone = True
            if SPLIT:
                alone = tl.load(item + 7) == 1
            if alone:
                result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
                tl.store(out + at[:, None] * stride_out + offset, result.to(out.dtype.element_ty), mask=live)
            else:
                place = (tl.load(item + 6) + row).to(tl.int64) * (kv_heads * group) + head
                tl.store(sums + place[:, None] * HEAD_DIM + dim[None, :], acc, mask=live)
                tl.store(stats + place * 2, top, mask=row < num_rows)
                tl.store(stats + place * 2 + 1, total, mask=row < num_rows)


@triton.jit(do_not_specialize=["window", "heads"], do_not_specialize_on_alignment=["merges", "counts"])
def merge_kernel(
    sums,  # float32 [num_slots, heads, HEAD_DIM]
    stats,  # float32 [num_slots, heads, 2]
    out,  # [num_tokens, heads, HEAD_DIM]
    merges,  # int32 [capacity, FIELDS]
    counts,  # int32 [at least 1], how many merges
    stride_out,
    window,
    heads,
    WINDOWED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MOST: tl.constexpr,  # splits of a row
    FIELDS: tl.constexpr,
):
    index = tl.program_id(0) // heads
    if index < tl.load(counts):
        merge = merges + index * FIELDS
        row, slot, step, num_splits = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2), tl.load(merge + 3)
        head = tl.program_id(0) % heads
        split = tl.arange(0, MOST)
        dim = tl.arange(0, BLOCK_DIM)
        there = split < num_splits
        if WINDOWED:
            # What lies before the window has not been computed.
            low = tl.maximum(tl.load(merge + 5) - window + 1, 0)
            there = there & (split >= low // tl.load(merge + 4))
        place = (slot + split * step).to(tl.int64) * heads + head
        tops = tl.load(stats + place * 2, mask=there, other=float("-inf"))
        totals = tl.load(stats + place * 2 + 1, mask=there, other=0.0)
        weights = tl.exp2(tops - tl.max(tops, 0))
        readable = there[:, None] & (dim < HEAD_DIM)[None, :]
        parts = tl.load(sums + place[:, None] * HEAD_DIM + dim[None, :], mask=readable, other=0.0)
        result = tl.sum(parts * weights[:, None], 0) / tl.sum(totals * weights, 0)
        to = out + row.to(tl.int64) * stride_out + head * HEAD_DIM + dim
        tl.store(to, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


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
    work: AttentionWork | None,  # of these starts and lengths, on the device
) -> None:
    """As `reference.paged_attention`; rows of no item are not written."""
    assert work is not None, "attention without its lists"
    heads, head_dim = query.shape[1:]
    block_tokens, kv_heads = kv.shape[3:5]
    assert heads == kv_heads * work.tiling.group, (heads, kv_heads, work.tiling)
    for tensor in (query, out, kv[:, 0]):
        assert tensor[0].is_contiguous(), tensor.stride()
    num_slots = max(1, work.num_slots)
    sums = torch.empty(num_slots, heads, head_dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(num_slots, heads, 2, dtype=torch.float32, device=query.device)
    windowed, widen = window is not None, interpreting()

    def attend(items: Tensor, count: Tensor, tile: Tile, num_programs: int, split: bool) -> None:
        variant = attend_variant(query.dtype, head_dim, block_tokens, tile, split, windowed, widen)
        variant.launch(
            num_programs,
            query,
            kv,
            out,
            sums,
            stats,
            block_tables,
            items,
            count,
            layer,
            query.stride(0),
            out.stride(0),
            kv.stride(0),
            kv.stride(1),
            block_tables.stride(0),
            window or 0,
            work.tiling.group,
            kv_heads,
            head_dim**-0.5 * _LOG2_E,
        )

    if len(work.tiles):
        # They differ in length, and more programs than fit are balanced by the device.
        attend(work.tiles, work.counts, work.tiling.tall, len(work.tiles) * kv_heads, False)
    if len(work.splits):
        assert work.tiling.short is not None, "splits without a tile for them"
        # They are of one length, and every program takes its share: as many as run at a time.
        programs = min(len(work.splits) * kv_heads, work.tiling.short.per_processor * _num_processors(query.device))
        attend(work.splits, work.counts[1:], work.tiling.short, programs, True)
    if len(work.merges):
        variant = merge_variant(query.dtype, head_dim, windowed)
        variant.launch(
            len(work.merges) * heads,
            sums,
            stats,
            out,
            work.merges,
            work.counts[2:],
            out.stride(0),
            window or 0,
            heads,
        )


@lru_cache
def attend_variant(
    dtype: torch.dtype,
    head_dim: int,
    block_tokens: int,
    tile: Tile,
    split: bool,
    windowed: bool,
    widen: bool,
) -> Variant:
    element = "*" + _TRITON_TYPES[dtype] + ":16"
    # Two high tiles fit on a processor; and the assembler spills narrow ones for an sm_80 unless it is told.
    limited = dtype.itemsize == 2 and not split and (head_dim <= 32 or (head_dim <= 64 and tile.num_warps == 8))
    aligned = {"query": element, "kv": element, "out": element, "sums": "*fp32:16", "stats": "*fp32:16"}
    numbers = dict.fromkeys(("stride_query", "stride_out", "stride_page", "stride_layer"), "i32:16")
    return Variant(
        kernel=attend_kernel,
        arguments={
            **aligned,
            **dict.fromkeys(("block_tables", "items", "counts"), "*i32"),
            **numbers,
            **dict.fromkeys(("layer", "stride_table", "window", "group", "kv_heads"), "i32"),
            "scale": "fp32",
        },
        constexprs={
            "WINDOWED": windowed,
            "SPLIT": split,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": _block_dim(head_dim),
            "BLOCK_TOKENS": block_tokens,
            "HEIGHT": tile.height,
            "WIDTH": tile.width,
            "FIELDS": ITEM_FIELDS,
            "WIDEN": widen,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=128 if limited else None,
        tensor_cores=dtype.itemsize == 2,
    )


@lru_cache
def merge_variant(dtype: torch.dtype, head_dim: int, windowed: bool) -> Variant:
    return Variant(
        kernel=merge_kernel,
        arguments={
            "sums": "*fp32:16",
            "stats": "*fp32:16",
            "out": "*" + _TRITON_TYPES[dtype] + ":16",
            "merges": "*i32",
            "counts": "*i32",
            "stride_out": "i32:16",
            **dict.fromkeys(("window", "heads"), "i32"),
        },
        constexprs={
            "WINDOWED": windowed,
            "HEAD_DIM": head_dim,
            "BLOCK_DIM": _block_dim(head_dim),
            "MOST": MAX_SPLITS,
            "FIELDS": MERGE_FIELDS,
        },
        num_warps=4,
        num_stages=1,
        tensor_cores=False,
    )


def variants() -> Iterator[Variant]:
    """Every kernel of the table at 16 tokens a block and up to 16 query heads of a kv head, whatever their number."""
    for dtype, head_dims in _HEAD_DIMS.items():
        for head_dim in head_dims:
            tiles: dict[tuple[Tile, bool], int] = {}  # with the least capability that takes it
            for capability, deterministic in product((80, 90), (False, True)):
                table = tiling(head_dim, 1, dtype, capability=capability, deterministic=deterministic)
                for tile in (table.tall, table.short):
                    if tile is not None:
                        # How many programs a processor holds is not compiled in.
                        kind = replace(tile, per_processor=1), tile is table.short
                        tiles.setdefault(kind, capability)
            for windowed in (False, True):
                for (tile, split), since in tiles.items():
                    found = attend_variant(dtype, head_dim, 16, tile, split, windowed, False)
                    yield replace(found, since=since)
                yield merge_variant(dtype, head_dim, windowed)


# Of published models, and of small ones. fp16 differs from bf16 in nothing but the instruction that multiplies.
_HEAD_DIMS = {
    torch.bfloat16: (32, 64, 80, 96, 128, 256),
    torch.float16: (128,),
    torch.float32: (32, 64, 80, 96, 128, 256),
}


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _block_dim(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())
