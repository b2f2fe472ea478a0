"""A row's bits under the fixed kernels: the same in every place, in any company and chunk, on any number of threads.

The real shapes are those of a 125M Llama; the small ones have odd widths, tails and ranks.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorasrv.memory.layout import PageLayout
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import PackedModule, module_geometry, pack_adapter
from lorasrv.model.rope import Rotation
from lorasrv.model.rope_config import DefaultRope
from lorasrv_kernels import fixed, reference
from lorasrv_kernels.tiles import Segments
from lorasrv_kernels.work import plan_work

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32)
REAL_LINEARS = ((768, 2304), (768, 768), (768, 4096), (2048, 768), (768, 26_000))
SMALL_LINEARS = ((48, 80), (80, 48), (48, 101), (50, 3), (81, 33), (7, 1), (1, 7))


@pytest.fixture(params=[1, 2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda threads: f"{threads}_threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    different = (got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).flatten(1).any(1)
    assert not different.any(), f"rows {different.nonzero().squeeze(1).tolist()[:10]} of {len(got)} differ"


def assert_rows_stand_alone(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The bits of every row in any order, count and company, NaN and infinities among it."""
    want = function(x)
    num_rows = len(x)
    for shift in (1, 4, 11):  # each place of a tile against others
        assert_same_bits(function(x.roll(shift, 0)), want.roll(shift, 0))
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    assert_same_bits(function(x[order]), want[order])
    for start, end in ((0, 1), (3, 4), (num_rows - 1, num_rows), (5, 12), (1, 18), (2, num_rows)):
        assert_same_bits(function(x[start:end]), want[start:end])
    spoilt = x.clone()
    spoilt[::3], spoilt[1::6] = float("nan"), float("inf")
    assert_same_bits(function(spoilt)[2::3], want[2::3])


