"""SGMV on Triton: shrink and expand of every segment's adapter in one launch each, tiles read in place from the pool.

Semantics: those of `reference`, under the same names and signatures; accumulated in fp32. `modules` stand side by side
in the directory. What is not written there is not written here, and bytes of the pool that belong to no tile of a
segment's adapter are not read.

    row block   up to `work.height` rows of one segment
    shrink      an item is (row block, `rank_step` rank rows, modules, split): x[rows, split] @ A[rank rows, split]^T.
                Short row blocks wait for A's bytes, so every module is an item of its own; high ones wait for x, which
                is read once for all modules.
    expand      an item is (row block, column tile of a module): out += sum of h's splits @ B, over the rank in blocks.
                h is rounded to bf16 for the tensor cores.

bf16 in rows that begin at multiples of 16 bytes is what serves, and is tuned. All else goes one plain way, in items of
16 rows and 16 rank rows whatever the work's height.

A row block, or a column tile, is computed alone, in the order of its rank rows and columns: the bits of a result depend
on the work's height, on the splits and on nothing else in the batch. There are no atomics.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.tiles import ADDRESS_BYTES, HEADER_FIELDS, Delta, Module, Segments
from lorasrv_kernels.variant import ArgumentType, Variant, interpreting, num_programs
from lorasrv_kernels.work import DECODE_HEIGHT, PREFILL_HEIGHT, Work, split_cols

# Numbers that differ between batches, layers and models, of which no kernel is to be compiled anew.
LORA_NUMBERS = ("split_stride", "module_stride", "row_stride", "num_splits", "first_header")
# Not tuples, whose numbers Triton would specialize.
CUTS = tuple(f"{name}_{module}" for module in range(3) for name in ("cols", "chunk", "odd_chunk"))
LORA_CUTS = ("row_parts", *CUTS)
_SHRINK_NUMBERS = (
    *(*LORA_NUMBERS, "x_stride", "in_features", "chunk", "odd_chunk"),
    "split_cols",
)
# What a block of the lists is divided into, each None where it is not.
_PARTS = ("num_groups", "row_parts", "rank_parts")
ADDRESS_BITS = tl.constexpr(ADDRESS_BYTES * 8)
ADDRESS_WORDS = tl.constexpr(ADDRESS_BYTES // 4)
HEADER_WORDS = tl.constexpr(HEADER_FIELDS)


@triton.jit
def multiply(a, b, acc, WIDEN: tl.constexpr):
    """acc + a @ b, in fp32 where the operands are."""
    if WIDEN:  # Triton's interpreter multiplies bf16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tile_offsets(words_ptr, first, rank, rows, wanted, col, cols, chunk, odd_chunk, elems_ptr, ALIGN: tl.constexpr):
    """Elements from the pool's start to column `col` of the rank rows `rows` of a matrix, int64.

    `first` is the word where the matrix's tile addresses begin. Offsets of rows not `wanted` mean nothing.
    """
    block = rows // 16
    height = tl.minimum(rank - block * 16, 16)
    width = tl.where((height & (height - 1)) == 0, chunk, odd_chunk)
    # All row blocks before this one are full, so cut by `chunk`.
    place = block * tl.cdiv(cols, chunk) + col // width
    address = tl.load(words_ptr + first + place, mask=wanted, other=0).to(tl.int64)
    in_tile = col % width
    address_elems: tl.constexpr = ADDRESS_BITS // elems_ptr.dtype.element_ty.primitive_bitwidth
    offsets = address * address_elems + (rows % 16) * tl.minimum(width, cols - (col - in_tile)) + in_tile
    return tl.multiple_of(offsets, ALIGN) if ALIGN > 1 else offsets


@triton.jit
def share(num_items):
    """This program's items: neighbours, which have an adapter and its rows in common."""
    most = tl.cdiv(num_items, tl.num_programs(0))
    begin = tl.program_id(0) * most
    return begin, tl.minimum(begin + most, num_items)


