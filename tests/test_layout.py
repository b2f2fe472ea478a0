"""The cut of adapters to tiles, and their placement in pages: shapes and integers only."""

from itertools import pairwise

import pytest

from lorasrv.memory.layout import ALIGN_BYTES, TILE_ROWS, AdapterImage, MatrixShape, PageLayout, Tile, adapter_image
from lorasrv.model.families import MODULE_PATHS, Architecture
from lorasrv.model.rope_config import DefaultRope

RANKS = (1, 3, 8, 13, 16, 48, 63, 64, 100, 256)
SUBSETS = {"all": tuple(range(7)), "attention": (0, 1, 2, 3), "query_value": (0, 2), "down": (6,)}


def shape(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> Architecture:
    return Architecture(
        name="shape",
        architecture="LlamaForCausalLM",
        num_layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=32000,
        context_tokens=4096,
        rms_norm_eps=1e-5,
        rope=DefaultRope(theta=1e4),
        windows=(None,) * layers,
        qkv_bias=False,
        o_bias=False,
        tie_word_embeddings=False,
        eos_token_ids=(2,),
    )


MODELS = {
    "0.5B": shape(24, 896, 4864, 14, 2),
    "7B": shape(32, 4096, 11008, 32, 32),
    "8B": shape(32, 4096, 14336, 32, 8),
    "70B": shape(80, 8192, 28672, 64, 8),
}


def layout_of(model: Architecture, itemsize: int = 2) -> PageLayout:
    return PageLayout(
        num_layers=model.num_layers,
        block_tokens=16,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        itemsize=itemsize,
    )


def matrices_of(model: Architecture, rank: int, modules: tuple[int, ...]) -> list[MatrixShape]:
    shapes = model.module_shapes()
    layer = [MatrixShape(rank=rank, cols=cols) for index in modules for cols in shapes[index][1:]]
    return layer * model.num_layers


def placed(model: Architecture, rank: int, modules: tuple[int, ...], itemsize: int = 2) -> AdapterImage:
    num_headers = model.num_layers * len(MODULE_PATHS)
    layout = layout_of(model, itemsize)
    image = adapter_image(matrices_of(model, rank, modules), num_headers, layout.page_bytes, itemsize)
    assert image is not None
    return image


@pytest.mark.parametrize("modules", SUBSETS.values(), ids=SUBSETS)
@pytest.mark.parametrize("name", MODELS)
def test_waste_is_at_most_one_percent_plus_a_page(name: str, modules: tuple[int, ...]) -> None:
    model = MODELS[name]
    page_bytes = layout_of(model).page_bytes
    for rank in RANKS:
        weight_bytes = sum(2 * m.rank * m.cols for m in matrices_of(model, rank, modules))
        image = placed(model, rank, modules)
        assert (image.num_pages - 1) * page_bytes - weight_bytes <= 0.01 * weight_bytes, rank


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [1, 3, 16, 63, 100])
def test_tiles_cover_every_element_once_inside_their_pages(rank: int, itemsize: int) -> None:
    model = shape(3, 120, 200, 6, 2)
    page_bytes = layout_of(model, itemsize).page_bytes
    image = placed(model, rank, SUBSETS["all"], itemsize)
    covered: dict[int, set[tuple[int, int]]] = {}
    for tile in image.tiles:
        cells = {(r, c) for r in range(tile.row, tile.row + tile.num_rows) for c in range(tile.col, end_col(tile))}
        assert not covered.setdefault(tile.matrix, set()) & cells
        covered[tile.matrix] |= cells
    for index, matrix in enumerate(matrices_of(model, rank, SUBSETS["all"])):
        assert covered[index] == {(r, c) for r in range(matrix.rank) for c in range(matrix.cols)}
    check_places(image, page_bytes, itemsize)


def end_col(tile: Tile) -> int:
    return tile.col + tile.num_cols


def check_places(image: AdapterImage, page_bytes: int, itemsize: int) -> None:
    """Tiles are aligned, stay in their page, and overlap neither each other nor the directory."""
    spans = [(0, 0, image.directory_bytes)]
    for tile in image.tiles:
        size = tile.num_rows * tile.num_cols * itemsize
        assert tile.offset_bytes % ALIGN_BYTES == 0
        assert tile.offset_bytes + size <= page_bytes
        assert 1 <= tile.num_rows <= TILE_ROWS
        spans.append((tile.local_page, tile.offset_bytes, tile.offset_bytes + size))
    for (page, _, end), (next_page, begin, _) in pairwise(sorted(spans)):
        assert page != next_page or end <= begin
    assert {page for page, _, _ in spans} == set(range(image.num_pages))


@pytest.mark.parametrize("rank", [1, 13, 64])
def test_places_of_a_real_shape(rank: int) -> None:
    model = MODELS["0.5B"]
    check_places(placed(model, rank, SUBSETS["all"]), layout_of(model).page_bytes, 2)


def test_directory_order_is_matrix_then_row_block_then_chunk() -> None:
    image = placed(shape(2, 120, 200, 6, 2), 20, SUBSETS["all"])
    keys = [(tile.matrix, tile.row, tile.col) for tile in image.tiles]
    assert keys == sorted(keys)
    for matrix, first in enumerate(image.first_tile):
        assert image.tiles[first].matrix == matrix
        assert first == 0 or image.tiles[first - 1].matrix == matrix - 1


def test_rank_three_costs_three_rows() -> None:
    model = MODELS["8B"]
    three, sixteen = (
        sum(tile.num_rows * tile.num_cols for tile in placed(model, rank, SUBSETS["all"]).tiles) for rank in (3, 16)
    )
    assert three / 3 == sixteen / 16


def test_an_adapter_of_no_matrices_is_a_directory_alone() -> None:
    model = MODELS["8B"]
    image = placed(model, 8, ())
    assert (image.num_pages, image.tiles, image.first_tile) == (1, (), ())
    assert image.directory_bytes == 4 * 4 * 7 * model.num_layers


def test_a_directory_over_a_page_is_no_image() -> None:
    assert adapter_image([MatrixShape(rank=256, cols=64)] * 200, 200, 2048, 2) is None


def test_a_page_must_be_aligned() -> None:
    with pytest.raises(ValueError, match="96 bytes is not a multiple of 128"):
        PageLayout(num_layers=1, block_tokens=1, num_kv_heads=1, head_dim=12, itemsize=4)


def test_pages_for_tokens_rounds_up() -> None:
    layout = layout_of(MODELS["8B"])
    assert [layout.pages_for_tokens(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
