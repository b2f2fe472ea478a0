"""The simulated engine against brute force, by hand, and by what must hold whatever the workload."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lorasrv.errors import ConfigurationError
from lorasrv.sim.clock import WallClock
from lorasrv.sim.cost import CostModel
from lorasrv.sim.engine import EngineSetup, SimEngine
from lorasrv.sim.images import Adapters, page_layout
from lorasrv.sim.outcome import Times
from lorasrv.sim.replay import Record, Replica, replay
from lorasrv.sim.routing import ROUTERS, SLACK, Affinity, Balanced
from lorasrv.sim.simulate import fewest_engines, simulate
from lorasrv.sim.slo import Slo, parse_slo
from lorasrv.sim.work import StepWork
from lorasrv.sim.workload import digest_of, make_request
from lorasrv.types import Tier
from sim_rig import TINY, Asked, Asking, hardware, random_asking, setup

FREE = Slo()


def run(made: EngineSetup, asking: Asking) -> tuple[SimEngine, list[Record]]:
    """On one engine; its invariants hold at the end."""
    engine = SimEngine(made, asking.ranks)
    replica = Replica(core=engine.core, clock=engine.clock)
    resident = [digest_of(adapter) for adapter in asking.resident]
    assert replay(asking.arrivals, [replica], Balanced(), make_request, resident=resident)
    engine.core.check()
    assert not replica.running
    return engine, replica.records


@dataclass(kw_only=True)
class Going:
    """A request in the brute-force simulation."""

    asked: Asked
    computed: int = 0
    drawn: int = 0
    known: int = 0
    times: list[float]


def brute_force(made: EngineSetup, arrivals: Sequence[Asked]) -> list[list[float]]:
    """When each request's tokens come, where the pool is large and nobody has an adapter: one step after the other."""
    costs, budget, places = (
        CostModel(TINY, made.hardware, 4),
        made.scheduler.max_step_tokens,
        made.scheduler.max_running,
    )
    going = [Going(asked=asked, times=[]) for asked in arrivals]
    waiting: list[Going] = []
    running: list[Going] = []
    now = device = 0.0
    num_come = 0
    before: tuple[float, list[Going]] | None = None

    def learn(step: tuple[float, list[Going]]) -> list[Going]:
        nonlocal now
        now = max(now, step[0])
        for each in step[1]:
            each.known += 1
            if each.known == each.asked.output_tokens:
                running.remove(each)
        return step[1]

    while num_come < len(going) or waiting or running:
        if not (waiting or running):
            now = max(now, going[num_come].asked.at_s)
        while num_come < len(going) and going[num_come].asked.at_s <= now:
            waiting.append(going[num_come])
            num_come += 1
        left, chunks = budget, list[tuple[Going, int]]()
        decoding = [each for each in running if each.computed >= each.asked.prompt_tokens]
        for each in decoding:
            if each.drawn < each.asked.output_tokens:
                chunks.append((each, 1))
                left -= 1
        for each in running:
            if each not in decoding and left:
                chunks.append((each, min(left, each.asked.prompt_tokens - each.computed)))
                left -= chunks[-1][1]
        while waiting and len(running) < places and left:
            running.append(waiting.pop(0))
            chunks.append((running[-1], min(left, running[-1].asked.prompt_tokens)))
            left -= chunks[-1][1]
        learned: list[Going] = []
        step = None
        if chunks:
            now += made.hardware.step_s + made.hardware.row_s * len(chunks)
            ends = [each.computed + count for each, count in chunks]
            work = StepWork(
                num_rows=len(chunks),
                num_tokens=sum(count for _, count in chunks),
                context_tokens=sum(ends),
                pairs=sum(sum(range(end - count + 1, end + 1)) for end, (_, count) in zip(ends, chunks, strict=True)),
            )
            device = max(device, now) + costs.forward_s(work)
            for each, count in chunks:
                each.computed += count
        if before is not None:
            learned += learn(before)
            before = None
        if chunks:
            drawing = [each for each, _ in chunks if each.computed >= each.asked.prompt_tokens]
            for each in drawing:
                each.drawn += 1
            device = max(device, now)
            step = (device, drawing)
        if step is not None and not made.hardware.runs_ahead:
            learned += learn(step)
            step = None
        before = step
        for each in learned:
            each.times.append(now)
    return [each.times for each in going]


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_times_are_those_of_a_brute_force_simulation(seed: int, runs_ahead: bool) -> None:
    made = setup(hardware(runs_ahead=runs_ahead), prefix_cache=seed % 2 == 0)
    asking = random_asking(seed, 12, rate=(5.0, 40.0, 400.0)[seed % 3])
    expected = brute_force(made, asking.arrivals)
    _, records = run(made, asking)
    assert [record.first_s for record in records] == pytest.approx([times[0] for times in expected], abs=1e-9)
    assert [record.last_s for record in records] == pytest.approx([times[-1] for times in expected], abs=1e-9)
    assert [len(times) for times in expected] == [asked.output_tokens for asked in asking.arrivals]


