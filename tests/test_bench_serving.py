"""A whole run against a real server over gRPC, and against one that speaks OpenAI's completions."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_backend import greedy
from fake_engine import BASE_MODEL
from lorasrv.client import Client
from lorasrv.errors import ConfigurationError
from lorasrv.types import EngineRequest, TokenDelta
from lorasrv_bench import records
from lorasrv_bench.asks import Ask
from lorasrv_bench.backends import OpenAIBackend, Server
from lorasrv_bench.clients import Clients
from lorasrv_bench.compare import compare
from lorasrv_bench.demo_asks import demo_asks, demo_folders
from lorasrv_bench.load import Backend, Call, CallFailed, End, Piece, Sent, send
from lorasrv_bench.report import report
from lorasrv_bench.serving import Outcome, Ready, Setup, grpc_ready, openai_ready, run
from lorasrv_bench.summary import parse_slo
from lorasrv_bench.watch import Look, with_cold, with_first_use
from lorasrv_bench.workloads import Workload, parse_workload
from running_server import running_server

SMALL = parse_workload("slora:n=2,requests=6,rate=200,in_range=4..9,out_range=3..6,ranks=2/4", seed=1)


class InlineClients(Clients):
    """What client processes do, in this one."""

    def __init__(self) -> None:
        super().__init__(0)

    async def send(
        self,
        server: Server,
        asks: Sequence[Ask],
        concurrency: int | None,
        advance: Callable[[bool], None] = lambda failed: None,
    ) -> tuple[list[Sent], float]:
        backend, start_s = server.connect(), asyncio.get_running_loop().time()
        try:
            one = await send(
                asks, backend, start_s=start_s, concurrency=concurrency, advance=lambda call: advance(bool(call.error))
            )
        finally:
            await backend.close()
        return [one], start_s


@asynccontextmanager
async def ready_server(tmp_path: Path, script: Any, workload: Workload = SMALL) -> AsyncIterator[tuple[Ready, Server]]:
    """A server with a fake engine, and the workload's adapters in it; a thread pushes, as clients have it."""
    async with running_server(tmp_path / "data") as running:
        running.engine.script = script
        server = Server(api="grpc", url=running.address)
        manager = grpc_ready(server, workload, BASE_MODEL, "fresh", salt=7)
        ready = await asyncio.to_thread(manager.__enter__)
        try:
            yield ready, server
        finally:
            await asyncio.to_thread(manager.__exit__, None, None, None)
            left = await asyncio.to_thread(lambda: Client(running.address).adapters())
            assert [adapter.adapter_id for adapter in left] == []


async def outcome_of(tmp_path: Path, script: Any, **values: Any) -> Outcome:
    async with ready_server(tmp_path, script) as (ready, server):
        setup = Setup(server=server, workload=SMALL, **values)
        return await run(setup, ready, InlineClients())


async def test_a_right_server_has_figures(tmp_path: Path) -> None:
    outcome = await outcome_of(tmp_path, greedy, slo=parse_slo("ttft=60"), concurrency=3, resident="all")
    checks = outcome.summary["checks"]
    assert checks["wrong"] == []
    assert checks["done"][:3] == ["6 lengths", "6 versions", "6 of 6 answers repeated to the letter"]
    assert any("answers told from other weights'" in each for each in checks["done"])
    assert outcome.summary["requests"] == 6 and outcome.summary["failed"] == 0
    assert outcome.summary["good_share"] == 1.0
    assert [call.index for call in outcome.calls] == list(range(6))
    assert not any(call.cold for call in outcome.calls)
    assert len(outcome.looks) >= 2


async def test_cold_requests_are_told_from_warm_ones(tmp_path: Path) -> None:
    outcome = await outcome_of(tmp_path, greedy, concurrency=1, resident="none")
    assert outcome.calls[0].cold, "nobody had asked for it"


async def test_neighbours_that_change_tokens_cost_the_score(tmp_path: Path) -> None:
    def leaky(request: EngineRequest) -> Iterator[TokenDelta]:
        return greedy(request, wrong_at=1 if request.prompt_logprobs is None else None)

    outcome = await outcome_of(tmp_path, leaky)
    assert not outcome.is_right
    assert "nats from the likeliest" in outcome.summary["checks"]["wrong"][0]
    assert outcome.summary.keys() == {"checks"}, "no speed is told"


async def test_a_server_without_adapters_costs_the_score(tmp_path: Path) -> None:
    outcome = await outcome_of(tmp_path, lambda request: greedy(replace(request, adapter=None)))
    assert "adapters make no difference" in " ".join(outcome.summary["checks"]["wrong"])


async def test_a_request_that_does_not_fit_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    long = parse_workload("slora:n=2,requests=6,in_range=40..41,out_range=40..41", seed=1)
    with pytest.raises(ConfigurationError, match=r"40 \+ 40 tokens is over the server's context of 64"):
        async with ready_server(tmp_path, greedy, long):
            pass


