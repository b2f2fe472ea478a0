"""Adapters written into scattered pages read back exactly, through the directory alone."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lorasrv.errors import AdapterLoadFailed, ConfigurationError
from lorasrv.memory.layout import ALIGN_BYTES, DIRECTORY_FIELDS, TILE_ROWS, PageLayout
from lorasrv.memory.packing import LoraModule, fill_pages, plan_adapter
from lorasrv.memory.pages import Owner, OwnerKind, PagePool
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import PackedModule, module_geometry, pack_adapter
from lorasrv_kernels.tiles import Matrix

SHAPES = (("q", 96, 160), ("k", 96, 48), ("v", 160, 200))
LAYOUT = PageLayout(num_layers=3, block_tokens=8, num_kv_heads=2, head_dim=16, itemsize=4)
CPU = torch.device("cpu")


def module(layer: int, index: int, rank: int, seed: int) -> PackedModule:
    generator = torch.Generator().manual_seed(seed)
    _, in_features, out_features = SHAPES[index]
    return PackedModule(
        layer=layer,
        module=index,
        rank=rank,
        scale=0.5 + seed,
        a=torch.randn(rank, in_features, generator=generator),
        b=torch.randn(out_features, rank, generator=generator),
    )


def read_matrix(
    storage: PageStorage, directory: Tensor, first: int, rank: int, matrix: Matrix, dtype: torch.dtype
) -> Tensor:
    """Follow the directory's addresses, tile by tile, as `lorasrv_kernels.reference` states them."""
    found = torch.full((rank, matrix.cols), float("nan"), dtype=dtype)
    for row in range(0, rank, TILE_ROWS):
        rows = min(TILE_ROWS, rank - row)
        chunk = matrix.chunk_for(rows)
        for col in range(0, matrix.cols, chunk):
            cols = min(chunk, matrix.cols - col)
            begin = int(directory[first]) * ALIGN_BYTES
            tile = storage.bytes[begin : begin + rows * cols * dtype.itemsize].view(dtype)
            found[row : row + rows, col : col + cols] = tile.view(rows, cols)
            first += 1
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundtrip_over_scattered_pages(dtype: torch.dtype) -> None:
    layout = PageLayout(num_layers=3, block_tokens=8, num_kv_heads=2, head_dim=16, itemsize=dtype.itemsize)
    modules = [module(2, 1, 40, 1), module(0, 0, 3, 2), module(2, 0, 16, 3), module(1, 2, 17, 4)]
    packed = pack_adapter(modules, layout, SHAPES)
    storage = PageStorage(layout, 64, dtype, CPU)
    storage.bytes.fill_(255)
    pages = random.Random(0).sample(range(64), packed.num_pages)
    assert packed.num_pages > 2
    assert packed.max_rank == 40
    address = storage.write_adapter(packed, pages, wait_for_steps=False).directory
    storage.check()

    directory = storage.bytes[address * ALIGN_BYTES : (pages[0] + 1) * layout.page_bytes].view(torch.int32)
    headers = directory[: 3 * 3 * DIRECTORY_FIELDS].view(3, 3, DIRECTORY_FIELDS)
    geometry = module_geometry(layout, SHAPES)
    for m in modules:
        rank, first_a, first_b, _ = headers[m.layer, m.module].tolist()
        assert rank == m.rank
        assert headers[m.layer, m.module, 3:].view(torch.float32).item() == m.scale
        a = read_matrix(storage, directory, first_a, rank, geometry[m.module].a, dtype)
        b = read_matrix(storage, directory, first_b, rank, geometry[m.module].b, dtype)
        assert torch.equal(a, m.a.to(dtype))
        assert torch.equal(b, m.b.T.to(dtype))
    assert int((headers[:, :, 0] > 0).sum()) == len(modules)
    untouched = sorted(set(range(64)) - set(pages))
    assert bool((storage.pages[untouched] == 255).all())


def test_what_lay_in_an_images_pages_before_is_gone_and_its_neighbours_stay() -> None:
    """Ranks and widths that leave gaps in pages; the same plan serves other weights and scales."""
    shapes = [LoraModule(layer=0, module=0, rank=3, scale=1.0), LoraModule(layer=1, module=2, rank=17, scale=1.0)]
    for seed in (1, 2):
        plan = plan_adapter([replace(each, scale=float(seed)) for each in shapes], LAYOUT, SHAPES)
        rng = np.random.default_rng(seed)
        matrices = [
            (rng.random((m.rank, SHAPES[m.module][1])), rng.random((SHAPES[m.module][2], m.rank))) for m in shapes
        ]
        places = list(range(1, 2 * plan.num_pages, 2))
        clean, dirty = (np.full((2 * plan.num_pages + 1, LAYOUT.page_bytes), value, np.uint8) for value in (0, 255))
        for pages in (clean, dirty):
            fill_pages(plan, matrices, pages, places)
        assert np.array_equal(dirty[places], clean[places])
        assert (dirty[::2] == 255).all()
        held = sum(a.size + b.size for a, b in matrices) * LAYOUT.itemsize
        assert held <= np.count_nonzero(clean.view(np.float32)) * LAYOUT.itemsize <= held + plan.placed.directory_bytes