def test_a_cold_adapters_first_token_by_hand() -> None:
    made = setup(hardware(runs_ahead=False))
    image = Adapters(TINY, page_layout(TINY, 16, 4), (4,))["0"]
    work = StepWork(
        num_rows=1,
        num_tokens=4,
        context_tokens=4,
        pairs=10,
        num_adapters=1,
        adapter_params=image.params,
        adapter_products=4 * image.params,
    )
    step_s = 1e-3 + 1e-4 + CostModel(TINY, made.hardware, 4).forward_s(work)
    engine, (first, second) = run(made, Asking(arrivals=(Asked(adapter=0), Asked(at_s=60.0, adapter=0))))
    assert first.first_s is not None and second.first_s is not None
    assert first.first_s == pytest.approx(0.01 + image.nbytes / 1e5 + image.nbytes / 1e6 + step_s)
    assert second.first_s - 60.0 == pytest.approx(step_s)
    assert (first.tier, second.tier) == (Tier.DISK, Tier.DEVICE)
    assert engine.reads.read_bytes == engine.device.copied_bytes == image.nbytes


def test_reads_share_one_disk_and_the_readers() -> None:
    """Three adapters, two readers: two are opened together, their bytes come one after the other."""
    made = setup(hardware(runs_ahead=False))
    seconds = Adapters(TINY, page_layout(TINY, 16, 4), (4,))["0"].nbytes / 1e5
    engine = SimEngine(made, (4,))
    replica = Replica(core=engine.core, clock=engine.clock)
    arrivals = [Asked(adapter=adapter, output_tokens=1) for adapter in range(3)]
    replay(arrivals, [replica], Balanced(), make_request)
    first, second, third = (record.first_s or 0.0 for record in replica.records)
    copy_and_step = first - 0.01 - seconds
    assert 0 < copy_and_step < seconds
    assert second == pytest.approx(0.01 + 2 * seconds + copy_and_step, rel=0.02)
    # The third is opened when the first is there, and then the disk is still busy with the second.
    assert third == pytest.approx(0.01 + 3 * seconds + copy_and_step, rel=0.02)


def test_copies_run_beside_steps_where_steps_run_ahead() -> None:
    """A stream's tokens come no later for another request's copy; without, one of its gaps is a copy longer."""
    stream, late = Asked(output_tokens=200), Asked(at_s=0.05, adapter=0)
    seconds = Adapters(TINY, page_layout(TINY, 16, 4), (4,))["0"].nbytes / 1e6
    for runs_ahead in (True, False):
        engine = SimEngine(setup(hardware(runs_ahead=runs_ahead)), (4,))
        replica = Replica(core=engine.core, clock=engine.clock)
        replay([stream, late], [replica], Balanced(), make_request)
        assert (max(replica.gaps) > seconds) is not runs_ahead


def test_residents_are_there_before_the_first_request() -> None:
    asking = Asking(arrivals=tuple(Asked(adapter=adapter) for adapter in range(3)), resident=range(3))
    _, records = run(setup(), asking)
    assert [record.tier for record in records] == [Tier.DEVICE] * 3


