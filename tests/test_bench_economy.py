"""The memory economy's benchmark: its arms differ in nothing but where adapters are, and it measures what it says."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_backend import greedy
from fake_engine import BASE_MODEL
from lorasrv.types import EngineRequest, Failure, TokenDelta
from lorasrv_bench import economy
from lorasrv_bench.asks import Ask
from lorasrv_bench.economy_arms import among_all, distinct_adapters, even_arrivals, gaps_in_storm, in_turn, storm_on
from lorasrv_bench.economy_bench import Bench, Registered, Setup, Within
from lorasrv_bench.in_process import InProcess
from lorasrv_bench.load import Call, CallFailed
from lorasrv_bench.summary import summarize
from lorasrv_bench.workloads import parse_workload

SETUP = Setup(
    model=BASE_MODEL,
    dtype="float32",
    dummy_weights=False,
    adapters=24,
    ranks=(8, 16),
    resident=8,
    concurrency=4,
    requests=40,
    prompt_tokens=6,
    output_tokens=5,
    storm=6,
    hot=2,
    hot_rate=4.0,
    storm_s=4.0,
    tenants=3,
    greedy=3.0,
    tenant_rate=2.0,
    tenant_s=4.0,
    rounds=2,
    seed=1,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Core:
    """Every request gets a token a step; steps take a tenth of a second. `wrong_at` as in `greedy`, unless scored."""

    def __init__(self, clock: Clock, wrong_at: int | None = None) -> None:
        self._clock = clock
        self._wrong_at = wrong_at
        self.answers: dict[str, Iterator[TokenDelta]] = {}
        self.most_open = 0

    def add(self, request: EngineRequest) -> None:
        scored = request.prompt_logprobs is not None
        self.answers[request.request_id] = greedy(request, None if scored else self._wrong_at)
        self.most_open = max(self.most_open, len(self.answers))

    def step(self) -> list[TokenDelta]:
        self._clock.now_s += 0.1
        deltas = [next(answer) for answer in self.answers.values()]
        for delta in deltas:
            if delta.finish is not None:
                del self.answers[delta.request_id]
        return deltas

    def has_work(self) -> bool:
        return bool(self.answers)


def engine(wrong_at: int | None = None, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[Core, InProcess]:
    clock = Clock()
    core = Core(clock, wrong_at)
    if monkeypatch is not None:
        monkeypatch.setattr("time.sleep", lambda seconds: setattr(clock, "now_s", clock.now_s + max(seconds, 1e-6)))
    return core, InProcess(core, {f"adapter-{number}": f"{number:064x}" for number in range(24)}, clock)


def asks(count: int, **values: Any) -> list[Ask]:
    fields: dict[str, Any] = {"at_s": 0.0, "name": "adapter-1", "adapter": 1, "tenant": 0, "max_tokens": 5}
    return [Ask(index=index, prompt=(1, 2, index), **(fields | values)) for index in range(count)]


def bench(wrong_at: int | None, monkeypatch: pytest.MonkeyPatch) -> Bench:
    _, process = engine(wrong_at, monkeypatch)
    names = tuple(f"adapter-{number}" for number in range(24))
    versions = {name: f"{number:064x}" for number, name in enumerate(names)}
    return Bench(SETUP, Registered(data_dir=Path(), names=names, versions=versions), Within(process))


def test_a_closed_loop_in_process() -> None:
    core, process = engine()
    sent = process.send(asks(12), 3)
    assert core.most_open == 3
    figures = summarize(sent.calls, None)
    assert figures["requests_per_s"] == pytest.approx(3 / 0.5)
    assert figures["ttft_s"]["p99"] == pytest.approx(0.1)
    assert [call.index for call in sent.calls] == list(range(12))


def test_an_open_loop_in_process_counts_from_a_request_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, process = engine(None, monkeypatch)
    planned = [replace(ask, at_s=at_s) for ask, at_s in zip(asks(3), (0.0, 0.05, 7.0), strict=True)]
    calls = process.send(planned, None).calls
    assert [call.piece_s[0] - call.sent_s for call in calls] == pytest.approx([0.1, 0.15, 0.1])
    assert [call.sent_s for call in calls] == [0.0, 0.05, 7.0]


def test_answers_in_process_are_scored() -> None:
    _, process = engine()
    (call,) = process.send(asks(1), 1).calls
    assert asyncio.run(process.gaps(asks(1)[0], call.token_ids)) == [0.0] * 5
    changed = (*call.token_ids[:2], (call.token_ids[2] + 1) % 50, *call.token_ids[3:])
    found = asyncio.run(process.gaps(asks(1)[0], changed))
    assert found[:2] == [0.0, 0.0] and found[2] == pytest.approx(4.9)


def test_a_failure_in_process_is_a_failed_call() -> None:
    core, process = engine()
    core.step = lambda: [
        TokenDelta(request_id=each, failure=Failure(reason="ADAPTER_CORRUPT", message="gone"))
        for each in [*core.answers]
        if core.answers.pop(each)
    ]
    assert [call.error for call in process.send(asks(2), 2).calls] == ["gone", "gone"]
    with pytest.raises(CallFailed, match="gone"):
        asyncio.run(process.gaps(asks(1)[0], (1, 2)))


def test_requests_of_both_arms_have_the_same_ranks_and_as_many_adapters_at_a_time() -> None:
    many, few = among_all(400, 2000, 4, (0, 1)), in_turn(400, 20)
    assert [number % 4 for number in many] == [number % 4 for number in few] == [index % 4 for index in range(400)]
    assert len(set(many)) > 300 and set(many) <= set(range(2000)) and len(set(few)) == 20
    _, process = engine()
    together = [
        process.send([replace(ask, adapter=number) for ask, number in zip(asks(400), arm, strict=True)], 16)
        for arm in (many, few)
    ]
    assert [distinct_adapters(sent.calls) for sent in together] == pytest.approx([16, 16], abs=0.2)


def call(index: int, adapter: int, sent_s: float, pieces: tuple[float, ...]) -> Call:
    return Call(
        index=index,
        adapter=adapter,
        tenant=0,
        planned_s=sent_s,
        sent_s=sent_s,
        ended_s=pieces[-1],
        piece_s=pieces,
        piece_tokens=(1,) * len(pieces),
        asked_prompt_tokens=1,
        asked_output_tokens=len(pieces),
        prompt_tokens=1,
        token_ids=(1,) * len(pieces),
        text="",
    )


def test_distinct_adapters_are_a_mean_over_time() -> None:
    calls = [call(0, 7, 0.0, (1.0, 4.0)), call(1, 7, 1.0, (2.0,)), call(2, 8, 2.0, (3.0,))]
    assert distinct_adapters(calls) == pytest.approx((2 * 1 + 1 * 2 + 1 * 1) / 4)


def test_gaps_are_those_of_the_hot_streams_while_the_storm_is_under_way() -> None:
    hot, storm = call(0, 0, 0.0, (1.0, 2.0, 4.0, 7.0, 11.0)), call(1, 5, 3.0, (6.0, 8.0))
    assert gaps_in_storm([hot, storm], hot=2) == [2.0, 3.0, 4.0]


def test_each_round_s_storm_is_of_adapters_of_its_own() -> None:
    workload = parse_workload("cold_storm:n=6,hot=2,requests=8,at=0.5", seed=0)
    arrivals = storm_on(workload, 14)
    assert Counter(arrival.adapter for arrival in arrivals) == {0: 4, 1: 4} | dict.fromkeys(range(14, 20), 1)
    assert [replace(arrival, adapter=None) for arrival in arrivals] == [
        replace(arrival, adapter=None) for arrival in workload.arrivals
    ]


def test_even_requests_are_of_one_size() -> None:
    assert {(a.prompt_tokens, a.output_tokens, a.at_s) for a in even_arrivals(range(5), 3, 2)} == {(3, 2, 0.0)}


@pytest.mark.parametrize(
    ("show", "ratio"), [("thousands", "to_resident"), ("storm", "to_resident"), ("tenants", "to_without")]
)
def test_arms_that_do_not_differ_have_the_ratio_one(show: str, ratio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = asyncio.run(economy.SHOWS[show](bench(None, monkeypatch)))
    assert told["wrong"] == [] and len(told["rounds"]) == SETUP.rounds
    # A request comes in the middle of a step more often where there are more.
    assert told[ratio] == pytest.approx(1.0, abs=0.29 if show == "tenants" else 0.1)
    line = economy.line(show, "process", told)
    assert ": met)" in line and "NO SCORE" not in line
    assert "NOT met" in economy.line(show, "process", told | {ratio: 0.5 if show == "thousands" else 2.0})


@pytest.mark.parametrize("show", ["thousands", "storm", "tenants"])
def test_wrong_output_has_no_figures(show: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = asyncio.run(economy.SHOWS[show](bench(2, monkeypatch)))
    assert told.keys() == {"wrong"}
    assert "nats from the likeliest when scored alone" in economy.line(show, "process", told)


def test_a_pool_holds_what_the_show_says() -> None:
    small, storm = (economy.pool_bytes(SETUP, show) for show in ("thousands", "storm"))
    bigger = economy.pool_bytes(replace(SETUP, resident=16), "thousands")
    architecture = economy.read_architecture(BASE_MODEL)
    width = architecture.num_layers * sum(a + b for _, a, b in architecture.module_shapes())
    assert bigger - small == pytest.approx(4 * (8 + 16) * width * 4, rel=0.1)
    assert storm > 0


@pytest.mark.parametrize(
    "options",
    [
        ["--adapters", "10", "--shows", "thousands"],
        ["--resident", "10"],
        ["--adapters", "16", "--resident", "20"],
        ["--adapters", "40", "--storm", "20"],
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        economy.main(["--model", str(BASE_MODEL), *options])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_run(capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {"adapters": 20, "resident": 8, "concurrency": 4, "requests": 12, "prompt-tokens": 8, "output-tokens": 8}
    sizes |= {"storm": 6, "hot": 2, "hot-rate": 4, "storm-s": 2, "tenants": 3, "tenant-s": 2, "rounds": 1}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    assert economy.main(["--model", str(BASE_MODEL), *options]) == 0
    told = capfd.readouterr().out
    assert told.count("requests/s over all resident") == 2 and told.count("p99") == 3 and "NO SCORE" not in told
