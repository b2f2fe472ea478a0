"""The LoRA oracle, its batch-invariant form and the CPU's kernels against dense products, on adapters scattered in a
pool."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lorasrv.memory.layout import PageLayout
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import PackedModule, module_geometry, pack_adapter
from lorasrv_kernels import fixed, reference
from lorasrv_kernels.forward import ForwardKernels
from lorasrv_kernels.reference import sgmv_expand, sgmv_shrink
from lorasrv_kernels.tiles import Segments
from lorasrv_kernels.work import plan_work
from native_kernels import KINDS, kernels_of

SHAPES = (("q", 72, 136), ("k", 72, 40), ("v", 72, 300))
LAYER = 1
KERNELS: dict[str, ForwardKernels] = {"reference": reference, "fixed": fixed}
NAMES = [*KERNELS, *KINDS]
TARGETS = {1: (0, 1, 2), 3: (0, 2), 16: (1,), 40: (0, 1, 2), 200: (2,)}  # by rank


def named(kernels: str) -> ForwardKernels:
    return KERNELS.get(kernels) or kernels_of(kernels)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    directory: int
    modules: dict[int, PackedModule]


@dataclass(frozen=True, kw_only=True)
class Pool:
    layout: PageLayout
    storage: PageStorage
    adapters: dict[int, Adapter]


def build_pool(dtype: torch.dtype) -> Pool:
    layout = PageLayout(num_layers=2, block_tokens=16, num_kv_heads=4, head_dim=32, itemsize=dtype.itemsize)
    storage = PageStorage(layout, 256, dtype, torch.device("cpu"))
    storage.bytes.view(dtype).fill_(float("nan"))
    free = random.Random(0).sample(range(256), 256)
    generator = torch.Generator().manual_seed(0)
    adapters: dict[int, Adapter] = {}
    for rank, targets in TARGETS.items():
        modules = [
            PackedModule(
                layer=layer,
                module=index,
                rank=rank,
                scale=0.25 * (1 + index + layer),
                a=torch.randn(rank, SHAPES[index][1], generator=generator).to(dtype),
                b=torch.randn(SHAPES[index][2], rank, generator=generator).to(dtype),
            )
            for layer in (0, 1)
            for index in targets
        ]
        packed = pack_adapter(modules, layout, SHAPES)
        pages = [free.pop() for _ in range(packed.num_pages)]
        directory = storage.write_adapter(packed, pages, wait_for_steps=False).directory
        adapters[rank] = Adapter(directory=directory, modules={m.module: m for m in modules if m.layer == LAYER})
    return Pool(layout=layout, storage=storage, adapters=adapters)


FP32, BF16 = build_pool(torch.float32), build_pool(torch.bfloat16)


def segments_of(pool: Pool, num_tokens: int, ranges: list[tuple[int, int, int, float]]) -> Segments:
    """From (start, end, rank of the adapter, scale)."""
    starts, ends, ranks = ([r[i] for r in ranges] for i in range(3))
    return Segments(
        starts=torch.tensor(starts, dtype=torch.int32),
        ends=torch.tensor(ends, dtype=torch.int32),
        directories=torch.tensor([pool.adapters[r[2]].directory for r in ranges], dtype=torch.int32),
        scales=torch.tensor([r[3] for r in ranges], dtype=torch.float32),
        num_modules=len(SHAPES),
        max_rank=max(ranks, default=1),
        work=plan_work(starts, ends, ranks, num_tokens).upload(torch.device("cpu")),
    )


def compare(
    pool: Pool, num_tokens: int, ranges: list[tuple[int, int, int, float]], dtype: torch.dtype, kernels: ForwardKernels
) -> None:
    geometry, segments = module_geometry(pool.layout, SHAPES), segments_of(pool, num_tokens, ranges)
    x = torch.randn(num_tokens, 72).to(dtype)
    shrunk = torch.full((1, 3, num_tokens, segments.max_rank + 2), float("nan"))
    before = torch.randn(num_tokens, sum(s[2] for s in SHAPES)).to(dtype)
    out = before.clone()
    kernels.sgmv_shrink(x, pool.storage.bytes, segments, LAYER, geometry, shrunk)
    kernels.sgmv_expand(shrunk, pool.storage.bytes, segments, LAYER, geometry, out)

    want_shrunk, want = torch.full_like(shrunk, float("nan")), before.float()
    for start, end, rank, scale in ranges:
        for index, m in pool.adapters[rank].modules.items():
            first = sum(s[2] for s in SHAPES[:index])
            h = scale * m.scale * (x[start:end].float() @ m.a.float().T)
            want_shrunk[0, index, start:end, :rank] = h
            want[start:end, first : first + SHAPES[index][2]] += h @ m.b.float().T
    atol, rtol = (2e-3, 1e-4) if dtype == torch.float32 else (0.1, 2**-7)
    torch.testing.assert_close(shrunk, want_shrunk, atol=1e-3, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(out.float(), want, atol=atol, rtol=rtol)
    untouched = untouched_rows(num_tokens, ranges)
    assert torch.equal(out[untouched], before[untouched])


def untouched_rows(num_tokens: int, ranges: list[tuple[int, int, int, float]]) -> Tensor:
    rows = torch.ones(num_tokens, dtype=torch.bool)
    for start, end, _, _ in ranges:
        rows[start:end] = False
    return rows


CASES: dict[str, tuple[int, list[tuple[int, int, int, float]]]] = {
    "ragged": (23, [(0, 5, 3, 1.0), (5, 6, 40, 2.0), (9, 20, 1, 0.5), (20, 22, 200, 1.5)]),
    "single_rows": (5, [(0, 1, 1, 1.0), (1, 2, 3, 1.0), (2, 3, 16, 1.0), (3, 4, 40, 1.0), (4, 5, 200, 1.0)]),
    "empty_segment": (6, [(0, 3, 40, 1.0), (3, 3, 200, 1.0), (3, 6, 3, 1.0)]),
    "all_one_adapter": (17, [(0, 17, 40, 1.0)]),
    "one_adapter_two_scales": (8, [(0, 4, 16, 1.0), (4, 8, 16, -3.0)]),
    "no_segments": (4, []),
    "no_tokens": (0, [(0, 0, 3, 1.0)]),
}


@pytest.mark.parametrize("kernels", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_equals_dense_fp32(case: str, kernels: str) -> None:
    compare(FP32, *CASES[case], torch.float32, named(kernels))


@pytest.mark.parametrize("kernels", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_equals_dense_bf16(case: str, kernels: str) -> None:
    compare(BF16, *CASES[case], torch.bfloat16, named(kernels))


@pytest.mark.parametrize("kernels", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_dense_on_random_segments(seed: int, kernels: str) -> None:
    rng = random.Random(seed)
    bounds = sorted(rng.sample(range(41), 8))
    ranges = [(bounds[i], bounds[i + 1], rng.choice(list(TARGETS)), rng.uniform(-2, 2)) for i in range(0, 8, 2)]
    compare(FP32, 40, ranges, torch.float32, named(kernels))


def test_a_module_alone_is_the_same_as_in_company() -> None:
    """o and down go alone; their `Module.index`, not their place in the call, finds the header."""
    geometry, segments = module_geometry(FP32.layout, SHAPES), segments_of(FP32, 4, [(0, 4, 40, 1.0)])
    x = torch.randn(4, 72)
    together, alone = torch.empty(1, 3, 4, 40), torch.empty(1, 1, 4, 40)
    sgmv_shrink(x, FP32.storage.bytes, segments, LAYER, geometry, together)
    sgmv_shrink(x, FP32.storage.bytes, segments, LAYER, geometry[2:3], alone)
    assert torch.equal(together[0, 2], alone[0, 0])


def test_results_do_not_depend_on_where_an_adapter_lies() -> None:
    modules = list(FP32.adapters[40].modules.values())
    packed = pack_adapter(modules, FP32.layout, SHAPES)
    x, geometry = torch.randn(6, 72), module_geometry(FP32.layout, SHAPES)
    results: list[Tensor] = []
    for pages in (list(range(packed.num_pages)), list(reversed(range(3, 3 + packed.num_pages)))):
        storage = PageStorage(FP32.layout, 40, torch.float32, torch.device("cpu"))
        address = storage.write_adapter(packed, pages, wait_for_steps=False).directory
        segments = Segments(
            starts=torch.tensor([0], dtype=torch.int32),
            ends=torch.tensor([6], dtype=torch.int32),
            directories=torch.tensor([address], dtype=torch.int32),
            scales=torch.tensor([1.0]),
            num_modules=3,
            max_rank=40,
            work=plan_work([0], [6], [40], 6).upload(torch.device("cpu")),
        )
        shrunk, out = torch.empty(1, 3, 6, 40), torch.zeros(6, 476)
        sgmv_shrink(x, storage.bytes, segments, LAYER, geometry, shrunk)
        sgmv_expand(shrunk, storage.bytes, segments, LAYER, geometry, out)
        results.append(out)
    assert torch.equal(*results)
    assert bool(results[0].any())
