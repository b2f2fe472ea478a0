"""Drawing tokens on Triton: Gumbel-max over the vocabulary in one pass, without a wait for the device.

Semantics: those of `reference.sample`. A first kernel gives the best of every `BLOCK` tokens of a row, a second the
best of those, so that one row fills the chip as many do. Scores and noise are in fp64 as the oracle's; of equal scores
the lowest token id wins in both kernels. A device's logarithm may differ from another's in the last of 53 bits, which
could change a draw only where the two best scores differ by as little.

Rows that top_k or top_p cut are sorted by torch, those rows alone, and then drawn by the same kernels.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.reference import keep_likeliest, scale_logits
from lorasrv_kernels.variant import Variant

_BLOCK = 1024
_FEWEST = 128  # blocks that the second kernel is compiled for
_ELEMENTS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}


@triton.jit
def _lowest(score, best, token):
    """The lowest of the tokens that have the best score."""
    return tl.min(tl.where(score == best, token, 0x7FFFFFFF), 0)


@triton.jit(
    do_not_specialize=["num_blocks", "stride_row", "vocab_size"],
    do_not_specialize_on_alignment=["logits", "tops", "temperature", "floors", "seeds", "samples", "positions"],
)
def block_kernel(
    logits,  # [num_rows, vocab_size]
    tops,  # float32 [num_rows], the rows' largest logits
    temperature,  # float32 [num_rows]
    floors,  # float64 [num_rows]: tokens whose scaled logit is below are left out
    seeds,  # int64 [num_rows]
    samples,  # int64 [num_rows]
    positions,  # int64 [num_rows]
    scores,  # float64 [num_rows, num_blocks]
    tokens,  # int32 [num_rows, num_blocks]
    num_blocks,
    stride_row,
    vocab_size,
    FLOORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    token = block * BLOCK + tl.arange(0, BLOCK)
    there = token < vocab_size
    own = tl.load(logits + row.to(tl.int64) * stride_row + token, mask=there, other=float("-inf")).to(tl.float64)
    # A row that holds NaN has a token too: the next step may look it up before anybody knows.
    own = tl.where(own == own, own, float("-inf"))
    top = tl.load(tops + row).to(tl.float64)
    heat = tl.load(temperature + row).to(tl.float64)
    if heat > 0:
        scaled = (own - tl.where(tl.abs(top) < float("inf"), top, 0.0)) / heat
        if FLOORED:
            scaled = tl.where(scaled < tl.load(floors + row), float("-inf"), scaled)
        # A counter's four words belong to four tokens in a row.
        quad = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        zero = tl.zeros([BLOCK // 4], tl.uint32)
        position = zero + tl.load(positions + row).to(tl.uint32)
        sample = zero + tl.load(samples + row).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(tl.load(seeds + row).to(tl.uint64, bitcast=True), quad, position, sample, zero)
        bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
        score = scaled - tl.log(-tl.log(uniform))
    else:
        score = own
    score = tl.where(there, score, float("-inf"))
    best = tl.max(score, 0)
    tl.store(scores + tl.program_id(0), best)
    tl.store(tokens + tl.program_id(0), _lowest(score, best, token))


@triton.jit(do_not_specialize=["num_blocks"])
def row_kernel(
    scores,  # float64 [num_rows, num_blocks]
    tokens,  # int32 [num_rows, num_blocks]
    out,  # int64 [num_rows]
    num_blocks,
    MOST: tl.constexpr,  # at least as many blocks
):
    row = tl.program_id(0)
    block = tl.arange(0, MOST)
    place = row * num_blocks + block
    score = tl.load(scores + place, mask=block < num_blocks, other=float("-inf"))
    token = tl.load(tokens + place, mask=block < num_blocks, other=0x7FFFFFFF)
    best = _lowest(score, tl.max(score, 0), token)
    tl.store(out + row, best.to(tl.int64))


def sample(
    logits: Tensor,  # [num_rows, vocab_size], a row's elements side by side
    temperature: Tensor,  # float32 [num_rows]
    top_p: Tensor,  # float32 [num_rows]
    top_k: Tensor,  # int64 [num_rows]
    min_p: Tensor | None,  # float32 [num_rows]
    seeds: Tensor,  # int64 [num_rows]
    samples: Tensor,  # int64 [num_rows]
    positions: Tensor,  # int64 [num_rows]
    whole: Tensor,  # int64 [num_whole]
    cut: Tensor,  # int64 [num_cut]
) -> tuple[Tensor, Tensor]:  # int64 [num_rows], bool [num_rows]
    tops = logits.amax(-1).float()
    floors = None if min_p is None else min_p.double().log()
    # The rows that are cut are drawn here too, and again below: leaving them out would take another list.
    tokens = _draw(logits, tops, temperature, floors, seeds, samples, positions)
    if len(cut):
        likely = keep_likeliest(scale_logits(logits[cut], temperature[cut]), top_p[cut], top_k[cut])
        own = None if floors is None else floors[cut]
        one, zero = torch.ones_like(temperature[cut]), torch.zeros_like(tops[cut])
        tokens[cut] = _draw(likely, zero, one, own, seeds[cut], samples[cut], positions[cut])
    return tokens, tops.isfinite()


def _draw(
    logits: Tensor,  # [num_rows, vocab_size]
    tops: Tensor,  # [num_rows]
    temperature: Tensor,
    floors: Tensor | None,  # float64 [num_rows]
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
) -> Tensor:  # int64 [num_rows]
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // _BLOCK)
    scores = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=logits.device)
    best = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    block_variant(logits.dtype, floors is not None).launch(
        num_rows * num_blocks,
        logits,
        tops,
        temperature,
        scores if floors is None else floors,
        seeds,
        samples,
        positions,
        scores,
        best,
        num_blocks,
        logits.stride(0),
        vocab_size,
    )
    row_variant(num_blocks).launch(num_rows, scores, best, tokens, num_blocks)
    return tokens


@lru_cache
def block_variant(dtype: torch.dtype, floored: bool) -> Variant:
    return Variant(
        kernel=block_kernel,
        arguments={
            "logits": "*" + _ELEMENTS[dtype],
            "tops": "*fp32",
            "temperature": "*fp32",
            "floors": "*fp64",
            **dict.fromkeys(("seeds", "samples", "positions"), "*i64"),
            "scores": "*fp64:16",
            "tokens": "*i32:16",
            "num_blocks": "i32",
            "stride_row": "i32",
            "vocab_size": "i32",
        },
        constexprs={"FLOORED": floored, "BLOCK": _BLOCK},
        num_warps=4,
        num_stages=1,
        tensor_cores=False,
    )


@lru_cache
def row_variant(num_blocks: int) -> Variant:
    return Variant(
        kernel=row_kernel,
        arguments={
            "scores": "*fp64:16",
            "tokens": "*i32:16",
            "out": "*i64:16",
            "num_blocks": "i32",
        },
        constexprs={"MOST": max(_FEWEST, 1 << (num_blocks - 1).bit_length())},
        num_warps=1,
        num_stages=1,
        tensor_cores=False,
    )


def variants() -> Iterator[Variant]:
    """Every kernel for logits of these types, and the merge for vocabularies of up to 262,144 tokens."""
    for dtype, floored in product(_ELEMENTS, (False, True)):
        yield block_variant(dtype, floored)
    for num_blocks in (_FEWEST, 2 * _FEWEST):
        yield row_variant(num_blocks)
