"""The benchmark of the engine's own work: its load does what it is to measure, and its curves say so."""

from dataclasses import replace

import pytest

from lorasrv_bench.decisions import GROWTHS, Growth, Load, Measured, measure

SMALL = Load(num_running=6, num_waiting=12, num_adapters=9, adapter_pages=3, max_prompt=60, max_output=60)


@pytest.mark.parametrize("seed", range(3))
def test_a_small_load_admits_evicts_and_preempts(seed: int) -> None:
    found = measure(SMALL, 400, seed)
    assert len(found.step_s) == len(found.decide_apply_s) == 399
    assert all(0 < part < whole for part, whole in zip(found.decide_apply_s, found.step_s, strict=True))
    assert min(found.admissions, found.loads, found.evictions, found.preemptions) > 0


def test_a_growth_is_drawn_over_multiples_of_the_target() -> None:
    loads = (replace(SMALL, num_running=3), SMALL)
    growth = Growth(name="num_running", target=6, loads=loads)
    times = {
        load: Measured(
            step_s=[1e-3 * (index + 1)] * 3,
            decide_apply_s=[5e-4] * 3,
            admissions=0,
            loads=0,
            evictions=0,
            preemptions=0,
        )
        for index, load in enumerate(loads)
    }
    whole, part = growth.curves(times)
    assert (whole.name, whole.points) == ("running: all", ((0.5, 1.0), (1.0, 2.0)))
    assert (part.name, part.points) == ("running: decide, apply", ((0.5, 0.5), (1.0, 0.5)))


def test_every_growth_passes_through_the_target() -> None:
    assert all(Load() in growth.loads for growth in GROWTHS)
    assert all(getattr(Load(), growth.name) == growth.target for growth in GROWTHS)
