"""Paged attention of one layer against its floor, and beside torch's own."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorasrv_bench.gpu_attention_load import Load, Parts, labels, lay_load
from lorasrv_bench.gpu_attention_torch import Attend, baselines
from lorasrv_bench.gpu_floors import attention_floor
from lorasrv_bench.gpu_kernels import attention
from lorasrv_bench.gpu_pool import DTYPE
from lorasrv_bench.gpu_records import timed
from lorasrv_bench.gpu_section import Section, check, distance
from lorasrv_bench.gpu_sgmv_cases import some
from lorasrv_bench.gpu_timing import Round, Timing, free_memory
from lorasrv_kernels import reference

LIMIT = 2e-2
_CHECKED_SEQUENCES = 2
# The oracle holds every score of a sequence, so long chunks are compared at their last rows.
_CHECKED_ROWS = 256


def run(section: Section) -> None:
    loads = {str(index): parts for index, parts in enumerate(section.size.attention_loads)}
    cases = {key: labels(parts) for key, parts in loads.items()}
    section.each(cases, lambda key: _run_case(section, cases[key], loads[key]), 1.5)


def _run_case(section: Section, case: dict[str, object], parts: Parts) -> None:
    load = lay_load(section, parts)
    paged = attention(load.rows, load.contexts, load.model.num_heads, load.kv)

    def ours(layer: int) -> Tensor:
        paged(load.query, load.kv, layer, load.tables, load.starts, load.lengths, None, load.out)
        return load.out

    timing = _time(section, {"peer": "ours"} | case, load, ours, None)
    for name, make in baselines().items():
        with section.case({"peer": name} | case):
            _time(section, {"peer": name} | case, load, make(load), timing)
        free_memory(section.device)


def _time(section: Section, case: dict[str, object], load: Load, attend: Attend, ours: Timing | None) -> Timing:
    """Check, time and record what computes a layer; twice where there is nothing to compare it with."""
    error = max(_error(load, layer, attend) for layer in {0, load.num_layers - 1})
    ready = Round([_call(attend, layer) for layer in range(load.num_layers)], section.device)
    timing = ready.time(section.size.case_s)
    floor = attention_floor(load.model, load.rows, load.contexts, DTYPE.itemsize)
    section.add(
        timed(
            section.name,
            case,
            timing,
            again=ready.time(section.size.case_s) if ours is None else None,
            floor_s=floor.seconds(section.ceilings),
            error=error,
            values={} if ours is None else {"over_ours": timing.median_s / ours.median_s},
        )
    )
    return timing


def _call(attend: Attend, layer: int) -> Callable[[], Tensor]:
    return lambda: attend(layer)


def _error(load: Load, layer: int, attend: Attend) -> float:
    """Against the oracle on the last rows of some sequences; all other rows must be finite."""
    load.out.fill_(float("nan"))
    found = attend(layer)
    worst = 0.0 if bool(found.isfinite().all()) else float("inf")
    for index in some(range(len(load.rows)), _CHECKED_SEQUENCES):
        last = min(load.rows[index], _CHECKED_ROWS)
        end = sum(load.rows[: index + 1])
        query = load.query[end - last : end]
        expected = torch.empty_like(query)
        reference.paged_attention(
            query,
            load.kv,
            layer,
            load.tables[index : index + 1],
            torch.tensor([0, last], dtype=torch.int32, device=query.device),
            load.lengths[index : index + 1],
            None,
            expected,
        )
        worst = max(worst, distance(found[end - last : end], expected))
    return check(worst, LIMIT, "attention")
