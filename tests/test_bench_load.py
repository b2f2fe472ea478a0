"""The load client on a virtual clock: what it sends when, and what it says it measured."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import kolmogorov
from chi_squared import ACCEPTED, REJECTED
from fake_backend import FakeBackend, ask, refuse
from lorasrv.errors import ConfigurationError
from lorasrv_bench.asks import Ask, make_asks
from lorasrv_bench.load import Call, End, Sent, send
from lorasrv_bench.summary import Slo, client_figures, parse_slo, server_figures, summarize
from lorasrv_bench.workloads import parse_workload
from virtual_loop import VirtualLoop, run_virtually


def sent(asks: Sequence[Ask], backend: FakeBackend, concurrency: int | None = None) -> Sent:
    return run_virtually(send(asks, backend, start_s=1.0, concurrency=concurrency))


def block(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.block(seconds)


def test_an_open_loop_sends_by_the_asked_distribution_however_slow_the_server_is() -> None:
    workload = parse_workload("slora:n=3,requests=2000,rate=40,cv=1,in_range=1..2,out_range=1..2", seed=5)
    asks = make_asks(workload.arrivals, ("a", "b", "c"), (5,), 50)
    run = sent(asks, FakeBackend(ttft_s=30.0))
    times = torch.tensor([0.0, *(call.sent_s for call in run.calls)], dtype=torch.float64)
    gaps = times.diff()
    assert kolmogorov.p_value(gaps, lambda gap: 1 - torch.exp(-40 * gap)) > ACCEPTED
    assert kolmogorov.p_value(gaps, lambda gap: 1 - torch.exp(-30 * gap)) < REJECTED
    assert [call.sent_s for call in run.calls] == pytest.approx([arrival.at_s for arrival in workload.arrivals])
    assert [call.planned_s for call in run.calls] == [arrival.at_s for arrival in workload.arrivals]
    assert client_figures([run])["bound"] == []


def test_a_closed_loop_keeps_its_number_under_way() -> None:
    backend = FakeBackend(ttft_s=1.0)
    run = sent([ask(index, at_s=100.0 * index) for index in range(40)], backend, concurrency=8)
    assert backend.most_open == 8
    assert [each.index for each in backend.seen] == list(range(40))
    assert [call.sent_s for call in run.calls] == pytest.approx([index // 8 for index in range(40)])
    assert {call.planned_s for call in run.calls} == {None}
    assert run.wall_s == pytest.approx(5.0)


def test_latencies_are_what_the_server_took() -> None:
    asks = [ask(index, at_s=index * 1.0, max_tokens=5) for index in range(10)]
    run = sent(asks, FakeBackend(ttft_s=0.5, step_s=0.125))
    figures = summarize(run.calls, Slo(ttft=0.6, tpot=0.2))
    flat = {name: figures[name]["p99"] for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s")}
    assert flat == pytest.approx({"ttft_s": 0.5, "tpot_s": 0.125, "itl_s": 0.125, "e2e_s": 1.0})
    assert figures["itl_s"]["count"] == 40
    assert figures["duration_s"] == pytest.approx(10.0)
    assert figures["requests_per_s"] == pytest.approx(1.0)
    assert figures["output_tokens_per_s"] == pytest.approx(5.0)
    assert figures["tokens_per_s"] == pytest.approx(8.0)
    assert (figures["good_share"], figures["goodput_per_s"]) == pytest.approx((1.0, 1.0))
    assert summarize(run.calls, Slo(e2e=0.9))["goodput_per_s"] == 0
    assert summarize(run.calls, None).keys() == figures.keys() - {"good_share", "goodput_per_s"}


def test_messages_of_several_tokens() -> None:
    (call,) = sent([ask(max_tokens=7)], FakeBackend(ttft_s=0.5, step_s=0.3, tokens_per_piece=3)).calls
    assert call.piece_tokens == (3, 3, 1)
    figures = summarize([call], None)
    assert figures["tpot_s"]["mean"] == pytest.approx(0.6 / 6)
    assert figures["itl_s"]["mean"] == pytest.approx(0.3)


def test_a_server_of_text_is_counted_by_what_it_says_in_the_end() -> None:
    (call,) = sent([ask(max_tokens=7)], FakeBackend(tokens_per_piece=3, text_only=True)).calls
    assert (call.piece_tokens, call.output_tokens, call.token_ids) == ((1, 1, 5), 7, ())


def test_failed_requests_are_counted_and_nothing_else() -> None:
    def fail_some(each: Ask) -> None:
        if each.index % 4 == 0:
            refuse(each)

    run = sent([ask(index) for index in range(8)], FakeBackend(ttft_s=2.0, at_start=fail_some), concurrency=8)
    figures = summarize(run.calls, Slo(ttft=3))
    assert (figures["requests"], figures["failed"], figures["ttft_s"]["count"]) == (8, 2, 6)
    assert figures["requests_per_s"] == pytest.approx(3.0)
    assert figures["good_share"] == pytest.approx(6 / 8)
    assert [call.error for call in run.calls if call.error] == ["UNAVAILABLE: gone"] * 2
    assert summarize([call for call in run.calls if call.error], None) == {"requests": 2, "failed": 2}


def test_a_client_that_cannot_keep_up_says_so() -> None:
    # Each request costs the client 15 ms of its own time, and 100 a second are planned.
    asks = [ask(index, at_s=0.01 * index) for index in range(300)]
    run = sent(asks, FakeBackend(ttft_s=0.1, at_start=lambda _: block(0.015)))
    figures = client_figures([run])
    assert figures["late_s"]["p99"] > 1.0
    assert any("requests left" in reason for reason in figures["bound"])
    run = sent(asks, FakeBackend(ttft_s=0.1, at_start=lambda _: block(0.001)))
    assert client_figures([run])["bound"] == []


def test_a_closed_loop_that_stalls_says_so() -> None:
    backend = FakeBackend(ttft_s=0.03, at_start=lambda _: block(0.03))
    figures = client_figures([sent([ask(index) for index in range(100)], backend, concurrency=4)])
    assert figures["late_s"] is None
    assert ["timers rang" in reason for reason in figures["bound"]] == [True]


def test_a_busy_process_is_told_of() -> None:
    idle = Sent(calls=(), lags_s=(), cpu_s=0.1, wall_s=10)
    assert client_figures([idle])["bound"] == []
    assert client_figures([idle, replace(idle, cpu_s=9.5)])["bound"] == ["a process used 0.95 of a core"]


def test_cold_and_warm_are_apart() -> None:
    calls = [
        replace(each, cold=each.index < 2) for each in sent([ask(i) for i in range(5)], FakeBackend(ttft_s=1)).calls
    ]
    figures = summarize(calls, None)
    assert (figures["ttft_cold_s"]["count"], figures["ttft_warm_s"]["count"]) == (2, 3)


def test_tenants_are_apart() -> None:
    asks = [ask(index, tenant=index % 3 // 2, max_tokens=2) for index in range(9)]
    tenants = summarize(sent(asks, FakeBackend(ttft_s=2.0)).calls, None)["tenants"]
    assert {tenant: (each["requests"], each["service_per_s"]) for tenant, each in tenants.items()} == {
        "0": (6, pytest.approx(6 * (3 + 4) / 2)),
        "1": (3, pytest.approx(3 * (3 + 4) / 2)),
    }


def test_hit_shares_are_of_the_time_between() -> None:
    before = {"prompt_tokens": 100, "cached_prompt_tokens": 50, "adapter_loads": 3}
    after = {"prompt_tokens": 130, "cached_prompt_tokens": 60, "adapter_loads": 8}
    figures = server_figures(before, after, 20)
    assert (figures["prefix_hit_share"], figures["adapter_hit_share"]) == (0.25, 0.75)
    assert server_figures(before, before, 0)["prefix_hit_share"] is None


@pytest.mark.parametrize("text", ["", "ttft", "ttft=", "ttft=soon", "ttft=0", "ttft=nan", "speed=1", "ttft=1,ttft=2"])
def test_an_slo_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="SLO"):
        parse_slo(text)


def test_an_slo_is_read() -> None:
    assert parse_slo("ttft=0.5,e2e=3") == Slo(ttft=0.5, e2e=3)


def test_a_stream_without_tokens_is_a_failure_in_figures() -> None:
    empty: list[Call] = list(
        sent([ask(max_tokens=0)], FakeBackend(end=lambda a, n: End(prompt_tokens=3, output_tokens=0))).calls
    )
    assert summarize(empty, None)["failed"] == 1
