"""Parts of the GPU benchmark: floors by brute force, budget, order of cases, tables, peers' loader."""

import random
import sys
from pathlib import Path

import pytest
import torch

from lorasrv.memory.layout import MatrixShape, cut_matrix
from lorasrv_bench import gpu_predict
from lorasrv_bench.gpu_budget import Budget, Deadline
from lorasrv_bench.gpu_floors import Ceilings, attention_floor, seen_pairs, sgmv_floor, step_floor
from lorasrv_bench.gpu_models import GROUPS, LLAMA_8B, LLAMA_70B_TP8, TINY
from lorasrv_bench.gpu_peers import Checkout, find_peers
from lorasrv_bench.gpu_pool import DTYPE, adapter_form, dense_matrices, fill_random, lay, page_layout
from lorasrv_bench.gpu_records import NOT_RUN, Record, Results
from lorasrv_bench.gpu_report import report
from lorasrv_bench.gpu_sgmv_cases import SgmvCase, lay_case, num_variants, sgmv_cases, some
from lorasrv_bench.gpu_sizes import CPU_SIZE, QUICK_SIZE
from lorasrv_bench.gpu_targets import Found, fastest_peers, targets
from lorasrv_bench.gpu_tests import pytest_command, run_logged, status_of, summary
from lorasrv_bench.gpu_timing import Timing
from lorasrv_kernels import reference
from peers_fake import write_checkout

UNIT = Ceilings(read=1.0, copy=1.0, to_device=1.0, matmul=1.0)


def test_sgmv_floor_is_what_the_tiles_and_rows_come_to() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        model, rank, group = TINY, rng.choice((1, 3, 8, 16, 40)), rng.choice(tuple(GROUPS))
        shapes = [model.module_shapes[module] for module in GROUPS[group]]
        rows = [rng.randrange(0, 5) for _ in range(rng.randrange(1, 6))]
        num_bytes, flops = 0, 0
        for num_rows in rows:
            for _, num_in, num_out in shapes:
                tiles = [
                    tile
                    for cols in (num_in, num_out)
                    for tile in cut_matrix(0, MatrixShape(rank=rank, cols=cols), page_layout(model).page_bytes, 2)
                ]
                if num_rows:
                    num_bytes += sum(2 * height * width for _, _, height, _, width in tiles)
                flops += sum(2 * num_rows * height * width for _, _, height, _, width in tiles)
                num_bytes += 2 * 2 * num_rows * num_out
            num_bytes += 2 * num_rows * shapes[0][1]
        floor = sgmv_floor(shapes[0][1], [s[2] for s in shapes], [rank] * len(rows), rows, 2)
        assert (floor.num_bytes, floor.flops) == (num_bytes, flops), (seed, rows, group)


def test_attention_floor_counts_what_rows_see() -> None:
    for rows, context in ((1, 1), (1, 9), (4, 4), (3, 10)):
        pairs = sum(key <= context - rows + row for row in range(rows) for key in range(context))
        assert seen_pairs(rows, context) == pairs
    floor = attention_floor(TINY, [1, 3], [9, 10], 2)
    kv, query = 2 * 19 * TINY.num_kv_heads * TINY.head_dim, TINY.num_heads * TINY.head_dim
    assert floor.num_bytes == 2 * (kv + 2 * 4 * query)
    assert floor.flops == 4 * query * (seen_pairs(1, 9) + seen_pairs(3, 10))


def test_a_decode_step_of_the_8b_touches_fifteen_gigabytes() -> None:
    base = step_floor(LLAMA_8B, [1], [1024], [], {}, 2)
    assert base.num_bytes / 1e9 == pytest.approx(15.0 + 1024 * 131072 / 1e9, abs=0.05)
    lora = step_floor(LLAMA_8B, [1] * 64, [1024] * 64, [16] * 64, {16: 64}, 2)
    plain = step_floor(LLAMA_8B, [1] * 64, [1024] * 64, [], {}, 2)
    # The published size of a rank 16 adapter of all projections of the 8B.
    assert (lora.num_bytes - plain.num_bytes) / 64 == 2 * 41_943_040
    assert base.seconds(UNIT) == max(base.num_bytes, base.flops)


def test_predicted_times_are_above_their_floors() -> None:
    rows = {row.what: row for row in gpu_predict.h200_rows()}
    assert all(row.floor_s <= row.low_s <= row.high_s for row in rows.values())
    base = rows["decode step, batch 1, 0 adapters r16"]
    assert base.floor_s == pytest.approx(3.5e-3, rel=0.02)
    assert "unmeasured" in gpu_predict.table()


