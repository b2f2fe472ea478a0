"""The cost model by hand, and against the benchmark's own floors; hardware tables."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fake_engine import BASE_MODEL
from lorasrv.engine.batch import AdapterInput, ChunkInput
from lorasrv.errors import ConfigurationError
from lorasrv.model.families import read_architecture
from lorasrv.model.shape import MODELS, ModelShape
from lorasrv.sim.cost import CostModel
from lorasrv.sim.hardware import HARDWARE, find_hardware, write_hardware
from lorasrv.sim.images import Adapters, page_layout
from lorasrv.sim.work import StepWork, step_work
from lorasrv_bench.gpu_floors import Ceilings, step_floor
from sim_rig import TINY, hardware

# 2 layers of q 64x64, k and v 64x32, o 64x64, gate and up 64x96, down 96x64; a head of 64x100.
LINEAR, HEAD, ADAPTER_PER_RANK, KV = (
    2 * (3 * 4096 + 3 * 6144),
    6400,
    2 * (128 + 96 + 96 + 128 + 3 * 160),
    2 * 2 * 2 * 16,
)


def chunk(start: int, num_tokens: int, directory: int | None = None) -> ChunkInput:
    adapter = None if directory is None else AdapterInput(directory=directory, max_rank=directory, scale=1.0)
    return ChunkInput(token_ids=(1,) * num_tokens, start=start, block_table=(), adapter=adapter)


def test_a_shape_counts_its_weights() -> None:
    assert (TINY.linear_params, TINY.head_params, TINY.kv_elems_per_token) == (LINEAR, HEAD, KV)
    assert TINY.params == LINEAR + 2 * HEAD and replace(TINY, tied=True).params == LINEAR + HEAD
    assert TINY.adapter_params(3) == 3 * ADAPTER_PER_RANK
    # As published.
    assert [round(MODELS[name].params / 1e9, 2) for name in ("7B", "8B", "13B", "70B")] == [6.74, 8.03, 13.02, 70.55]


def test_a_folders_shape_is_its_config() -> None:
    architecture = read_architecture(BASE_MODEL)
    shape = ModelShape.of(architecture)
    assert [each[1:] for each in shape.module_shapes] == [each[1:] for each in architecture.module_shapes()]
    assert (shape.num_layers, shape.vocab_size) == (architecture.num_layers, architecture.vocab_size)


def test_the_work_of_a_step() -> None:
    # Two decodes of one adapter, a decode of another, a decode that is still drawn (no token id), a prefill's part.
    chunks = [chunk(9, 1, 4), chunk(19, 1, 4), chunk(4, 1, 8), chunk(6, 0), chunk(16, 3, 8)]
    work = step_work(chunks, {4: 400, 8: 800, 16: 1})
    assert work == StepWork(
        num_rows=5,
        num_tokens=7,
        context_tokens=10 + 20 + 5 + 7 + 19,
        pairs=10 + 20 + 5 + 7 + (17 + 18 + 19),
        num_adapters=2,
        adapter_params=1200,
        adapter_products=2 * 400 + 4 * 800,
    )


def test_a_step_bound_by_reading() -> None:
    machine = hardware()
    work = StepWork(num_rows=1, num_tokens=1, context_tokens=50, pairs=50, num_adapters=1, adapter_params=7000)
    costs = CostModel(TINY, machine, itemsize=4)
    assert costs.linear_s(work) == pytest.approx(4 * (LINEAR + HEAD) / 1e8)
    assert costs.adapters_s(work) == pytest.approx(4 * 7000 / 1e7 + 1e-4)
    assert costs.attention_s(work) == pytest.approx(4 * KV * 50 / 1e7)
    kernels = 2 * (10 + 1) + 8
    expected = costs.linear_s(work) + costs.adapters_s(work) + costs.attention_s(work) + kernels * 1e-5
    assert costs.forward_s(work) == pytest.approx(expected)
    without = replace(work, num_adapters=0, adapter_params=0)
    assert costs.forward_s(without) == pytest.approx(expected - 4 * 7000 / 1e7 - 1e-4 - 2e-5)


def test_a_step_bound_by_operations() -> None:
    work = StepWork(num_rows=2, num_tokens=300, context_tokens=300, pairs=23000, adapter_products=5000)
    costs = CostModel(TINY, hardware(kv_bytes_per_s=1e9), itemsize=4)
    assert costs.linear_s(work) == pytest.approx(2 * (300 * LINEAR + 2 * HEAD) / 1e9)
    assert costs.adapters_s(work) == pytest.approx(2 * 5000 / 1e9)
    assert costs.attention_s(work) == pytest.approx(4 * 2 * 64 * 23000 / 1e9)


def test_the_floor_is_the_benchmarks_floor() -> None:
    """Two statements of one arithmetic: where reading bounds every phase, and where operations do."""
    chunks = [chunk(1023, 1, 16)] * 8 + [chunk(100, 30, 64), chunk(0, 1)]
    rows, contexts = [each.num_tokens for each in chunks], [each.start + each.num_tokens for each in chunks]
    shape = MODELS["8B"]
    work = step_work(chunks, {rank: shape.adapter_params(rank) for rank in (16, 64)})
    for read, flops in ((1e9, 1e18), (1e18, 1e9)):
        bandwidths = dict.fromkeys(("read_bytes_per_s", "adapter_bytes_per_s", "kv_bytes_per_s"), read)
        machine = hardware(**bandwidths, flops_per_s=flops, kernel_s=0, adapter_s=0, step_s=0, row_s=0)
        floor = step_floor(shape, rows, contexts, [16, 64], {16: 8, 64: 30}, 2)
        ceilings = Ceilings(read=read, copy=1.0, to_device=1.0, matmul=flops)
        assert CostModel(shape, machine, 2).forward_s(work) == pytest.approx(floor.seconds(ceilings))


def test_an_adapters_pages_are_the_layouts() -> None:
    layout = page_layout(MODELS["8B"], 16, 2)
    images = Adapters(MODELS["8B"], layout, (16, 64))
    for digest, rank in (("0", 16), ("1", 64), ("2", 16)):
        weights = 2 * MODELS["8B"].adapter_params(rank)
        assert weights < images[digest].nbytes <= 1.01 * weights + layout.page_bytes
        assert images[digest].nbytes == images[digest].num_pages * 2**21
        assert (images[digest].max_rank, images[digest].params) == (rank, weights // 2)


def test_a_hardware_table_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    write_hardware(hardware(runs_ahead=False, row_s=3e-6), path)
    assert find_hardware(str(path)) == hardware(runs_ahead=False, row_s=3e-6)
    assert find_hardware("h200") is HARDWARE["h200"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, r"\['speed'\]; a hardware table has name"),
        ({"flops_per_s": 0}, "flops_per_s is 0; it must be > 0"),
        ({"step_s": -1.0}, "step_s is -1.0; it must be >= 0"),
        ({"flops_per_s": float("nan")}, "flops_per_s is nan"),
        ({"row_s": "2"}, "row_s is '2'"),
        ({"row_s": True}, "row_s is True"),
        ({"runs_ahead": 1}, "runs_ahead is 1"),
        ({"name": None}, "name is None"),
    ],
)
def test_a_wrong_hardware_file_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps(asdict(hardware()) | changes))
    with pytest.raises(ConfigurationError, match=message):
        find_hardware(str(path))


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "no object"), ("{}", "missing")])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "box.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        find_hardware(str(path))
    with pytest.raises(ConfigurationError, match="'h999' is no file and none of h200, "):
        find_hardware("h999")
