"""The CPU's native kernels against their oracles."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lora_pool import Adapter, LoraPool, Range
from lorasrv_kernels import reference
from lorasrv_kernels.cpu import CpuKernels
from lorasrv_kernels.tiles import Delta
from native_kernels import KINDS, kernels_of

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
# The oracles round between steps, which a result near zero shows.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
LAYER = 1
HEADS, KV_HEADS = 3, 2
CASES: dict[str, tuple[int, tuple[tuple[int, int, int], ...]]] = {  # rows, (start, end, adapter)
    "ragged": (43, ((0, 5, 1), (5, 6, 2), (9, 36, 0), (36, 41, 3))),
    "single_rows": (4, ((0, 1, 0), (1, 2, 3), (2, 3, 1))),
    "empty_segment": (6, ((0, 3, 2), (3, 3, 3), (3, 6, 1))),
    "all_one_adapter": (19, ((0, 19, 3),)),
    "no_segments": (3, ()),
    "no_rows": (0, ()),
}
Shape = tuple[int, int]  # a linear module's columns, head_dim


def build(dtype: torch.dtype, width: int, head_dim: int) -> tuple[LoraPool, list[Adapter]]:
    shapes = (
        *(("q", 16, HEADS * head_dim), ("k", 16, KV_HEADS * head_dim), ("v", 16, KV_HEADS * head_dim)),
        *(("o", 16, width), ("gate", 16, width), ("up", 16, width)),
    )
    pool = LoraPool(shapes=shapes, dtype=dtype, device=CPU, kv_heads=KV_HEADS, num_pages=1500)
    all_modules = range(len(shapes))
    return pool, [
        pool.load(dict.fromkeys(all_modules, 1)),
        pool.load({0: 3, 2: 16, 3: 17, 4: 8}),
        pool.load({1: 20, 3: 3, 5: 300}),
        pool.load(dict.fromkeys(all_modules, 72)),
    ]


POOLS = {(dtype, shape): build(dtype, *shape) for dtype in DTYPES for shape in ((144, 64), (75, 80), (600, 12))}


@pytest.fixture(params=KINDS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    return kernels_of(request.param)


def ranges_of(case: str, adapters: list[Adapter]) -> tuple[int, list[Range]]:
    num_rows, ranges = CASES[case]
    return num_rows, [Range(start=s, end=e, adapter=adapters[a], scale=0.5) for s, e, a in ranges]


def delta_of(pool: LoraPool, num_rows: int, ranges: Sequence[Range], modules: slice) -> Delta:
    """NaN where shrink writes nothing."""
    segments = pool.segments(num_rows, ranges)
    geometry = pool.geometry[modules]
    h = torch.full((1, len(geometry), num_rows, segments.max_rank + 3), float("nan"))
    for one in ranges:
        for index, module in enumerate(geometry):
            found = one.adapter.modules.get((LAYER, module.index))
            if found is not None:
                h[:, index, one.start : one.end, : found.rank] = torch.randn(1, one.end - one.start, found.rank)
    return Delta(h=h, pool=pool.storage.bytes, segments=segments, layer=LAYER, modules=geometry)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


EVERY = pytest.mark.parametrize(("case", "kind"), [(case, kind) for case in CASES for kind in POOLS], ids=str)
Kind = tuple[torch.dtype, Shape]


@EVERY
@pytest.mark.parametrize("lora", [False, True])
def test_silu_mul(kernels: CpuKernels, case: str, kind: Kind, lora: bool) -> None:
    (_, (width, _)), (pool, adapters) = kind, POOLS[kind]
    num_rows, ranges = ranges_of(case, adapters)
    delta = delta_of(pool, num_rows, ranges, slice(4, 6)) if lora else None
    gate_up = 3 * pool.normal(num_rows, 2 * width)
    want = reference.silu_mul(gate_up.clone(), delta)
    close(kernels.silu_mul(gate_up, delta), want)


@EVERY
@pytest.mark.parametrize("lora", [False, True])
def test_add_and_norm(kernels: CpuKernels, case: str, kind: Kind, lora: bool) -> None:
    (_, (width, _)), (pool, adapters) = kind, POOLS[kind]
    num_rows, ranges = ranges_of(case, adapters)
    delta = delta_of(pool, num_rows, ranges, slice(3, 4)) if lora else None
    residual, out, weight = pool.normal(num_rows, width), pool.normal(num_rows, width), pool.normal(width)
    want_x, want_normed = reference.add_rms_norm(residual, out.clone(), delta, weight, 1e-5)
    close(kernels.add(residual, out.clone(), delta), want_x)
    x, normed = kernels.add_rms_norm(residual, out.clone(), delta, weight, 1e-5)
    close(x, want_x)
    close(normed, want_normed)
    close(kernels.rms_norm(residual, weight, 1e-5), reference.rms_norm(residual, weight, 1e-5))


@EVERY
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_write_kv(kernels: CpuKernels, case: str, kind: Kind, normed: bool, lora: bool) -> None:
    (dtype, (_, head_dim)), (pool, adapters) = kind, POOLS[kind]
    num_rows, ranges = ranges_of(case, adapters)
    delta = delta_of(pool, num_rows, ranges, slice(0, 3)) if lora else None
    qkv = pool.normal(num_rows, (HEADS + 2 * KV_HEADS) * head_dim)
    norms = (pool.normal(head_dim), pool.normal(head_dim)) if normed else None
    cos, sin = pool.normal(num_rows, 2, head_dim // 2).unbind(1)  # side by side, as the decoder has them
    kv = torch.full((9, 2, 2, 16, KV_HEADS, head_dim), float("nan"), dtype=dtype)
    slots = torch.randperm(9 * 16)[:num_rows]
    want_kv = kv.clone()
    want = reference.rope_write_kv(qkv.clone(), delta, norms, 1e-5, cos, sin, want_kv, LAYER, slots)
    close(kernels.rope_write_kv(qkv, delta, norms, 1e-5, cos, sin, kv, LAYER, slots), want)
    assert torch.equal(kv.isnan(), want_kv.isnan())
    close(kv.nan_to_num(), want_kv.nan_to_num())


def test_rows_of_no_adapter_have_the_same_bits_with_and_without_others(kernels: CpuKernels) -> None:
    pool, adapters = POOLS[torch.bfloat16, (144, 64)]
    ranges = [Range(start=2, end=4, adapter=adapters[3])]
    gate_up = pool.normal(6, 288)
    alone = kernels.silu_mul(gate_up.clone())
    together = kernels.silu_mul(gate_up.clone(), delta_of(pool, 6, ranges, slice(4, 6)))
    assert torch.equal(together[[0, 1, 4, 5]], alone[[0, 1, 4, 5]])
    assert not torch.equal(together[2:4], alone[2:4])


def test_nan_in_one_adapter_spoils_its_own_rows_alone(kernels: CpuKernels) -> None:
    pool, adapters = build(torch.bfloat16, 144, 64)
    for page in adapters[3].pages[1:]:  # its directory stays
        pool.storage.pages[page].view(torch.bfloat16).fill_(float("nan"))
    ranges = [Range(start=1, end=3, adapter=adapters[0]), Range(start=3, end=6, adapter=adapters[3])]
    segments, modules = pool.segments(8, ranges), pool.geometry[4:6]
    x, weight = pool.normal(8, 16), pool.normal(288, 16)
    out, delta = kernels.project(
        x, kernels.pack_linear(weight, keep=True), None, pool.storage.bytes, segments, LAYER, tuple(modules)
    )
    spoilt = kernels.silu_mul(out, delta).isnan().any(1)
    assert spoilt.tolist() == [False, False, False, True, True, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 12, 13, 15, 16, 17, 24, 25, 37, 100])
@pytest.mark.parametrize("shape", [(64, 48), (66, 16), (32, 400), (130, 272), (50, 30), (51, 32)], ids=str)
def test_linear(kernels: CpuKernels, shape: tuple[int, int], num_rows: int, dtype: torch.dtype) -> None:
    in_features, out_features = shape
    weight = torch.randn(out_features, in_features).to(dtype) / in_features**0.5
    packed = kernels.pack_linear(weight, keep=True)
    assert (packed.dim() == 4) == (
        kernels.multiplies and dtype == torch.bfloat16 and not out_features % 16 and not in_features % 2
    )
    x = torch.randn(num_rows, in_features).to(dtype)
    for bias in (None, torch.randn(out_features).to(dtype)):
        want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        got = kernels.linear(x, packed, bias)
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2e-5 if dtype == torch.float32 else 1e-3)


def test_logits_of_packed_weights_are_not_rounded(kernels: CpuKernels) -> None:
    weight, x = torch.randn(80, 48).bfloat16(), torch.randn(17, 48).bfloat16()
    got = kernels.logits(x, kernels.pack_linear(weight, keep=True))
    assert got.dtype == torch.float32
    want = x.double() @ weight.double().T
    torch.testing.assert_close(got.double(), want, rtol=1e-5 if kernels.multiplies else 2**-8, atol=1e-3)
    assert kernels.multiplies != torch.equal(got, got.bfloat16().float())


def test_weights_are_packed_in_place_unless_they_are_kept(kernels: CpuKernels) -> None:
    weight = torch.randn(32, 6).bfloat16()
    assert kernels.pack_linear(weight, keep=True).data_ptr() != weight.data_ptr() or not kernels.multiplies
    x, want = torch.randn(3, 6).bfloat16(), weight.clone()
    packed = kernels.pack_linear(weight)
    assert packed.data_ptr() == weight.data_ptr()
    close(kernels.linear(x, packed, None), reference.linear(x, want, None))


@EVERY
@pytest.mark.parametrize("group", [slice(0, 3), slice(3, 4), slice(4, 6)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_project_and_expand_are_the_product_and_all_that_adapters_add(
    kernels: CpuKernels, case: str, kind: Kind, group: slice, biased: bool
) -> None:
    pool, adapters = POOLS[kind]
    num_rows, ranges = ranges_of(case, adapters)
    segments, modules = pool.segments(num_rows, ranges), tuple(pool.geometry[group])
    out_features = sum(module.b.cols for module in modules)
    x, weight = pool.normal(num_rows, 16), pool.normal(out_features, 16)
    bias = pool.normal(out_features) if biased else None
    arguments = (bias, pool.storage.bytes, segments, LAYER, modules)
    want, want_delta = reference.project(x, weight, *arguments)
    got, delta = kernels.project(x, kernels.pack_linear(weight, keep=True), *arguments)
    assert delta is not None
    reference.expand(want_delta, want)
    reference.expand(delta, got, sgmv=kernels.sgmv_expand)
    close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_tokens"), [(4, 1, 64, 16), (2, 5, 128, 32), (1, 3, 80, 5)]
)
def test_attention_over_long_contexts(
    kernels: CpuKernels,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_tokens: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    sequences = ((1, 700), (33, 333), (1, 1), (7, 7), (2, 65))
    num_blocks = [-(-context // block_tokens) for _, context in sequences]
    pages = torch.randperm(sum(num_blocks)).to(torch.int32)
    kv = torch.randn(len(pages), 2, 2, block_tokens, kv_heads, head_dim).to(dtype)
    tables = torch.full((len(sequences), max(num_blocks)), 10**6, dtype=torch.int32)
    for index, ((_, context), own) in enumerate(zip(sequences, pages.split(num_blocks), strict=True)):
        tables[index, : len(own)] = own
        kv[own[-1], :, :, (context - 1) % block_tokens + 1 :] = float("nan")
    query = torch.randn(sum(rows for rows, _ in sequences), kv_heads * group, head_dim).to(dtype)
    starts = torch.tensor([0, *(rows for rows, _ in sequences)]).cumsum(0, dtype=torch.int32)
    contexts = torch.tensor([context for _, context in sequences], dtype=torch.int32)
    want, got = torch.empty_like(query), torch.full_like(query, float("nan"))
    reference.paged_attention(query, kv, 1, tables, starts, contexts, window, want)
    kernels.paged_attention(query, kv, 1, tables, starts, contexts, window, got)
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=2e-5 if dtype == torch.float32 else 4e-3)


def test_nan_in_one_sequence_spoils_that_one_alone(kernels: CpuKernels) -> None:
    kv = torch.randn(4, 1, 2, 16, 2, 16)
    kv[2, 0, 0, 3, 1] = float("nan")  # a key of the second sequence's second head
    query = torch.randn(2, 2, 16)
    tables, starts = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    contexts, out = torch.tensor([20, 20], dtype=torch.int32), torch.empty_like(query)
    kernels.paged_attention(query, kv, 0, tables, starts, contexts, None, out)
    assert out.isnan().any(-1).tolist() == [[False, False], [False, True]]