def test_a_shared_prefix_is_computed_once() -> None:
    prompts = {"prompt_tokens": 40, "prefix": 0, "prefix_tokens": 33}
    asking = Asking(arrivals=(Asked(**prompts), Asked(at_s=9.0, **prompts), Asked(at_s=18.0, tenant=1, **prompts)))
    engine, _ = run(setup(), asking)
    assert engine.core.status().counters.cached_prompt_tokens == 32
    engine, _ = run(setup(prefix_cache=False), asking)
    assert engine.core.status().counters.cached_prompt_tokens == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_pool_too_small_for_all_still_serves_all(seed: int) -> None:
    """Evictions, preemptions and reads again: every request gets its tokens, and each load is a copy."""
    asking = replace(random_asking(seed, 40, rate=2.0, num_adapters=12, longest=60), ranks=(2, 4, 8))
    engine, records = run(setup(pool_bytes=140_000), asking)
    counters = engine.core.status().counters
    assert all(record.done for record in records)
    assert counters.completion_tokens == sum(asked.output_tokens for asked in asking.arrivals)
    assert counters.adapter_evictions > 0 and counters.adapter_loads > 12
    assert engine.device.copied_bytes % 8192 == 0 and engine.device.copied_bytes >= counters.adapter_loads * 8192


def test_the_same_again_is_the_same() -> None:
    asking = random_asking(3, 60, rate=30.0, num_adapters=9)
    first, second = (simulate(setup(), asking, 2, routing="affinity", slo=FREE) for _ in range(2))
    assert first == second
    other = simulate(setup(), random_asking(4, 60, rate=30.0, num_adapters=9), 2, routing="affinity", slo=FREE)
    assert other != first


@pytest.mark.parametrize("routing", ROUTERS)
@pytest.mark.parametrize("seed", range(3))
def test_more_engines_never_lower_goodput(seed: int, routing: str) -> None:
    asking, slo = random_asking(seed, 60, rate=40.0, num_adapters=6), Slo(ttft_s=0.6, itl_s=0.05)
    good = [simulate(setup(), asking, count, routing=routing, slo=slo).good for count in (1, 2, 4, 8)]
    assert good == sorted(good) and good[0] < good[-1]


def test_the_fewest_engines_are_found() -> None:
    asking, slo = random_asking(0, 80, rate=200.0), Slo(ttft_s=0.2)
    tried: list[tuple[int, bool, bool]] = []
    outcome = fewest_engines(
        setup(),
        asking,
        routing="balanced",
        slo=slo,
        most=64,
        tell=lambda trial: tried.append((trial.num_engines, trial.keeps_slo, trial.outcome is not None)),
    )
    assert outcome is not None and outcome.keeps_slo and outcome.num_engines > 2
    fewer = simulate(setup(), asking, outcome.num_engines - 1, routing="balanced", slo=slo)
    assert not fewer.keeps_slo
    assert simulate(setup(), asking, outcome.num_engines, routing="balanced", slo=slo) == outcome
    assert (1, False, False) in tried, "a lost run is stopped"
    assert fewest_engines(setup(), asking, routing="balanced", slo=Slo(ttft_s=1e-6), most=3) is None


def test_one_late_request_in_a_hundred_is_not_the_end() -> None:
    """The cold one is late; of 150 requests one may be, of 90 none."""
    for count, keeps in ((150, True), (90, False)):
        arrivals = tuple(Asked(at_s=float(number), adapter=None if number else 0) for number in range(count))
        found = fewest_engines(setup(), Asking(arrivals=arrivals), routing="affinity", slo=Slo(ttft_s=0.1), most=1)
        assert (found is not None) is keeps
        assert found is None or (found.done == 150 and found.good == 149)


def test_what_is_refused_is_counted_and_breaks_the_promise() -> None:
    asking = Asking(arrivals=tuple(Asked(output_tokens=30) for _ in range(9)))
    outcome = simulate(setup(max_waiting=3), asking, 1, routing="balanced", slo=FREE)
    assert outcome.refused == {"QUEUE_FULL": 6} and outcome.done == outcome.good == 3
    assert not outcome.keeps_slo