def test_after_ten_thousand_loads_and_unloads_a_load_needs_free_pages_and_nothing_else() -> None:
    """Mixed ranks in a pool that is full most of the time, with KV blocks that come and go between them."""
    rng = random.Random(3)
    ranks = (1, 2, 3, 7, 8, 16, 17, 31, 32, 64, 100, 128, 255, 256)
    packed = [pack_adapter([module(0, 0, rank, rank), module(2, 2, rank, 1)], LAYOUT, SHAPES) for rank in ranks]
    pool = PagePool(2 * max(adapter.num_pages for adapter in packed))
    storage = PageStorage(LAYOUT, pool.num_pages, torch.float32, CPU)
    resident: dict[int, tuple[Owner, list[int]]] = {}
    num_loads, num_refused, num_scattered = 0, 0, 0
    for number in range(10_000):
        adapter = rng.randrange(len(packed))
        owner = Owner(OwnerKind.ADAPTER if rng.random() < 0.9 else OwnerKind.SEQUENCE, str(number))
        if adapter in resident:
            was, pages = resident.pop(adapter)
            pool.retire(pages, was, last_reader=number)
        elif packed[adapter].num_pages <= pool.num_free:
            pages = pool.alloc(packed[adapter].num_pages, owner)
            storage.write_adapter(packed[adapter], pages, wait_for_steps=False)
            resident[adapter] = (owner, pages)
            num_loads += 1
            num_scattered += sorted(pages) != list(range(min(pages), min(pages) + len(pages)))
        else:
            num_refused += 1
        if number % 100 == 0:
            pool.check()
            held = [page for _, pages in resident.values() for page in pages]
            assert len(held) == len(set(held)) == pool.num_pages - pool.num_free, "a page is lost or has two owners"
            for adapter, (_, pages) in resident.items():
                # A directory holds addresses, which differ from place to place.
                for page, place in list(zip(pages, packed[adapter].places, strict=True))[1:]:
                    assert storage.pages[page].numpy().tobytes() == packed[adapter].pages[place].tobytes()
    assert num_loads > 3000 and num_refused > 500 and num_scattered > 1000


def test_kv_is_a_view_of_the_same_bytes() -> None:
    storage = PageStorage(LAYOUT, 4, torch.float32, CPU)
    assert storage.kv.shape == (5, 3, 2, 8, 2, 16), "four pages and the scratch page"
    storage.kv[2, 1, 1, 5, 1, 7] = 3.5
    at = ((((2 * 3 + 1) * 2 + 1) * 8 + 5) * 2 + 1) * 16 + 7
    assert storage.bytes.view(torch.float32)[at].item() == 3.5
    assert int((storage.pages != 0).any(1).sum()) == 1


def test_pages_are_used_as_given() -> None:
    storage = PageStorage(LAYOUT, 8, torch.float32, CPU)
    packed = pack_adapter([module(0, 0, 1, 0)], LAYOUT, SHAPES)
    with pytest.raises(AssertionError):
        storage.write_adapter(packed, [8] * packed.num_pages, wait_for_steps=False)
    with pytest.raises(AssertionError):
        storage.write_adapter(packed, [], wait_for_steps=False)


def test_an_empty_adapter_has_no_ranks() -> None:
    packed = pack_adapter([], LAYOUT, SHAPES)
    assert (packed.num_pages, packed.max_rank) == (1, 0)
    assert not packed.headers.any()
    assert packed.nbytes >= LAYOUT.page_bytes


def test_a_directory_over_a_page_is_refused_with_the_limit() -> None:
    layout = PageLayout(num_layers=8, block_tokens=1, num_kv_heads=1, head_dim=16, itemsize=2)
    modules = [module(layer, index, 64, 0) for layer in range(8) for index in range(3)]
    with pytest.raises(AdapterLoadFailed, match="512 bytes"):
        pack_adapter(modules, layout, SHAPES)


def test_a_pool_beyond_the_addresses_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=str(128 << 31)):
        PageStorage(LAYOUT, 1 << 40, torch.float32, torch.device("meta"))


def test_a_copy_is_made_in_slices_of_whole_pages() -> None:
    """No page is written before its slice, none after; the directory comes with the first."""
    packed = pack_adapter([module(0, 0, 40, 1), module(1, 2, 17, 2)], LAYOUT, SHAPES)
    storage = PageStorage(LAYOUT, 16, torch.float32, CPU)
    storage.bytes.fill_(255)
    pages = random.Random(1).sample(range(16), packed.num_pages)
    copy = storage.begin_adapter(packed, pages, wait_for_steps=False)
    written: list[int] = []
    for max_bytes in (1, LAYOUT.page_bytes + 1, LAYOUT.page_bytes, 1 << 40):
        assert not copy.issued and not copy.ended
        assert not (storage.pages[[page for page in range(16) if page not in written]] != 255).any()
        count = min(-(-max_bytes // LAYOUT.page_bytes), packed.num_pages - len(written))
        assert storage.advance(copy, max_bytes) == count * LAYOUT.page_bytes
        written += pages[len(written) : len(written) + count]
    assert copy.issued and copy.ended and written == pages
    at_once = PageStorage(LAYOUT, 16, torch.float32, CPU)
    at_once.bytes.fill_(255)
    at_once.write_adapter(packed, pages, wait_for_steps=False)
    assert torch.equal(storage.bytes, at_once.bytes)


def test_an_image_is_its_pages_and_no_more() -> None:
    """So what `test_layout` says of pages holds for host memory too."""
    modules = [module(layer, index, 17, layer) for layer in range(3) for index in range(3)]
    packed = pack_adapter(modules, LAYOUT, SHAPES)
    assert packed.nbytes == packed.num_pages * LAYOUT.page_bytes