@triton.jit(do_not_specialize=(*_SHRINK_NUMBERS, *_PARTS))
def _shrink_kernel(
    x_ptr,
    x_stride,
    words_ptr,
    elems_ptr,
    row_blocks_ptr,
    rank_blocks_ptr,
    counts_ptr,
    directories_ptr,
    scales_ptr,
    out_ptr,
    split_stride,
    module_stride,
    row_stride,
    first_header,
    in_features,
    chunk,
    odd_chunk,
    split_cols,
    num_splits,
    num_groups,
    row_parts,
    rank_parts,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    step = tl.minimum(chunk, odd_chunk)  # columns that no chunk's border divides
    num_items = tl.load(counts_ptr + 1) * num_splits
    if num_groups is not None:
        num_items *= num_groups
    if row_parts is not None:
        num_items *= row_parts * rank_parts
    begin_item, end_item = share(num_items)  # pyright: ignore[reportGeneralTypeIssues]
    for item in range(begin_item, end_item):
        split = item % num_splits
        block, group, first_row, rank_offset = item // num_splits, 0, 0, 0
        if num_groups is not None:
            group = block % num_groups
            block = block // num_groups
        if row_parts is not None:
            rank_offset = block % rank_parts * RANK_STEP
            first_row = block // rank_parts % row_parts * HEIGHT
            block = block // (rank_parts * row_parts)
        rank_block = rank_blocks_ptr + block * 2
        row_block = row_blocks_ptr + tl.load(rank_block) * 4
        first_rank = tl.load(rank_block + 1) + rank_offset
        segment = tl.load(row_block + 2)
        directory = tl.load(directories_ptr + segment).to(tl.int64) * ADDRESS_WORDS

        # Column n of the product is rank row `rank_row` of one of the group's modules.
        rank = tl.zeros([BLOCK_N], tl.int32)
        first = tl.zeros([BLOCK_N], tl.int32)
        scale = tl.zeros([BLOCK_N], tl.int32)
        most = 0
        for index in tl.static_range(GROUP):
            header = words_ptr + directory + first_header + (group * GROUP + index) * HEADER_WORDS
            own_rank = tl.load(header)
            own = n // RANK_STEP == index
            rank = tl.where(own, own_rank, rank)
            first = tl.where(own, tl.load(header + 1), first)
            scale = tl.where(own, tl.load(header + 3), scale)
            most = tl.maximum(most, own_rank)
        if most > first_rank:
            rank_row = first_rank + n % RANK_STEP
            wanted = rank_row < rank
            rows = first_row + tl.arange(0, HEIGHT)
            in_rows = rows < tl.load(row_block + 1)
            rows = (tl.load(row_block) + rows).to(tl.int64)
            begin = tl.multiple_of(split * split_cols, 128)
            end = tl.minimum(begin + split_cols, in_features)
            row_offsets = tl.multiple_of(rows[:, None] * x_stride, [1, ALIGN])
            acc = tl.zeros([HEIGHT, BLOCK_N], tl.float32)
            # Outside of the inner loop, whose loads are in flight together, because these wait for an address.
            for part in range(begin // step, tl.cdiv(end, step)):
                low = tl.multiple_of(tl.maximum(begin, part * step), 64)
                num_cols = tl.multiple_of(tl.minimum(end, part * step + step) - low, ALIGN)
                offsets = tile_offsets(
                    words_ptr,
                    directory + first,
                    rank,
                    rank_row,
                    wanted,
                    low,
                    in_features,
                    chunk,
                    odd_chunk,
                    elems_ptr,
                    ALIGN,
                )
                x_block = x_ptr + row_offsets + (low + k)[None, :]
                a_block = elems_ptr + offsets[:, None] + k[None, :]
                for col in range(0, num_cols, BLOCK_K):
                    in_cols = (col + k < num_cols)[None, :]
                    x = tl.load(x_block + col, mask=in_rows[:, None] & in_cols, other=0.0)
                    a = tl.load(a_block + col, mask=wanted[:, None] & in_cols, other=0.0)
                    acc = multiply(x, tl.trans(a), acc, WIDEN)
            acc *= (tl.load(scales_ptr + segment) * scale.to(tl.float32, bitcast=True))[None, :]
            module = group * GROUP + n // RANK_STEP
            place = split.to(tl.int64) * split_stride + module.to(tl.int64) * module_stride + rank_row
            out = out_ptr + rows[:, None] * row_stride + place[None, :]
            tl.store(out, acc, mask=in_rows[:, None] & wanted[None, :])


@triton.jit
def num_row_blocks(counts_ptr, row_parts):
    num_blocks = tl.load(counts_ptr)
    if row_parts is not None:
        num_blocks *= row_parts
    return num_blocks


@triton.jit
def load_row_block(row_blocks_ptr, directories_ptr, block, row_parts, HEIGHT: tl.constexpr):
    """(rows, which of them are in the block, its adapter's rank, the word of the adapter's directory) of a row block
    or, where they are higher than HEIGHT, of one of its `row_parts` parts."""
    first_row = 0
    if row_parts is not None:
        first_row = block % row_parts * HEIGHT
        block = block // row_parts
    entry = row_blocks_ptr + block * 4
    rows = first_row + tl.arange(0, HEIGHT)
    in_rows = rows < tl.load(entry + 1)
    rows += tl.load(entry)
    rank, directory = tl.load(entry + 3), tl.cast(0, tl.int64)
    if rank > 0:
        directory = tl.load(directories_ptr + tl.load(entry + 2)).to(tl.int64) * ADDRESS_WORDS
    return rows.to(tl.int64), in_rows, rank, directory


@triton.jit
def summed_h(lora, module, rows, in_rows, r, wanted, ALIGN: tl.constexpr):
    """float32 [HEIGHT, BLOCK_R]: the columns `r` of h, its splits added in their order."""
    h_ptr, split_stride, module_stride, row_stride, num_splits, _, _, _ = lora
    row_offsets = rows[:, None] * row_stride
    if ALIGN > 1:
        row_offsets = tl.multiple_of(row_offsets, [1, 4])
    part_ptr = h_ptr + module_stride.to(tl.int64) * module
    # Short row blocks wait for h, high ones lack registers.
    UNROLL: tl.constexpr = 4 if rows.shape[0] == 16 else 1  # pyright: ignore[reportAssignmentType]
    h = tl.zeros([rows.shape[0], r.shape[0]], tl.float32)
    for _ in tl.range(0, num_splits, loop_unroll_factor=UNROLL, num_stages=1):
        h += tl.load(part_ptr + row_offsets + r[None, :], mask=in_rows[:, None] & wanted[None, :], other=0.0)
        part_ptr += split_stride
    return h


@triton.jit
def multiply_b(
    h, acc, lora, first, rank, r, wanted, col, cut, ALIGN: tl.constexpr, WIDEN: tl.constexpr, GATHER: tl.constexpr
):
    """acc + h @ B[r, col : col + BLOCK_C] of the module whose tile addresses begin at the word `first`."""
    _, _, _, _, _, words_ptr, elems_ptr, _ = lora
    cols, chunk, odd_chunk = cut
    c = tl.arange(0, acc.shape[1])
    in_cols = (c < tl.multiple_of(tl.minimum(cols - col, acc.shape[1]), ALIGN))[None, :]
    mask = wanted[:, None] & in_cols
    if GATHER:
        at = (col + c)[None, :]
        offsets = tile_offsets(words_ptr, first, rank, r[:, None], mask, at, cols, chunk, odd_chunk, elems_ptr, 1)
        b = tl.load(elems_ptr + offsets, mask=mask, other=0.0)
    else:
        offsets = tile_offsets(words_ptr, first, rank, r, wanted, col, cols, chunk, odd_chunk, elems_ptr, ALIGN)
        b = tl.load(elems_ptr + offsets[:, None] + c[None, :], mask=mask, other=0.0)
    if b.dtype == tl.bfloat16:
        return multiply(h.to(tl.bfloat16), b, acc, WIDEN)
    else:
        return multiply(h, b, acc, WIDEN)


@triton.jit
def expand_tile(
    acc,  # float32 [HEIGHT, BLOCK_C]
    lora,  # what `_expand_kernel` makes of its arguments
    directory,  # word of the adapter's directory, int64
    module,
    rows,  # int64 [HEIGHT]
    in_rows,
    col,
    cut,  # (columns, chunk, odd chunk) of the module's B
    BLOCK_R: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """acc + h @ B[:, col : col + BLOCK_C] of one module; the columns lie in one chunk."""
    header_ptr = lora[5] + directory + lora[7] + module * HEADER_WORDS
    rank, first = tl.load(header_ptr), directory + tl.load(header_ptr + 2)
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        wanted = r < rank
        h = summed_h(lora, module, rows, in_rows, r, wanted, ALIGN)
        acc = multiply_b(h, acc, lora, first, rank, r, wanted, col, cut, ALIGN, WIDEN, False)
    return acc


@triton.jit
def expand_halves(
    low,  # float32 [HEIGHT, BLOCK_C]
    high,  # float32 [HEIGHT, BLOCK_C]
    lora,
    directory,
    module,
    rows,
    in_rows,
    col,
    half,
    cut,
    BLOCK_R: tl.constexpr,
    ALIGN: tl.constexpr,  # 1 where borders of chunks may divide the columns
    WIDEN: tl.constexpr,
):
    """`expand_tile` from `col` and from `col + half` on."""
    header_ptr = lora[5] + directory + lora[7] + module * HEADER_WORDS
    rank, first = tl.load(header_ptr), directory + tl.load(header_ptr + 2)
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        wanted = r < rank
        h = summed_h(lora, module, rows, in_rows, r, wanted, ALIGN)
        low = multiply_b(h, low, lora, first, rank, r, wanted, col, cut, ALIGN, WIDEN, ALIGN == 1)
        high = multiply_b(h, high, lora, first, rank, r, wanted, col + half, cut, ALIGN, WIDEN, ALIGN == 1)
    return low, high


@triton.jit(do_not_specialize=(*LORA_NUMBERS, *LORA_CUTS, "out_stride"))
def _expand_kernel(
    out_ptr,
    out_stride,
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
    cols, chunks = (cols_0, cols_1, cols_2), (chunk_0, chunk_1, chunk_2)
    odd_chunks = (odd_chunk_0, odd_chunk_1, odd_chunk_2)
    tiles_per_block = 0
    for m in tl.static_range(3):  # pyright: ignore[reportGeneralTypeIssues]
        tiles_per_block += tl.cdiv(cols[m], BLOCK_C)
    begin, end = share(num_row_blocks(counts_ptr, row_parts) * tiles_per_block)  # pyright: ignore[reportGeneralTypeIssues]
    for item in range(begin, end):
        rows, in_rows, rank, directory = load_row_block(
            row_blocks_ptr, directories_ptr, item // tiles_per_block, row_parts, HEIGHT
        )
        if rank > 0:
            # The module that this column tile belongs to.
            tile = item % tiles_per_block
            module, col, first_col, own_cols, chunk, odd_chunk = 0, tile * BLOCK_C, 0, cols[0], chunks[0], odd_chunks[0]
            tiles_before, cols_before = tl.cdiv(cols[0], BLOCK_C), cols[0]
            for m in tl.static_range(1, 3):
                behind = tile >= tiles_before
                module = tl.where(behind, m, module)
                col = tl.where(behind, (tile - tiles_before) * BLOCK_C, col)
                first_col = tl.where(behind, cols_before, first_col)
                own_cols = tl.where(behind, cols[m], own_cols)
                chunk = tl.where(behind, chunks[m], chunk)
                odd_chunk = tl.where(behind, odd_chunks[m], odd_chunk)
                tiles_before += tl.cdiv(cols[m], BLOCK_C)
                cols_before += cols[m]
            if tl.load(words_ptr + directory + first_header + module * HEADER_WORDS) > 0:
                c = tl.arange(0, BLOCK_C)
                row_offsets = tl.multiple_of(rows[:, None] * out_stride + (first_col + col), [1, ALIGN])
                out = out_ptr + row_offsets + c[None, :]
                limit = tl.multiple_of(tl.minimum(own_cols - col, BLOCK_C), ALIGN)
                mask = in_rows[:, None] & (c < limit)[None, :]
                acc = tl.load(out, mask=mask, other=0.0).to(tl.float32)
                cut = (own_cols, chunk, odd_chunk)
                acc = expand_tile(acc, lora, directory, module, rows, in_rows, col, cut, BLOCK_R, ALIGN, WIDEN)
                tl.store(out, acc, mask=mask)


def sgmv_shrink(
    x: Tensor,  # [num_tokens, in_features]
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments,
    layer: int,
    modules: tuple[Module, ...],  # that share this input and stand side by side in the directory
    out: Tensor,  # float32 [num_splits, len(modules), num_tokens, >= max_rank]
) -> None:
    _check_adjacent(modules)
    a, work, num_splits = modules[0].a, segments.work, out.shape[0]
    assert all(module.a == a for module in modules) and x.shape[1] == a.cols, (modules, x.shape)
    assert x.stride(1) == 1 and out.stride(3) == 1, (x.stride(), out.stride())
    tuned = is_tuned(x.dtype, a.cols, x.stride(0))
    height, rank_step = item_size(work, tuned)
    group = 1 if height == DECODE_HEIGHT else len(modules)
    least = min(a.chunk, a.odd_chunk)
    variant = shrink_variant(
        x.dtype, height, rank_step, group, _shrink_block(height, least, tuned), tuned, interpreting()
    )
    parts = (len(modules) // group, work.height // height, work.rank_step // rank_step)
    variant.launch(
        num_programs(work.rank_blocks.shape[0] * prod(parts) * num_splits, x.device),
        x,
        x.stride(0),
        pool.view(torch.int32),
        pool.view(x.dtype),
        work.row_blocks,
        work.rank_blocks,
        work.counts,
        segments.directories,
        segments.scales,
        out,
        *out.stride()[:3],
        (layer * segments.num_modules + modules[0].index) * HEADER_FIELDS,
        a.cols,
        a.chunk,
        a.odd_chunk,
        split_cols(a.cols, num_splits),
        num_splits,
        *(None if variant.arguments[name] == "none" else part for name, part in zip(_PARTS, parts, strict=True)),
    )


def sgmv_expand(
    h: Tensor,  # float32 [num_splits, len(modules), num_tokens, >= max_rank], as sgmv_shrink left it
    pool: Tensor,  # [num_bytes], uint8
    segments: Segments,
    layer: int,
    modules: tuple[Module, ...],  # side by side in the directory
    out: Tensor,  # [num_tokens, sum of out_features], the modules' outputs side by side
) -> None:
    delta, work = Delta(h=h, pool=pool, segments=segments, layer=layer, modules=modules), segments.work
    assert out.stride(1) == 1, out.stride()
    tuned = is_tuned(out.dtype, out.stride(0)) and is_aligned(delta)
    height, rank_step = item_size(work, tuned)
    block = _expand_block(least_chunk(modules), tuned)
    variant = expand_variant(out.dtype, height, rank_step, block, tuned, interpreting())
    tiles = sum(-(-module.b.cols // block) for module in modules)
    variant.launch(
        num_programs(work.row_blocks.shape[0] * (work.height // height) * tiles, out.device),
        out,
        out.stride(0),
        *lora_arguments(delta, out.dtype, tuned),
    )


def is_tuned(dtype: torch.dtype, *numbers: int) -> bool:
    """Whether rows are what serves: bf16, of so many columns and with such strides that they begin at multiples of 16
    bytes."""
    return dtype == torch.bfloat16 and all(number % 16 == 0 for number in numbers)


def is_aligned(delta: Delta) -> bool:
    """Whether rows of h and of B's tiles begin at multiples of 16 bytes."""
    return all(module.b.cols % 16 == 0 for module in delta.modules) and delta.h.stride(2) % 4 == 0


def item_size(work: Work, tuned: bool) -> tuple[int, int]:
    """Rows and rank rows of an item."""
    return (work.height, work.rank_step) if tuned else PLAIN_SIZE


def least_chunk(modules: tuple[Module, ...]) -> int:
    """Columns of the modules' outputs that no border of a chunk divides, from any multiple of them on."""
    return min(min(module.b.chunk, module.b.odd_chunk) for module in modules)


def lora_arguments(delta: Delta, dtype: torch.dtype, tuned: bool) -> tuple[object, ...]:
    """What a kernel that expands takes from `h_ptr` to the last cut."""
    h, pool, segments, modules = delta.h, delta.pool, delta.segments, delta.modules
    _check_adjacent(modules)
    assert h.stride(3) == 1, h.stride()
    cuts = [(module.b.cols, module.b.chunk, module.b.odd_chunk) for module in modules]
    return (
        h,
        *h.stride()[:3],
        h.shape[0],
        pool.view(torch.int32),
        pool.view(dtype),
        (delta.layer * segments.num_modules + modules[0].index) * HEADER_FIELDS,
        segments.work.row_blocks,
        segments.work.counts,
        segments.directories,
        None if tuned else segments.work.height // PLAIN_SIZE[0],
        # Modules without columns have no tiles.
        *(number for cut in (*cuts, *((0, 0, 0),) * (_MAX_MODULES - len(modules))) for number in cut),
    )


# The most modules that share an input: q, k, v.
_MAX_MODULES = 3
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_WORDS = "*i32:16"
PLAIN_SIZE = (DECODE_HEIGHT, 16)


def lora_types(dtype: torch.dtype, tuned: bool) -> dict[str, ArgumentType]:
    """Those of `lora_arguments`."""
    return {
        "h_ptr": "*fp32:16",
        **dict.fromkeys(LORA_NUMBERS, "i32"),
        "words_ptr": _WORDS,
        "elems_ptr": f"*{TRITON_TYPES[dtype]}:16",
        **dict.fromkeys(("row_blocks_ptr", "counts_ptr", "directories_ptr"), _WORDS),
        "row_parts": "none" if tuned else "i32",
        **dict.fromkeys(CUTS, "i32"),
    }


@lru_cache
def shrink_variant(
    dtype: torch.dtype, height: int, rank_step: int, group: int, block_k: int, tuned: bool, widen: bool
) -> Variant:
    block_n = triton.next_power_of_2(group * rank_step)
    element = TRITON_TYPES[dtype]
    tables = ("words_ptr", "row_blocks_ptr", "rank_blocks_ptr", "counts_ptr", "directories_ptr")
    return Variant(
        kernel=_shrink_kernel,
        arguments={
            **dict.fromkeys(("x_ptr", "elems_ptr"), f"*{element}:16"),
            **dict.fromkeys(tables, _WORDS),
            **dict.fromkeys(("scales_ptr", "out_ptr"), "*fp32:16"),
            **dict.fromkeys(_SHRINK_NUMBERS, "i32"),
            "num_groups": "i32" if height == DECODE_HEIGHT else "none",
            **dict.fromkeys(("row_parts", "rank_parts"), "none" if tuned else "i32"),
        },
        constexprs={
            "GROUP": group,
            "HEIGHT": height,
            "RANK_STEP": rank_step,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "ALIGN": 8 if tuned else 1,
            "WIDEN": widen,
        },
        num_warps=8 if block_n > 64 else 4,
        num_stages=4,
        tensor_cores=dtype == torch.bfloat16,
    )


@lru_cache
def expand_variant(dtype: torch.dtype, height: int, rank_step: int, block_c: int, tuned: bool, widen: bool) -> Variant:
    return Variant(
        kernel=_expand_kernel,
        arguments={
            "out_ptr": f"*{TRITON_TYPES[dtype]}:16",
            "out_stride": "i32",
            **lora_types(dtype, tuned),
        },
        constexprs={
            "HEIGHT": height,
            "BLOCK_R": rank_step,
            "BLOCK_C": block_c,
            "ALIGN": 8 if tuned else 1,
            "WIDEN": widen,
        },
        num_warps=8 if block_c * height > 4096 else 4,
        # The assembler spills narrow tiles unless it is told.
        max_registers=128 if tuned and height == DECODE_HEIGHT and block_c == 64 else None if tuned else 168,
        num_stages=3,
        tensor_cores=dtype == torch.bfloat16,
    )


def _shrink_block(height: int, chunk: int, tuned: bool) -> int:
    return min(chunk, 128) if tuned and height == DECODE_HEIGHT else 64


def _expand_block(chunk: int, tuned: bool) -> int:
    return min(chunk, 128) if tuned else 64


ITEM_SIZES = ((DECODE_HEIGHT, 16), (PREFILL_HEIGHT, 16), (PREFILL_HEIGHT, 32))  # of a tuned kernel


def variants() -> Iterator[Variant]:
    """Everything that the launchers can choose on a GPU."""
    for height, step in ITEM_SIZES:
        for group in (1,) if height == DECODE_HEIGHT else range(1, _MAX_MODULES + 1):
            for block in {_shrink_block(height, chunk, True) for chunk in (64, 128)}:
                yield shrink_variant(torch.bfloat16, height, step, group, block, True, widen=False)
        for block in {_expand_block(chunk, True) for chunk in (64, 128)}:
            yield expand_variant(torch.bfloat16, height, step, block, True, widen=False)
    for dtype in TRITON_TYPES:
        yield shrink_variant(dtype, *PLAIN_SIZE, 1, _shrink_block(DECODE_HEIGHT, 64, False), False, widen=False)
        yield expand_variant(dtype, *PLAIN_SIZE, _expand_block(64, False), False, widen=False)


def _check_adjacent(modules: tuple[Module, ...]) -> None:
    first = modules[0].index
    assert [module.index for module in modules] == list(range(first, first + len(modules))), modules
    assert len(modules) <= _MAX_MODULES, modules