def test_a_section_gets_its_share_of_what_is_left() -> None:
    now = [0.0]
    budget = Budget({"a": 1, "b": 2, "c": 1}, 100.0, clock=lambda: now[0])
    assert budget.take("a") == 25
    now[0] = 10.0
    assert budget.take("b") == 60
    now[0] = 95.0
    assert budget.take("c") == 5
    for name in ("a", "c"):
        with pytest.raises(KeyError):
            budget.take(name)


def test_a_section_left_out_leaves_its_share() -> None:
    budget = Budget({"a": 1, "b": 2, "c": 1}, 100.0, clock=lambda: 0.0)
    assert budget.take("c") == 100


def test_nothing_remains_after_the_deadline() -> None:
    now = [0.0]
    deadline = Deadline(10.0, clock=lambda: now[0])
    assert deadline.remains(9.0)
    assert not deadline.remains(10.0)
    now[0] = 11.0
    assert deadline.left_s == 0
    assert not deadline.remains()


def test_the_most_telling_cases_come_first_and_all_come_once() -> None:
    cases = sgmv_cases(CPU_SIZE)
    assert len(set(cases)) == len(cases) == len(CPU_SIZE.ranks) * len(CPU_SIZE.loads) * len(GROUPS)
    first = cases[0]
    assert (first.rank, (first.tokens, first.adapters)) == (CPU_SIZE.ranks[0], CPU_SIZE.loads[0])
    assert {case.group for case in cases[:12]} == set(GROUPS)
    assert {case.rank for case in cases[:12]} == set(CPU_SIZE.ranks)


def test_rows_are_shared_out() -> None:
    case = SgmvCase(model=LLAMA_70B_TP8, group="down", rank=8, tokens=10, adapters=4)
    assert case.rows == (3, 3, 2, 2)
    assert (case.in_features, case.out_features) == (3584, (8192,))


def test_variants_go_beyond_the_cache_on_pages_of_their_own() -> None:
    case = sgmv_cases(QUICK_SIZE)[0]
    pool = torch.empty(QUICK_SIZE.pool_bytes, dtype=torch.uint8)
    fill_random(pool, 0.02, 0)
    laid = lay_case(case, QUICK_SIZE, pool, 0)
    assert len(laid.variants) == num_variants(case, QUICK_SIZE) > page_layout(case.model).num_layers
    assert len(laid.variants) * case.floor.num_bytes >= 3 * QUICK_SIZE.cache_bytes
    adapters = {adapter for variant in laid.variants for adapter in variant.adapters}
    pages = [page for adapter in adapters for page in adapter.pages]
    assert len(set(pages)) == len(pages)
    assert len({(variant.adapters, variant.layer) for variant in laid.variants}) == len(laid.variants)


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_dense_matrices_are_the_ones_that_the_tiles_hold(rank: int) -> None:
    layout = page_layout(TINY)
    form = adapter_form(TINY, layout, rank, (0, 1, 2), 2)
    pool = torch.empty(4 * form.num_pages * layout.page_bytes, dtype=torch.uint8)
    fill_random(pool, 0.02, 0)
    pages = torch.randperm(4 * form.num_pages)[: 2 * form.num_pages].view(2, -1).tolist()
    adapters = [lay(pool, layout.page_bytes, form, own) for own in pages]
    for layer, module in ((0, 0), (1, 2)):
        a, b = dense_matrices(pool, layout.page_bytes, form, adapters, layer, module, TINY.module_shapes)
        assert a.shape == (2, rank, TINY.module_shapes[module][1])
        assert b.shape == (2, rank, TINY.module_shapes[module][2])
        for index, adapter in enumerate(adapters):
            for dense, first in ((a, 1), (b, 2)):
                address = int(form.headers[layer * 7 + module, first])
                cuts = cut_matrix(0, MatrixShape(rank=rank, cols=dense.shape[2]), layout.page_bytes, 2)
                for place, (_, row, height, col, width) in enumerate(cuts):
                    at = adapter.directory * 32 + address + place
                    begin = int(pool.view(torch.int32)[at]) * 64
                    tile = pool.view(DTYPE)[begin : begin + height * width].view(height, width)
                    assert torch.equal(dense[index, row : row + height, col : col + width], tile)
    assert reference.HEADER_FIELDS == 4


def test_some_keeps_the_ends() -> None:
    assert some(range(5), 8) == [0, 1, 2, 3, 4]
    assert some(range(256), 4) == [0, 85, 170, 255]
    assert some(range(7), 1) == [0]


def test_a_rounds_time_is_shared_among_its_calls() -> None:
    timing = Timing.of([2.0, 4.0, 6.0, 8.0, 10.0], num_calls=2)
    assert timing.median_s == 3.0
    assert timing.spread == pytest.approx(1.0)


def engine(adapters: int, batch: int, median_s: float, floor_s: float, section: str = "engine") -> Record:
    case = {"adapters": adapters, "batch": batch}
    return Record(section=section, case=case, median_s=median_s, floor_s=floor_s, error=0.0)