def test_functions_see_one_shape() -> None:
    shapes: set[tuple[int, ...]] = set()

    def seen(tile: Tensor) -> Tensor:
        assert tile.is_contiguous()
        shapes.add(tuple(tile.shape))
        return tile * 2

    for num_rows in (0, 1, 15, 16, 17, 40):
        x = torch.randn(num_rows, 2, 6)[:, :, :5]
        assert torch.equal(fixed.by_rows(seen, x), 2 * x)
    assert shapes == {(fixed.TILE_ROWS, 2, 5)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", REAL_LINEARS + SMALL_LINEARS, ids=str)
def test_linear(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    in_features, out_features = shape
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.empty(out_features, in_features, dtype=dtype).normal_(0, in_features**-0.5, generator=generator)
    bias = torch.empty(out_features, dtype=dtype).normal_(generator=generator)
    x = torch.empty(2 * fixed.TILE_ROWS + 5, in_features, dtype=dtype).normal_(generator=generator)
    packed = fixed.pack_linear(weight)
    for each in (packed, weight) if in_features * out_features < 10**6 else (packed,):
        assert_rows_stand_alone(lambda rows, weight=each: fixed.linear(rows, weight, bias), x)
        some = slice(0, 100)
        want = torch.nn.functional.linear(x.double(), weight[some].double(), bias[some].double())
        tolerance = 2e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(fixed.linear(x, each, bias)[:, some].double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 2048, 2050, 4100, 50, 7])
def test_norms_and_activations(width: int, dtype: torch.dtype, threads: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.empty(2 * fixed.TILE_ROWS + 5, 2 * width, dtype=dtype).normal_(generator=generator)
    weight = torch.empty(width, dtype=dtype).normal_(generator=generator)
    assert_rows_stand_alone(fixed.silu_mul, x)
    torch.testing.assert_close(fixed.silu_mul(x), reference.silu_mul(x))
    halves = x.unflatten(1, (2, width))
    for rows in (halves[:, 0], halves):  # hidden states, and heads
        assert_rows_stand_alone(lambda rows: fixed.rms_norm(rows, weight, 1e-5), rows)
        torch.testing.assert_close(fixed.rms_norm(rows, weight, 1e-5), reference.rms_norm(rows, weight, 1e-5))


@pytest.mark.parametrize("head_dim", [64, 128, 8, 6])
def test_rotations(head_dim: int, threads: int) -> None:
    rotation = Rotation(DefaultRope(theta=1e4), head_dim, CPU)

    def rotations(positions: Tensor) -> Tensor:
        return fixed.by_rows(lambda p: torch.stack(rotation.at(p, torch.float32), dim=1), positions)

    positions = torch.arange(900)
    want = rotations(positions)
    for start in range(17):
        for end in (start + 1, start + 18, 900):
            assert_same_bits(rotations(positions[start:end]), want[start:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16, 40, 64])
@pytest.mark.parametrize("widths", [(768, 2304), (2048, 768), (50, 37)], ids=str)
def test_lora(widths: tuple[int, int], rank: int, dtype: torch.dtype, threads: int) -> None:
    """Rows of one adapter, in every place of its segment, and the segment anywhere in the batch."""
    in_features, out_features = widths
    layout = PageLayout(num_layers=12, block_tokens=16, num_kv_heads=12, head_dim=64, itemsize=dtype.itemsize)
    shapes = (("module", in_features, out_features),)
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, in_features, generator=generator), torch.randn(out_features, rank, generator=generator)
    module = PackedModule(layer=0, module=0, rank=rank, scale=0.5, a=a.to(dtype), b=b.to(dtype))
    packed = pack_adapter([module], layout, shapes)
    storage = PageStorage(layout, packed.num_pages, dtype, CPU)
    directory = storage.write_adapter(packed, range(packed.num_pages), wait_for_steps=False).directory
    geometry = module_geometry(layout, shapes)
    base = torch.randn(out_features, generator=generator).to(dtype)

    def delta(x: Tensor, before: int = 0) -> Tensor:
        """The adapter's output for x, whose rows stand behind `before` rows without one."""
        rows = torch.cat((torch.ones(before, in_features, dtype=dtype), x))
        segments = Segments(
            starts=torch.tensor([before], dtype=torch.int32),
            ends=torch.tensor([len(rows)], dtype=torch.int32),
            directories=torch.tensor([directory], dtype=torch.int32),
            scales=torch.ones(1),
            num_modules=1,
            max_rank=rank + before,
            work=plan_work([before], [len(rows)], [rank], len(rows)).upload(CPU),
        )
        shrunk = torch.empty(1, 1, len(rows), segments.max_rank)
        out = base.repeat(len(rows), 1)
        fixed.sgmv_shrink(rows, storage.bytes, segments, 0, geometry, shrunk)
        fixed.sgmv_expand(shrunk, storage.bytes, segments, 0, geometry, out)
        assert torch.equal(out[:before], base.repeat(before, 1))
        return out[before:]

    x = torch.randn(fixed.LORA_ROWS + 5, in_features, generator=generator).to(dtype)
    assert_rows_stand_alone(delta, x)
    assert_same_bits(delta(x, before=3), delta(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"), [(12, 12, 64, 16), (6, 2, 8, 1), (4, 1, 6, 24)]
)
def test_attention(
    heads: int, kv_heads: int, head_dim: int, block_tokens: int, window: int | None, dtype: torch.dtype, threads: int
) -> None:
    """In one go, in chunks, and each row on its own with what it cannot see wiped out."""
    context, generator = 70, torch.Generator().manual_seed(head_dim)
    pages = torch.randperm(-(-context // block_tokens), generator=generator).to(torch.int32)
    query = torch.randn(context, heads, head_dim, generator=generator).to(dtype)
    stored = torch.randn(len(pages), 1, 2, block_tokens, kv_heads, head_dim, generator=generator).to(dtype)

    def attend(kv: Tensor, start: int, end: int) -> Tensor:
        out = torch.empty(end - start, heads, head_dim, dtype=dtype)
        bounds, contexts = torch.tensor([0, end - start]), torch.tensor([end])
        fixed.paged_attention(query[start:end], kv, 0, pages.unsqueeze(0), bounds, contexts, window, out)
        return out

    want = attend(stored, 0, context)
    for borders in ((0, 7, 14, 21, 64, 70), (0, 8, 16, 70), (0, 1, 33, 70)):
        chunks = [attend(stored, start, end) for start, end in pairwise(borders)]
        assert_same_bits(torch.cat(chunks), want)
    for position in (0, 1, 7, 8, 15, 40, 69):
        kv = torch.full_like(stored, float("nan"))
        for seen in range(0 if window is None else max(0, position - window + 1), position + 1):
            page = int(pages[seen // block_tokens])
            kv[page, :, :, seen % block_tokens] = stored[page, :, :, seen % block_tokens]
        assert_same_bits(attend(kv, position, position + 1), want[position : position + 1])


def test_sampling_and_log_probabilities(threads: int) -> None:
    """`reference`'s own, which serve both modes: every row of a batch as it is alone."""
    rows, generator = 6, torch.Generator().manual_seed(4)
    for vocab in (26_000, 101):
        logits = torch.randn(rows, vocab, generator=generator) * 3
        arguments = {
            "temperature": torch.rand(rows, generator=generator),
            "top_p": torch.rand(rows, generator=generator).clamp(0.1),
            "top_k": torch.randint(1, vocab, (rows,), generator=generator),
            "min_p": torch.rand(rows, generator=generator) * 0.1,
            "seeds": torch.randint(2**62, (rows,), generator=generator),
            "samples": torch.arange(rows) % 3,
            "positions": torch.arange(rows),
        }
        wanted = torch.arange(rows)
        whole, cut = torch.tensor([], dtype=torch.int64), torch.arange(rows)
        together, scored = (
            reference.sample(logits, **arguments, whole=whole, cut=cut),
            reference.token_logprobs(logits, wanted, 5),
        )
        for row in range(rows):
            one = slice(row, row + 1)
            own = {name: value[one] for name, value in arguments.items()}
            alone = reference.sample(logits[one], **own, whole=whole, cut=cut[:1])
            assert all(torch.equal(a, t[one]) for a, t in zip(alone, together, strict=True))
            for got, want in zip(reference.token_logprobs(logits[one], wanted[one], 5), scored, strict=True):
                assert torch.equal(got, want[one])
