"""What reads a linear module's output next, on Triton: one launch, which also adds what the adapters have to add.

Semantics: those of `reference`, under the same names and signatures, but that intermediate results are not rounded: the
base output and the adapters' part are added, normed, rotated or multiplied in fp32, and rounded once. A linear module's
output is only read. Of a step with adapters, rows that lie in no row block of its work are not computed.

An item is (row block, column tile): a tile of gate and of up; a head's two halves; a tile of the residual. Row blocks
are those of the step's work, or where there are no adapters just so many rows. What is tuned and what plain is as in
`sgmv`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.sgmv import (
    ITEM_SIZES,
    LORA_CUTS,
    LORA_NUMBERS,
    PLAIN_SIZE,
    TRITON_TYPES,
    expand_halves,
    expand_tile,
    is_aligned,
    is_tuned,
    item_size,
    least_chunk,
    load_row_block,
    lora_arguments,
    lora_types,
    num_row_blocks,
    share,
)
from lorasrv_kernels.tiles import Delta
from lorasrv_kernels.variant import ArgumentType, Variant, interpreting, num_programs
from lorasrv_kernels.work import DECODE_HEIGHT, PREFILL_HEIGHT

# Rows of a block where there are no adapters, and columns of its tile; a head is a tile.
_ROWS, _COLS, _HEAD_ROWS = 4, 512, 16


@triton.jit
def num_blocks(counts_ptr, row_parts, num_rows, HEIGHT: tl.constexpr):
    if counts_ptr is None:
        return tl.cdiv(num_rows, HEIGHT)
    else:
        return num_row_blocks(counts_ptr, row_parts)


@triton.jit
def row_block(row_blocks_ptr, directories_ptr, block, row_parts, num_rows, HEIGHT: tl.constexpr):
    """As `load_row_block`; without lists, the next rows and no adapter."""
    if row_blocks_ptr is None:
        rows = block * HEIGHT + tl.arange(0, HEIGHT)
        return rows.to(tl.int64), rows < num_rows, 0, tl.cast(0, tl.int64)
    else:
        return load_row_block(row_blocks_ptr, directories_ptr, block, row_parts, HEIGHT)


@triton.jit(do_not_specialize=(*LORA_NUMBERS, *LORA_CUTS, "gate_up_stride", "act_stride", "num_rows", "intermediate"))
def _silu_mul_kernel(
    gate_up_ptr,
    gate_up_stride,
    act_ptr,
    act_stride,
    num_rows,
    intermediate,
    h_ptr,
    split_stride,
    module_stride,
    row_stride,
    num_splits,
    words_ptr,
    elems_ptr,
    first_header,
    row_blocks_ptr,
    counts_ptr,
    directories_ptr,
    row_parts,
    cols_0,
    chunk_0,
    odd_chunk_0,
    cols_1,
    chunk_1,
    odd_chunk_1,
    cols_2,
    chunk_2,
    odd_chunk_2,
    HEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    lora = (h_ptr, split_stride, module_stride, row_stride, num_splits, words_ptr, elems_ptr, first_header)
    c = tl.arange(0, BLOCK_C)
    num_tiles = tl.cdiv(intermediate, BLOCK_C)
    begin, end = share(num_blocks(counts_ptr, row_parts, num_rows, HEIGHT) * num_tiles)  # pyright: ignore[reportGeneralTypeIssues]
    for item in range(begin, end):
        col = item % num_tiles * BLOCK_C
        rows, in_rows, rank, directory = row_block(
            row_blocks_ptr, directories_ptr, item // num_tiles, row_parts, num_rows, HEIGHT
        )
        mask = in_rows[:, None] & (c < tl.multiple_of(tl.minimum(intermediate - col, BLOCK_C), ALIGN))[None, :]
        gate_ptr = gate_up_ptr + tl.multiple_of(rows[:, None] * gate_up_stride + col, [1, ALIGN]) + c[None, :]
        up_ptr = (
            gate_up_ptr + tl.multiple_of(rows[:, None] * gate_up_stride + (intermediate + col), [1, ALIGN]) + c[None, :]
        )
        gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
        if row_blocks_ptr is not None:  # noqa: SIM102 - known when the kernel is compiled
            if rank > 0:
                cut = (intermediate, chunk_0, odd_chunk_0)
                gate = expand_tile(gate, lora, directory, 0, rows, in_rows, col, cut, BLOCK_R, ALIGN, WIDEN)
                up = expand_tile(up, lora, directory, 1, rows, in_rows, col, cut, BLOCK_R, ALIGN, WIDEN)
        act = act_ptr + tl.multiple_of(rows[:, None] * act_stride + col, [1, ALIGN]) + c[None, :]
        tl.store(act, gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit(
    do_not_specialize=(*LORA_NUMBERS, *LORA_CUTS, "residual_stride", "base_stride", "out_stride", "num_rows", "hidden")
)
def _add_kernel(
    residual_ptr,
    residual_stride,
    base_ptr,
    base_stride,
    out_ptr,
    out_stride,
    num_rows,
    hidden,
    h_ptr,
    split_stride,
    module_stride,
    row_stride,
    num_splits,
    words_ptr,
    elems_ptr,
    first_header,
    row_blocks_ptr,
    counts_ptr,
    directories_ptr,
    row_parts,
    cols_0,
    chunk_0,
    odd_chunk_0,
    cols_1,
    chunk_1,
    odd_chunk_1,
    cols_2,
    chunk_2,
    odd_chunk_2,
    HEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    lora = (h_ptr, split_stride, module_stride, row_stride, num_splits, words_ptr, elems_ptr, first_header)
    c = tl.arange(0, BLOCK_C)
    num_tiles = tl.cdiv(hidden, BLOCK_C)
    begin, end = share(num_blocks(counts_ptr, row_parts, num_rows, HEIGHT) * num_tiles)  # pyright: ignore[reportGeneralTypeIssues]
    for item in range(begin, end):
        col = item % num_tiles * BLOCK_C
        rows, in_rows, rank, directory = row_block(
            row_blocks_ptr, directories_ptr, item // num_tiles, row_parts, num_rows, HEIGHT
        )
        mask = in_rows[:, None] & (c < tl.multiple_of(tl.minimum(hidden - col, BLOCK_C), ALIGN))[None, :]
        base = base_ptr + tl.multiple_of(rows[:, None] * base_stride + col, [1, ALIGN]) + c[None, :]
        residual = residual_ptr + tl.multiple_of(rows[:, None] * residual_stride + col, [1, ALIGN]) + c[None, :]
        acc = tl.load(base, mask=mask, other=0.0).to(tl.float32)
        acc += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        if row_blocks_ptr is not None:  # noqa: SIM102 - known when the kernel is compiled
            if rank > 0:
                cut = (hidden, chunk_0, odd_chunk_0)
                acc = expand_tile(acc, lora, directory, 0, rows, in_rows, col, cut, BLOCK_R, ALIGN, WIDEN)
        out = out_ptr + tl.multiple_of(rows[:, None] * out_stride + col, [1, ALIGN]) + c[None, :]
        tl.store(out, acc, mask=mask)


@triton.jit
def store_halves(out_ptr, place, head, half, low, high, mask, ALIGN: tl.constexpr):
    c = tl.arange(0, low.shape[1])[None, :]
    tl.store(out_ptr + tl.multiple_of(place[:, None] + head * 2 * half, [1, ALIGN]) + c, low, mask=mask)
    tl.store(out_ptr + tl.multiple_of(place[:, None] + (head * 2 + 1) * half, [1, ALIGN]) + c, high, mask=mask)


@triton.jit(
    do_not_specialize=(
        *LORA_NUMBERS,
        *LORA_CUTS,
        "qkv_stride",
        "query_stride",
        "angle_stride",
        "page_stride",
        "layer_offset",
        "value_offset",
        "place_stride",
        "block_tokens",
        "num_rows",
        "num_heads",
        "kv_heads",
        "head_dim",
    )
)
def _rope_write_kv_kernel(
    qkv_ptr,
    qkv_stride,
    query_ptr,
    query_stride,
    query_norm_ptr,
    key_norm_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    angle_stride,
    kv_ptr,
    page_stride,
    layer_offset,
    value_offset,
    place_stride,
    block_tokens,
    slots_ptr,
    num_rows,
    num_heads,
    kv_heads,
    head_dim,
    h_ptr,
    split_stride,
    module_stride,
    row_stride,
    num_splits,
    words_ptr,
    elems_ptr,
    first_header,
    row_blocks_ptr,
    counts_ptr,
    directories_ptr,
    row_parts,
    cols_0,
    chunk_0,
    odd_chunk_0,
    cols_1,
    chunk_1,
    odd_chunk_1,
    cols_2,
    chunk_2,
    odd_chunk_2,
    HEIGHT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    lora = (h_ptr, split_stride, module_stride, row_stride, num_splits, words_ptr, elems_ptr, first_header)
    c = tl.arange(0, BLOCK_C)
    half = tl.multiple_of(head_dim // 2, ALIGN)
    in_half = c < tl.multiple_of(tl.minimum(half, BLOCK_C), ALIGN)
    all_heads = num_heads + 2 * kv_heads
    begin, end = share(num_blocks(counts_ptr, row_parts, num_rows, HEIGHT) * all_heads)  # pyright: ignore[reportGeneralTypeIssues]
    for item in range(begin, end):
        head = item % all_heads
        rows, in_rows, rank, directory = row_block(
            row_blocks_ptr, directories_ptr, item // all_heads, row_parts, num_rows, HEIGHT
        )
        mask = in_rows[:, None] & in_half[None, :]
        first_ptr = qkv_ptr + tl.multiple_of(rows[:, None] * qkv_stride + head * head_dim, [1, ALIGN]) + c[None, :]
        at_half = rows[:, None] * qkv_stride + (head * head_dim + half)
        second_ptr = qkv_ptr + tl.multiple_of(at_half, [1, ALIGN]) + c[None, :]
        first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(second_ptr, mask=mask, other=0.0).to(tl.float32)
        is_query = head < num_heads
        is_value = head >= num_heads + kv_heads
        own_head = head - tl.where(is_query, 0, tl.where(is_value, num_heads + kv_heads, num_heads))
        if row_blocks_ptr is not None:  # noqa: SIM102 - known when the kernel is compiled
            if rank > 0:
                module = tl.where(is_query, 0, tl.where(is_value, 2, 1))
                own_cols = tl.where(is_query, cols_0, cols_1)
                chunk = tl.where(is_query, chunk_0, chunk_1)
                cut = (own_cols, chunk, tl.where(is_query, odd_chunk_0, odd_chunk_1))
                col = own_head * head_dim
                first, second = expand_halves(  # pyright: ignore[reportGeneralTypeIssues]
                    first,
                    second,
                    lora,
                    directory,
                    module,
                    rows,
                    in_rows,
                    col,
                    half,
                    cut,
                    BLOCK_R,
                    ALIGN,
                    WIDEN,
                )
        angles = tl.multiple_of(rows[:, None] * angle_stride, [1, ALIGN]) + c[None, :]
        cos = tl.load(cos_ptr + angles, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles, mask=mask, other=0.0).to(tl.float32)
        if is_value:  # neither normed nor rotated
            cos, sin = cos * 0 + 1, sin * 0
        elif query_norm_ptr is not None:
            if is_query:
                low_weight = tl.load(query_norm_ptr + c, mask=in_half, other=0.0)
                high_weight = tl.load(query_norm_ptr + half + c, mask=in_half, other=0.0)
            else:
                low_weight = tl.load(key_norm_ptr + c, mask=in_half, other=0.0)
                high_weight = tl.load(key_norm_ptr + half + c, mask=in_half, other=0.0)
            squares = tl.where(in_half[None, :], first * first + second * second, 0.0)
            scale = tl.rsqrt(tl.sum(squares, axis=1) / head_dim + eps)[:, None]
            first *= scale * low_weight.to(tl.float32)[None, :]
            second *= scale * high_weight.to(tl.float32)[None, :]
        low, high = first * cos - second * sin, second * cos + first * sin
        if is_query:
            store_halves(query_ptr, rows * query_stride, head, half, low, high, mask, ALIGN)
        else:
            slot = tl.load(slots_ptr + rows, mask=in_rows, other=0)
            place = slot // block_tokens * page_stride + slot % block_tokens * place_stride
            place += layer_offset + tl.where(is_value, value_offset, 0)
            store_halves(kv_ptr, place, own_head, half, low, high, mask, ALIGN)


def silu_mul(
    gate_up: Tensor,  # [num_tokens, 2 * intermediate]
    delta: Delta | None = None,
) -> Tensor:  # [num_tokens, intermediate]
    num_rows, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    act = gate_up.new_empty(num_rows, intermediate)
    _launch(
        _silu_variant,
        delta,
        is_tuned(gate_up.dtype, intermediate, gate_up.stride(0)),
        (gate_up, gate_up.stride(0), act, act.stride(0), num_rows, intermediate),
        lambda block: -(-intermediate // block),
    )
    return act


def add(
    residual: Tensor,  # [num_tokens, hidden]
    out: Tensor,  # [num_tokens, hidden], of a linear module
    delta: Delta | None,
) -> Tensor:  # [num_tokens, hidden]
    x, (num_rows, hidden) = torch.empty_like(residual), residual.shape
    tuned = is_tuned(residual.dtype, hidden, residual.stride(0), out.stride(0))
    rows = (residual, residual.stride(0), out, out.stride(0), x, x.stride(0), num_rows, hidden)
    _launch(_add_variant, delta, tuned, rows, lambda block: -(-hidden // block))
    return x


def rope_write_kv(
    qkv: Tensor,  # [num_tokens, (num_heads + 2 * kv_heads) * head_dim], of a linear module
    delta: Delta | None,
    norms: tuple[Tensor, Tensor] | None,  # [head_dim] for queries and for keys
    eps: float,
    cos: Tensor,  # [num_tokens, head_dim / 2]
    sin: Tensor,  # [num_tokens, head_dim / 2]
    kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    layer: int,
    slots: Tensor,  # int64 [num_tokens]
) -> Tensor:  # [num_tokens, num_heads, head_dim]
    kv_heads, head_dim = kv.shape[4:]
    num_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    half, all_heads = head_dim // 2, num_heads + 2 * kv_heads
    assert cos.stride() == sin.stride() and cos.stride(1) == 1 and kv.stride(4) == head_dim, (cos.stride(), kv.stride())
    query = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    query_norm, key_norm = norms or (None, None)
    arguments = (
        *(qkv, qkv.stride(0), query, query.stride(0), query_norm, key_norm, eps, cos, sin, cos.stride(0)),
        *(kv, kv.stride(0), layer * kv.stride(1), kv.stride(2), kv.stride(3), kv.shape[3]),
        *(slots, qkv.shape[0], num_heads, kv_heads, head_dim),
    )
    tuned = is_tuned(qkv.dtype, half, qkv.stride(0), cos.stride(0))
    if delta is not None:
        # Halves of a power of two begin at multiples of themselves, so no border of a chunk divides them.
        tuned = tuned and half & (half - 1) == 0 and half <= least_chunk(delta.modules)
    variant = partial(_rope_variant, norms is not None, max(_HALVES[0], triton.next_power_of_2(half)))
    _launch(variant, delta, tuned, arguments, lambda _: all_heads)
    return query


def _launch(
    variant_of: Callable[..., Variant],
    delta: Delta | None,
    tuned: bool,
    arguments: tuple[object, ...],
    num_tiles: Callable[[int], int],  # of a row, for the columns of a tile
) -> None:
    tensor = arguments[0]
    assert isinstance(tensor, Tensor) and tensor.stride(-1) == 1
    if delta is None:
        variant = variant_of(tensor.dtype, None, 0, _COLS, tuned, interpreting())
        num_blocks = -(-tensor.shape[0] // variant.constexprs["HEIGHT"])
        # Nothing is gained by fewer programs, as there is no table to read.
        programs = max(1, num_blocks * num_tiles(variant.constexprs["BLOCK_C"]))
        variant.launch(programs, *arguments, *(None for _ in _NO_LORA))
        return
    work, tuned = delta.segments.work, tuned and is_aligned(delta)
    height, rank_step = item_size(work, tuned)
    variant = variant_of(tensor.dtype, height, rank_step, least_chunk(delta.modules), tuned, interpreting())
    blocks = work.row_blocks.shape[0] * (work.height // height)
    programs = num_programs(blocks * num_tiles(variant.constexprs["BLOCK_C"]), tensor.device)
    variant.launch(programs, *arguments, *lora_arguments(delta, tensor.dtype, tuned))


_NO_LORA: dict[str, ArgumentType] = dict.fromkeys(lora_types(torch.float32, False), "none")
_HALVES = (32, 64, 128)


@lru_cache
def _silu_variant(
    dtype: torch.dtype, height: int | None, rank_step: int, chunk: int, tuned: bool, widen: bool
) -> Variant:
    rows: dict[str, ArgumentType] = {
        **dict.fromkeys(("gate_up_ptr", "act_ptr"), _pointer(dtype)),
        **dict.fromkeys(("gate_up_stride", "act_stride", "num_rows", "intermediate"), "i32"),
    }
    return _variant(
        _silu_mul_kernel, rows, dtype, height, rank_step, _tile_cols(height, chunk, tuned, 256), tuned, widen
    )


@lru_cache
def _add_variant(
    dtype: torch.dtype, height: int | None, rank_step: int, chunk: int, tuned: bool, widen: bool
) -> Variant:
    rows: dict[str, ArgumentType] = {
        **dict.fromkeys(("residual_ptr", "base_ptr", "out_ptr"), _pointer(dtype)),
        **dict.fromkeys(("residual_stride", "base_stride", "out_stride", "num_rows", "hidden"), "i32"),
    }
    block = _tile_cols(height, chunk, tuned, 128)
    variant = _variant(_add_kernel, rows, dtype, height, rank_step, block, tuned, widen)
    if (height, rank_step, block) == (PREFILL_HEIGHT, 16, 64):
        # So many it takes anyway, but for an sm_80 it spills unless it is told.
        return replace(variant, max_registers=80)
    return variant


@lru_cache
def _rope_variant(
    normed: bool,
    half: int,
    dtype: torch.dtype,
    height: int | None,
    rank_step: int,
    chunk: int,  # of no meaning here
    tuned: bool,
    widen: bool,
) -> Variant:
    numbers = ("qkv_stride", "query_stride", "angle_stride", "page_stride", "layer_offset", "value_offset")
    rows: dict[str, ArgumentType] = {
        **dict.fromkeys(("qkv_ptr", "query_ptr", "cos_ptr", "sin_ptr", "kv_ptr"), _pointer(dtype)),
        **dict.fromkeys(("query_norm_ptr", "key_norm_ptr"), _pointer(dtype) if normed else "none"),
        **dict.fromkeys((*numbers, "place_stride", "block_tokens"), "i32"),
        **dict.fromkeys(("num_rows", "num_heads", "kv_heads", "head_dim"), "i32"),
        "slots_ptr": "*i64:16",
        "eps": "fp32",
    }
    variant = _variant(_rope_write_kv_kernel, rows, dtype, height, rank_step, half, tuned, widen)
    constexprs = {**variant.constexprs, "HEIGHT": height or _HEAD_ROWS}
    limit = 232 if half > 64 else variant.max_registers
    if height and not tuned and half >= 64:
        limit = 255 if half > 64 else 200
    elif normed and half <= 64 and height == DECODE_HEIGHT:
        limit = 168
    return replace(variant, constexprs=constexprs, max_registers=limit)


def _variant(
    kernel: object,
    rows: dict[str, ArgumentType],
    dtype: torch.dtype,
    height: int | None,  # None without adapters
    rank_step: int,
    block: int,
    tuned: bool,
    widen: bool,
) -> Variant:
    return Variant(
        kernel=kernel,
        arguments={**rows, **(lora_types(dtype, tuned) if height else _NO_LORA)},
        constexprs={
            "HEIGHT": height or _ROWS,
            "BLOCK_R": rank_step,
            "BLOCK_C": block,
            "ALIGN": 8 if tuned else 1,
            "WIDEN": widen,
        },
        num_warps=8 if height == PREFILL_HEIGHT or block > 128 else 4,
        num_stages=3,
        max_registers=168 if height and not tuned else None,
        tensor_cores=height is not None and dtype == torch.bfloat16,
    )


def _tile_cols(height: int | None, chunk: int, tuned: bool, decode: int) -> int:
    if height is None:
        return _COLS
    return min(chunk, decode if height == DECODE_HEIGHT else 128) if tuned else 64


def _pointer(dtype: torch.dtype) -> str:
    return f"*{TRITON_TYPES[dtype]}:16"


def variants() -> Iterator[Variant]:
    """Everything that the launchers can choose on a GPU."""
    sizes = {True: ((None, 0), *ITEM_SIZES), False: ((None, 0), PLAIN_SIZE)}
    for dtype, tuned in ((torch.bfloat16, True), *((dtype, False) for dtype in TRITON_TYPES)):
        for height, step in sizes[tuned]:
            for chunk in {_tile_cols(height, chunk, tuned, 256) for chunk in (64, 128, 256)}:
                yield _silu_variant(dtype, height, step, chunk, tuned, False)
            for chunk in {_tile_cols(height, chunk, tuned, 128) for chunk in (64, 128)}:
                yield _add_variant(dtype, height, step, chunk, tuned, False)
            for normed, half in product((False, True), _HALVES):
                yield _rope_variant(normed, half, dtype, height, step, 64, tuned, False)