def verdicts(*records: Record) -> dict[str, tuple[str, bool | None]]:
    found = Found(records)
    return {target.what: (v := target.judge(found)) and (v.measured, v.met) for target in targets()}


def test_rows_are_judged_by_their_worst_case() -> None:
    found = verdicts(
        engine(0, 1, 1.1, 1.0),
        engine(0, 4, 1.3, 1.0),
        engine(0, 16, 1.0, 1.0),
        engine(0, 64, 1.2, 1.0),
        engine(64, 64, 1.29, 1.0),
        engine(0, 64, 1.7, 1.0, section="deterministic"),
    )
    assert found["decode step, base only, batch 1–16"] == ("1.30 ×", False)
    assert found["decode step, base only, batch 64"] == ("1.20 ×", True)
    assert found["64 distinct adapters, batch 64"] == ("1.29 ×", True)
    assert found["deterministic"] == ("1.42 × over 1 cases", True)
    assert found["one adapter r16, batch 1–64"] == ("not run: batch 1: it was not reached", None)


def test_a_row_that_was_not_run_says_why() -> None:
    nothing = verdicts()
    assert {met for _, met in nothing.values()} == {None}
    failed = Record(section="engine", case={"what": "the model"}, status=NOT_RUN, why="no memory")
    assert verdicts(failed)["64 distinct adapters, batch 256"] == ("not run: no memory", None)


def test_peers_are_judged_case_by_case_by_the_fastest() -> None:
    def peer(name: str, tokens: int, over: float) -> Record:
        case = {"peer": name, "tokens": tokens}
        return Record(section="sgmv", case=case, median_s=over, error=0.0, values={"over_ours": over})

    records = [peer("x", 1, 2.0), peer("y", 1, 1.6), peer("x", 64, 0.9), peer("y", 64, 3.0)]
    assert sorted(fastest_peers(Found(records)).values()) == [0.9, 1.6]
    found = verdicts(*records)
    assert found["kernels against the fastest peer, geometric mean"] == ("1.20 × over 2 cases", True)
    assert found["kernels against the fastest peer, worst case"] == ("0.90 × over 2 cases", False)


def test_cases_that_were_never_reached_are_counted(tmp_path: Path) -> None:
    results = Results(tmp_path, {"commit": "x"})
    results.add(Record(section="engine", case={}, status="planned", values={"cases": 5}))
    results.add(engine(0, 1, 1.1, 1.0))
    failed = Record(section="engine", case={"what": "the section"}, status=NOT_RUN, why="ended after its 9 s")
    results.add(failed)
    table = report(list(results.records()), {"commit": "x"}, on_gpu=True)
    assert "| engine | 1 | 1 | 4 | 0 | ended after its 9 s (1) |" in table
    assert table.endswith("| – |"), "the rows of the targets come last"


def test_the_tests_summary() -> None:
    assert summary("...\n=== 3 passed in 1.2s ===\n") == "3 passed in 1.2s"
    assert [status_of(code) for code in (0, 1, 5)] == ["done", "wrong", "not run"]


def test_what_a_command_said_is_kept_however_it_ends(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    failing = "import sys; print('FAILED one', flush=True); print('2 failed', file=sys.stderr); sys.exit(1)"
    assert run_logged([sys.executable, "-c", failing], log, 60.0) == (1, "2 failed")
    assert log.read_text() == "FAILED one\n2 failed\n"
    code, last = run_logged([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.0)
    assert code is None
    assert last.startswith("not over in the 0 s it had; last line: ")


def test_slow_tests_are_none_of_a_gpus() -> None:
    command = pytest_command()
    assert command[command.index("gpu and not slow") - 1] == "-m"


def test_a_checkout_is_imported_without_its_init_files(tmp_path: Path) -> None:
    write_checkout(tmp_path / "fakepeer")
    stubs = {"fakepeer.envs": {"SETTING": 7}}
    checkout = Checkout("fakepeer", tmp_path / "fakepeer", stubs)
    assert checkout.first(["fakepeer.newer.ops", "fakepeer.lora.ops"]).scaled(3) == 21
    with pytest.raises(ImportError, match=r"fakepeer\.none"):
        checkout.first(["fakepeer.none"])
    with pytest.raises(ImportError, match="no folder"):
        Checkout("fakepeer2", tmp_path / "nothing", {})
    with pytest.raises(ImportError, match="loaded already"):
        Checkout("torch", tmp_path, {})


def test_peers_that_are_not_there_say_so() -> None:
    assert find_peers(None, torch.device("cuda"))[1].keys() >= {"vllm", "sglang-v1"}
    found, missing = find_peers(Path("/nonexistent"), torch.device("cuda"))
    assert not found
    assert all("no folder" in why for why in missing.values())