def test_prompts_and_weights_follow_from_seed_and_salt() -> None:
    one, same, other = (openai_ready(SMALL, "base", "lora-{}", 100, salt, exact=True).asks for salt in (1, 1, 2))
    assert one == same
    assert [each.prompt for each in one] != [each.prompt for each in other]
    assert {each.name for each in one} <= {"lora-0", "lora-1"}
    assert all(token < 100 for each in one for token in each.prompt if isinstance(token, int))


def test_demo_answers_are_known() -> None:
    folders = demo_folders(BASE_MODEL.parent)
    asks = demo_asks(parse_workload("zipf:n=9,requests=30", seed=0).arrivals, [path.name for path in folders], 3)
    by_name = {each.name: each for each in asks}
    assert isinstance(by_name["reverse"].prompt, str)
    assert by_name["reverse"].answer == by_name["reverse"].prompt[:-1][::-1]
    with pytest.raises(FileNotFoundError):
        demo_folders(BASE_MODEL)


# A server that speaks OpenAI's completions.


@asynccontextmanager
async def openai_server(answer: Callable[[dict[str, Any]], list[str] | bytes]) -> AsyncIterator[str]:
    """`answer` gives the events of a request's stream, or a whole response."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        said = answer(json.loads(await reader.readexactly(length)))
        if isinstance(said, list):
            body = "".join(f"data: {event}\n\n" for event in said).encode()
            said = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n" + body
        writer.write(said)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def spoken(body: dict[str, Any]) -> list[str]:
    """An answer of its own for each model and prompt, two tokens an event, the counts last."""
    assert body["stream"] and body["temperature"] == 0 and body["ignore_eos"]
    texts = [f"{body['model']}{sum(body['prompt'])}-{number} " for number in range(0, body["max_tokens"], 2)]
    events: list[dict[str, Any]] = [{"choices": [{"text": text}]} for text in texts]
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return [*map(json.dumps, events), json.dumps({"choices": [], "usage": usage}), "[DONE]"]


async def outcome_of_openai(answer: Callable[[dict[str, Any]], list[str] | bytes], *, exact: bool) -> Outcome:
    async with openai_server(answer) as url:
        setup = Setup(server=Server(api="openai", url=url), workload=SMALL, warm_up=0)
        ready = openai_ready(SMALL, "the-base", "lora-{}", 100, 3, exact=exact)
        return await run(setup, ready, InlineClients())


async def test_a_server_by_url_has_figures() -> None:
    outcome = await outcome_of_openai(spoken, exact=True)
    assert outcome.summary["checks"] == {
        "wrong": [],
        "done": ["6 lengths", "6 of 6 answers repeated to the letter", "3 models compared on 4 prompts"],
    }
    assert outcome.summary["failed"] == 0
    assert outcome.summary["output_tokens_per_s"] > 0
    asked = [arrival.output_tokens for arrival in SMALL.arrivals]
    assert [call.output_tokens for call in outcome.calls] == asked
    assert [call.cold for call in outcome.calls].count(True) == 2, "an adapter's first request"


async def test_adapters_by_number_are_told_in_the_field_lora() -> None:
    seen: list[tuple[str, Any]] = []

    def keep(body: dict[str, Any]) -> list[str]:
        seen.append((body["model"], body["lora"]))
        return spoken(body)

    async with openai_server(keep) as url:
        server = Server(api="openai", url=url, lora_ids={"lora-0": 0, "lora-1": 1})
        ready = openai_ready(SMALL, "the-base", "lora-{}", 100, 3, exact=False)
        await run(Setup(server=server, workload=SMALL, warm_up=1), ready, InlineClients())
    assert dict(seen) == {
        "the-base": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}],
        "lora-0": [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.0}],
        "lora-1": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}],
    }


async def test_a_connection_that_closes_unanswered_is_tried_once_more() -> None:
    closed: list[dict[str, Any]] = []

    def close_once(body: dict[str, Any]) -> list[str] | bytes:
        if body not in closed:
            closed.append(body)
            return b""
        return spoken(body)

    assert (await outcome_of_openai(close_once, exact=False)).summary["checks"]["wrong"] == []
    assert closed
    outcome = await outcome_of_openai(lambda body: b"", exact=False)
    assert "the first failed with RemoteProtocolError" in outcome.summary["checks"]["wrong"][0]


async def test_a_server_by_url_that_ends_early_has_none() -> None:
    def early(body: dict[str, Any]) -> list[str]:
        return spoken(body | {"max_tokens": 2})

    outcome = await outcome_of_openai(early, exact=False)
    assert "2 tokens came" in outcome.summary["checks"]["wrong"][0]


async def test_what_a_server_by_url_refuses_is_said() -> None:
    refused = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 9\r\n\r\nno model!"
    broken = ["{", '{"error": {"message": "gone"}}']
    for said, message in ((refused, "HTTP 404: no model!"), (broken[:1], "JSONDecodeError"), (broken[1:], "gone")):
        async with openai_server(lambda body, said=said: said) as url:
            backend = OpenAIBackend(Server(api="openai", url=url))
            with pytest.raises(CallFailed, match=message):
                await ended(backend)
            await backend.close()


async def ended(backend: Backend) -> list[Piece | End]:
    asked = Ask(index=0, at_s=0, name="m", adapter=0, tenant=0, prompt=(1,), max_tokens=2)
    return [event async for event in backend.stream(asked)]


# What is kept of a run.


def call(index: int = 0, **values: Any) -> Call:
    fields: dict[str, Any] = {
        "adapter": index % 2,
        "tenant": 0,
        "planned_s": 0.5 * index,
        "sent_s": 0.5 * index,
        "ended_s": 0.5 * index + 1,
        "piece_s": (0.5 * index + 0.25, 0.5 * index + 1),
        "piece_tokens": (1, 1),
        "asked_prompt_tokens": 3,
        "asked_output_tokens": 2,
        "prompt_tokens": 3,
        "token_ids": (1, 2),
        "text": "ab",
        "version": "v",
    }
    return Call(index=index, **(fields | values))


def look(at_s: float, *on_device: str) -> Look:
    return Look(at_s=at_s, pages=(5, 3, 1, 1), running=1, waiting=0, counters={}, on_device=frozenset(on_device))


def test_cold_is_what_was_not_on_the_device_at_the_last_look() -> None:
    looks = [look(9.0), look(10.4, "v"), look(10.9)]
    calls = with_cold([call(0), call(1), call(2), call(1, version="")], looks, start_s=10.0)
    assert [each.cold for each in calls] == [True, False, True, False]
    assert [each.cold for each in with_first_use([call(2), call(1), call(0), call(3)])] == [False, True, True, False]


def written(path: Path, workload: Workload = SMALL, wrong: Sequence[str] = (), **header: Any) -> records.Record:
    summary: dict[str, Any] = {"checks": {"wrong": list(wrong), "done": ["6 lengths"]}}
    if not wrong:
        figure = {"mean": 0.5, "p50": 0.4, "p90": 0.8, "p99": 1.0, "count": 2}
        summary |= {"requests": 2, "requests_per_s": 4.0, "output_tokens_per_s": 8.0, "failed": 0}
        summary |= {"ttft_s": figure, "e2e_s": figure, "client": {"bound": ["it was late"], "processes": 3}}
    told = records.header(workload, bench="serve", **header)
    looks = [records.look_line(look(at_s), 1.0) for at_s in (1.0, 2.0, 3.0)]
    records.write(path, told, looks, [records.call_line(call(0)), records.call_line(call(1))], summary)
    return records.read(path)


def test_runs_are_compared_figure_by_figure(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a"), written(tmp_path / "b")
    b.summary["requests_per_s"] = 6.0
    rows = {name: rest for name, *rest in compare(a, b)}
    assert rows["requests_per_s"] == [4.0, 6.0, 1.5]
    assert rows["ttft_s.p99"] == [1.0, 1.0, 1.0]
    assert rows["failed"] == [0, 0, None]
    assert not any(name.startswith("client") for name in rows)


def test_different_workloads_are_not_compared(tmp_path: Path) -> None:
    a = written(tmp_path / "a")
    for b, message in (
        (written(tmp_path / "b", parse_workload(SMALL.text, seed=2)), r"workload is slora:.*\(seed 1\) in one"),
        (written(tmp_path / "b", concurrency=4), "concurrency is None in one, 4 in the other"),
        (written(tmp_path / "b", wrong=["request 3: wrong"]), "no score: request 3: wrong"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            compare(a, b)


@pytest.mark.parametrize("text", ["", "{}", "[]\n", '{"kind": "header"}\n', '{"kind": "nothing"}\n', "x"])
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").write_text(text)
    with pytest.raises(ConfigurationError, match="is no file of `lorasrv bench`"):
        records.read(tmp_path / "run")


def test_a_header_says_how_to_repeat_it() -> None:
    told = records.header(SMALL, concurrency=3)
    assert (told["workload"], told["seed"], told["concurrency"]) == (SMALL.text, 1, 3)
    assert told["digest"] == SMALL.digest()
    assert {"commit", "machine", "time", "lorasrv", "python"} <= told.keys()


def test_the_report_is_a_page_with_curves(tmp_path: Path) -> None:
    many = parse_workload("slora:n=50,requests=6", seed=1)
    page = report([written(tmp_path / "a"), written(tmp_path / "b", many)])
    assert page.count("<svg") == 2 * 4 + 2, "three distributions and the pool of each, two curves over adapters"
    assert page.count("it was late") == 2
    assert "Throughput" in page and "requests_per_s" in page and "nan" not in page
    busier = report([written(tmp_path / name, concurrency=number) for name, number in (("d", 1), ("e", 64))])
    assert "Against the number of requests at a time" in busier and "Against the number of adapters" not in busier
    refused = report([written(tmp_path / "c", wrong=["<request 3>"])])
    assert "No score" in refused and "&lt;request 3&gt;" in refused and "<svg" not in refused