def test_good_requests_keep_both_bounds() -> None:
    asking = Asking(arrivals=(Asked(output_tokens=1), Asked(output_tokens=9), Asked(at_s=0.001, output_tokens=9)))
    free = simulate(setup(max_running=1), asking, 1, routing="balanced", slo=FREE)
    assert free.good == 3 and free.keeps_slo and free.ttft is not None and free.itl is not None
    tight = Slo(ttft_s=free.ttft.p99 - 1e-6)
    assert simulate(setup(max_running=1), asking, 1, routing="balanced", slo=tight).good == 2
    slow = Slo(itl_s=free.itl.p50 / 2)
    assert simulate(setup(max_running=1), asking, 1, routing="balanced", slo=slow).good == 1


def test_the_pool_over_time_adds_up() -> None:
    asking = random_asking(1, 60, rate=30.0, num_adapters=9)
    outcome = simulate(setup(), asking, 3, routing="balanced", slo=FREE)
    assert len(outcome.pool) > 20
    for sample in outcome.pool:
        pool = sample.pool
        assert pool.num_pages == 3 * setup().num_pages
        assert pool.free + pool.sequences + pool.prefix + pool.adapters == pool.num_pages
    assert [sample.at_s for sample in outcome.pool] == sorted(sample.at_s for sample in outcome.pool)


def test_percentiles_of_counts() -> None:
    counts = {0.1: 50, 0.2: 40, 0.3: 9, 0.9: 1}
    assert Times.of(counts) == Times(count=100, mean=pytest.approx(0.166), p50=0.1, p90=0.2, p99=0.3)
    assert Times.of({2.0: 1}) == Times(count=1, mean=2.0, p50=2.0, p90=2.0, p99=2.0)
    assert Times.of({}) is None


def test_an_adapter_stays_with_its_engines_until_they_are_overloaded() -> None:
    router = Affinity()
    home = [router.choose(adapter, [5, 5, 5, 5]) for adapter in range(200)]
    assert all(home.count(engine) > 25 for engine in range(4)), "adapters are spread"
    assert [router.choose(adapter, [9, 9, 9, 9]) for adapter in range(200)] == home
    loads = [0, 0, 0, 0]
    for _ in range(400):
        loads[router.choose(7, loads)] += 1
        assert max(loads) <= math.ceil((1 + SLACK) * sum(loads) / 4) + 1
    assert loads.index(max(loads)) == home[7]
    # With one engine more, no adapter moves between the others.
    moved = [router.choose(adapter, [5] * 5) for adapter in range(200)]
    assert all(new in (old, 4) for new, old in zip(moved, home, strict=True))
    assert router.choose(None, [3, 1, 2]) == Balanced().choose(4, [3, 1, 2]) == 1


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=5", "ttft=1s,ttft=2s", "itl=-1ms", "tpot=1s", "ttft=1e999s", "itl=0ms", ""]
)
def test_a_wrong_slo_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_slo(text)


def test_an_slo_is_read() -> None:
    assert parse_slo("ttft=0.5s, itl=40ms") == Slo(ttft_s=0.5, itl_s=0.04)
    assert parse_slo("itl=40ms") == Slo(itl_s=0.04)
    assert str(parse_slo("itl=40ms,ttft=2s")) == "ttft=2000ms,itl=40ms"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_bytes": 100}, "a page takes 0.01 MiB"),
        ({"pool_bytes": 2 << 30}, "a pool of 2.00 GiB: tiny takes 0.0 GiB, test has 5.0 GiB, 4 of them reserved"),
        ({"hardware": hardware(memory_bytes=2**30)}, "test has 1.0 GiB"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SimEngine(replace(setup(), **changes), (4,))


def test_the_pool_is_what_the_memory_leaves() -> None:
    made = replace(setup(), pool_bytes=None)
    assert made.num_pages == int((2**30 - 4 * TINY.params) // 8192)


def test_the_wall_clock_runs() -> None:
    clock = WallClock()
    clock.sleep_until(0.002)
    assert 0.002 <= clock() < 60
    clock.sleep_until(0.0)
