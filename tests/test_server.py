"""The server over real gRPC, with a fake engine: what every call answers, errors by code and reason."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from adapter_folders import write_adapter
from fake_engine import FakeEngine, echo, server_config
from lorasrv.client.errors import error_from_call
from lorasrv.client.messages import CHUNK_BYTES, upload_files, write_requests
from lorasrv.errors import ConfigurationError, QueueFull
from lorasrv.server.server import Server, ServerConfig
from lorasrv.server.status import MASKED_MESSAGE
from lorasrv.types import EngineRequest, FinishReason, LogitRules, PositionLogprobs, TokenDelta
from lorasrv.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from lorasrv_adapters.downloads import CHUNK_BYTES as DOWNLOAD_BYTES
from running_server import Running, asked, reason_of, refused, running_server, until

Code = grpc.StatusCode
TENANT = "tenants/default"
BASE = [generation_pb2.AdapterRef(name="base")]


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        yield found


@pytest.fixture
def generation(running: Running) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(running.channel)


@pytest.fixture
def adapters(running: Running) -> Any:
    return adapter_pb2_grpc.AdapterServiceStub(running.channel)


async def push(adapters: Any, folder: Path, adapter_id: str) -> adapter_pb2.Upload:
    upload = await create(adapters, folder, adapter_id)
    if requests := list(write_requests(folder, upload)):
        await adapters.WriteUpload(iter(requests))
    return await adapters.FinishUpload(adapter_pb2.FinishUploadRequest(name=upload.name))


async def create(adapters: Any, folder: Path, adapter_id: str) -> adapter_pb2.Upload:
    return await adapters.CreateUpload(
        adapter_pb2.CreateUploadRequest(parent=TENANT, adapter_id=adapter_id, files=upload_files(folder))
    )


# Generation


async def test_a_stream_is_started_deltas_finished(generation: Any) -> None:
    events = [response async for response in generation.GenerateStream(asked(seed=5))]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(events) - 2), "finished"]
    started, finished = events[0].started, events[-1].finished
    assert (started.version_digest, started.prompt_tokens, started.seed) == ("", 5, 5)
    assert started.generation_id
    assert "".join(event.delta.text for event in events[1:-1]) == "hé>"
    assert finished.reason == generation_pb2.FINISH_REASON_EOS
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 5)
    assert finished.timings.total.ToNanoseconds() >= finished.timings.time_to_first_token.ToNanoseconds() > 0


async def test_a_unary_answer_is_the_stream_put_together(generation: Any) -> None:
    response = await generation.Generate(asked("ab stop", stop=["stop"], max_tokens=20))
    (sample,) = response.samples
    assert sample.text == "ab "
    assert sample.finished.reason == generation_pb2.FINISH_REASON_STOP
    assert sample.finished.stop == "stop"
    assert len(sample.token_ids) == sample.finished.usage.completion_tokens == 7


async def test_samples_are_told_apart(generation: Any) -> None:
    request = asked("abc", n=3, stop=["b"], max_tokens=20)
    response = await generation.Generate(request)
    texts = [sample.text for sample in response.samples]
    assert texts == ["a", "", "c"]
    finished = [sample.finished for sample in response.samples]
    assert [each.index for each in finished] == [0, 1, 2]
    assert [each.stop for each in finished] == ["b", "b", ""]
    assert [each.usage.completion_tokens for each in finished] == [2, 1, 2]
    streamed = ["", "", ""]
    ends: list[int] = []
    async for event in generation.GenerateStream(request):
        if event.WhichOneof("event") == "delta":
            assert event.delta.index not in ends
            streamed[event.delta.index] += event.delta.text
        if event.WhichOneof("event") == "finished":
            ends.append(event.finished.index)
    assert (streamed, sorted(ends)) == (texts, [0, 1, 2])


async def test_zero_is_not_the_default(running: Running, generation: Any) -> None:
    await generation.Generate(asked(temperature=0.0))
    await generation.Generate(asked())
    assert [request.temperature for request in running.engine.requests] == [0.0, 1.0]


async def test_logprobs_echo_and_stop_token_reach_the_caller(running: Running, generation: Any) -> None:
    def script(request: EngineRequest) -> list[TokenDelta]:
        scores = (PositionLogprobs(token_id=71, logprob=-0.5, top=((71, -0.5), (9, -2.0))),)
        first = TokenDelta(request_id=request.request_id, prompt_logprobs=scores)
        last = first._replace(token_ids=(71,), logprobs=scores, finish=FinishReason.STOP)
        return [first, last]

    running.engine.script = script
    request = asked("h", stop_token_ids=[71], logprobs=2, prompt_logprobs=2)
    request.echo = True
    response = await generation.Generate(request)
    assert (response.started.prompt_text, list(response.started.prompt_token_ids)) == ("h", [256, 71])
    (sample,) = response.samples
    assert (sample.text, sample.finished.stop, sample.finished.stop_token_id) == ("", "", 71)
    assert (len(response.prompt_logprobs), len(sample.logprobs)) == (2, 1)
    each = sample.logprobs[0]
    assert (each.token.token_id, each.token.logprob) == (71, -0.5)
    assert [(top.token_id, top.logprob) for top in each.top] == [(71, -0.5), (9, -2.0)]
    events = [event async for event in generation.GenerateStream(request)]
    assert events[0].started.prompt_text == "h"
    assert [(len(e.delta.prompt_logprobs), len(e.delta.logprobs)) for e in events[1:-1]] == [(1, 0), (1, 1)]
    assert events[-1].finished.stop_token_id == 71


async def test_knobs_reach_the_engine_and_unset_ones_change_nothing(running: Running, generation: Any) -> None:
    words = [generation_pb2.TokenIds(ids=[1, 2])]
    await generation.Generate(
        asked(
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={7: -3.0},
            bad_words=words,
            min_p=0.25,
            min_tokens=2,
            ignore_eos=True,
            logprobs=0,
        )
    )
    await generation.Generate(asked())
    request, plain = running.engine.requests
    assert request.rules == LogitRules(
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias=((7, -3.0),),
        bad_words=((1, 2),),
    )
    assert (request.min_p, request.min_tokens, request.ignore_eos) == (0.25, 2, True)
    assert (request.logprobs, request.prompt_logprobs) == (0, None)
    assert (plain.rules, plain.min_p, plain.min_tokens, plain.ignore_eos) == (None, 0, 0, False)
    assert (plain.logprobs, plain.stop_token_ids) == (None, ())


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asked(None), "prompt"),
        (asked(""), "prompt"),
        (generation_pb2.GenerateRequest(text="x"), "adapter"),
        (asked(adapter=""), "adapter.name"),
        (asked(max_tokens=0), "sampling.max_tokens"),
        (asked(max_tokens=100), "sampling.max_tokens"),
        (asked(max_tokens=2**32 - 1), "sampling.max_tokens"),
        (asked("x" * 70), "prompt"),
        *((asked(temperature=value), "sampling.temperature") for value in (float("nan"), float("inf"), -0.5)),
        *((asked(top_p=value), "sampling.top_p") for value in (0.0, -0.5, 1.5, float("nan"))),
        (asked(stop=["x"] * 17), "sampling.stop"),
        (asked(min_p=1.5), "sampling.min_p"),
        (asked(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (asked(presence_penalty=float("nan")), "sampling.presence_penalty"),
        (asked(frequency_penalty=3.0), "sampling.frequency_penalty"),
        (asked(logit_bias={1: 1e3}), "sampling.logit_bias"),
        (asked(logit_bias={260: 1.0}), "sampling.logit_bias"),
        (asked(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias"),
        (asked(bad_words=[generation_pb2.TokenIds()]), "sampling.bad_words"),
        (asked(bad_words=[generation_pb2.TokenIds(ids=[1])] * 65), "sampling.bad_words"),
        (asked(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
        (asked(stop_token_ids=[260]), "sampling.stop_token_ids"),
        (asked(min_tokens=3, max_tokens=2), "sampling.min_tokens"),
        (asked(logprobs=21), "sampling.logprobs"),
        (asked(prompt_logprobs=2**32 - 1), "sampling.prompt_logprobs"),
        (asked(n=0), "sampling.n"),
        (asked(n=65), "sampling.n"),
        (generation_pb2.GenerateRequest(adapter=BASE, text="x", priority=7), "priority"),  # pyright: ignore[reportArgumentType]
        (generation_pb2.GenerateRequest(adapter=BASE, text="x", session_key="x" * 129), "session_key"),
        (generation_pb2.GenerateRequest(adapter=BASE * 2, text="x"), "adapter"),
        (
            generation_pb2.GenerateRequest(
                adapter=[generation_pb2.AdapterRef(name="base")], tokens=generation_pb2.TokenIds(ids=[260])
            ),
            "prompt.tokens",
        ),
    ],
)
@pytest.mark.row(39, 40, 41, 42, 43, 44)
async def test_invalid_requests_name_their_field(
    running: Running, generation: Any, request_: generation_pb2.GenerateRequest, field: str
) -> None:
    running.engine.gate.clear()
    neighbour = generation.Generate(asked("neighbour"))
    await until(lambda: bool(running.engine.running))
    error = await refused(generation.Generate(request_), Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    running.engine.gate.set()
    assert (await neighbour).samples[0].text == "neighbour"
    status = rpc_status.from_call(error)
    bad = error_details_pb2.BadRequest()
    assert [bad.field_violations[0].field for each in status.details if each.Unpack(bad)] == [field]
    assert len(running.engine.requests) == 1


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
@pytest.mark.row(46)
async def test_an_unknown_adapter_is_not_found(generation: Any, method: str) -> None:
    call = getattr(generation, method)(asked(adapter="nope"))
    await refused(call if method == "Generate" else anext(aiter(call)), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_a_malformed_reference_is_invalid(generation: Any) -> None:
    await refused(generation.Generate(asked(adapter="UP")), Code.INVALID_ARGUMENT, "INVALID_REFERENCE")


@pytest.mark.row(47)
async def test_a_running_generation_id_exists(running: Running, generation: Any) -> None:
    running.engine.gate.clear()
    request = asked()
    request.generation_id = "mine"
    call = generation.GenerateStream(request)
    await anext(aiter(call))
    await refused(generation.Generate(request), Code.ALREADY_EXISTS, "GENERATION_EXISTS")
    call.cancel()


@pytest.mark.parametrize("num_read", [0, 1, 2])
@pytest.mark.row(49)
async def test_a_vanished_client_ends_its_work(running: Running, generation: Any, num_read: int) -> None:
    running.engine.gate.clear()
    call = generation.GenerateStream(asked())
    events = aiter(call)
    for _ in range(num_read):
        await anext(events)
    await until(lambda: bool(running.engine.running))
    call.cancel()
    await until(lambda: not running.engine.running)
    assert len(running.engine.ended_early) == 1


@pytest.mark.row(51)
async def test_a_reader_that_stalls_is_ended_and_a_neighbour_goes_on(tmp_path: Path) -> None:
    def flood(request: EngineRequest) -> Iterator[TokenDelta | Exception]:
        scores = (PositionLogprobs(token_id=71, logprob=-0.5, top=((71, -0.5),) * 20),) * 50
        while request.prompt_logprobs is not None:
            yield TokenDelta(request_id=request.request_id, token_ids=(71,), prompt_logprobs=scores)
        yield from echo(request)

    # A small window, so that little has to be written before flow control holds.
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with running_server(tmp_path / "data", stall_timeout_s=0.3) as running:
        running.engine.script = flood
        async with grpc.aio.insecure_channel(running.address, options=options) as channel:
            stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)
            stalled = stub.GenerateStream(asked(prompt_logprobs=20))
            await until(lambda: bool(running.engine.running))
            neighbour: Any = generation_pb2_grpc.GenerationServiceStub(running.channel)
            while running.engine.running:
                (sample,) = (await neighbour.Generate(asked("neighbour"))).samples
                assert (sample.text, len(sample.token_ids)) == ("neighbour", 10)
            assert len(running.engine.ended_early) == 1
            await refused(drained(stalled), Code.RESOURCE_EXHAUSTED, "SLOW_READER")


async def drained(call: Any) -> None:
    async for _ in call:
        pass


async def test_an_engine_failure_is_the_calls_status_and_a_neighbour_goes_on(running: Running, generation: Any) -> None:
    running.engine.gate.clear()
    neighbour = generation.Generate(asked("neighbour"))
    await until(lambda: bool(running.engine.running))
    running.engine.script = lambda request: [QueueFull("2048 requests wait; the limit is 2048")]
    error = await refused(generation.Generate(asked()), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert "2048" in str(error.details())
    running.engine.gate.set()
    assert (await neighbour).samples[0].text == "neighbour"


async def test_defects_are_masked_and_logged(
    running: Running, generation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running.engine.script = lambda request: [RuntimeError("/srv/secret")]
    error = await refused(generation.Generate(asked()), Code.INTERNAL, "INTERNAL")
    assert error.details() == MASKED_MESSAGE
    assert "/srv/secret" in caplog.text
    assert "Traceback" in caplog.text


async def test_defects_in_a_stream_are_masked(running: Running, generation: Any) -> None:
    running.engine.script = lambda request: [RuntimeError("/srv/secret")]
    events = aiter(generation.GenerateStream(asked()))
    assert (await anext(events)).WhichOneof("event") == "started"
    error = await refused(anext(events), Code.INTERNAL, "INTERNAL")
    assert error.details() == MASKED_MESSAGE


@pytest.mark.parametrize(
    "method", ["GenerationService/Generate", "GenerationService/GenerateStream", "ServerService/GetStatus"]
)
@pytest.mark.parametrize("data", [b"\xff", b"\x12\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x7f"])
@pytest.mark.row(37)
async def test_malformed_bytes_are_an_invalid_argument(running: Running, method: str, data: bytes) -> None:
    path = f"/lorasrv.v1.{method}"
    if method.endswith("Stream"):
        call = anext(aiter(running.channel.unary_stream(path)(data)))
    elif method.endswith("GetStatus") and data == b"\x12\x02\xff\xfe":
        return  # an unknown field there, which protobuf skips
    else:
        call = running.channel.unary_unary(path)(data)
    error = await refused(call, Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert str(error.details()) == f"a message of {len(data)} bytes is not a valid protobuf message"


@pytest.mark.row(37)
async def test_malformed_bytes_in_an_upload_stream(running: Running) -> None:
    call = running.channel.stream_unary("/lorasrv.v1.AdapterService/WriteUpload")(iter([b"\xff"]))
    await refused(call, Code.INVALID_ARGUMENT, "INVALID_REQUEST")


@pytest.mark.row(38)
async def test_a_message_over_the_cap_is_refused(generation: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generation.Generate(asked("x" * (5 << 20)))
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED


# Adapters


async def test_an_adapter_pushed_is_served_listed_and_deleted(
    running: Running, adapters: Any, generation: Any, tmp_path: Path
) -> None:
    upload = await push(adapters, write_adapter(tmp_path / "upper"), "upper")
    assert upload.state == adapter_pb2.UPLOAD_STATE_PUBLISHED
    digest = upload.version.digest
    assert upload.version.name == f"{TENANT}/adapters/upper/versions/{digest}"
    assert (upload.version.min_rank, upload.version.max_rank) == (4, 4)

    for reference in ("upper", "upper@latest", f"upper@sha256:{digest}", f"upper@sha256:{digest[:8]}"):
        response = await generation.Generate(asked(adapter=reference))
        assert response.started.version_digest == digest
    adapter = await adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=f"{TENANT}/adapters/upper"))
    assert dict(adapter.tags) == {"latest": digest}
    assert adapter.versions[0].tier == adapter_pb2.TIER_DEVICE
    listed = await adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(parent=TENANT))
    assert [each.adapter_id for each in listed.adapters] == ["upper"]

    status = await server_pb2_grpc.ServerServiceStub(running.channel).GetStatus(server_pb2.GetStatusRequest())
    assert [(each.adapter_id, each.version_digest) for each in status.adapters] == [("upper", digest)]
    await adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=f"{TENANT}/adapters/upper"))
    await refused(generation.Generate(asked(adapter="upper")), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


@pytest.mark.row(56)
async def test_deleting_an_adapter_does_not_end_its_streams(
    running: Running, adapters: Any, generation: Any, tmp_path: Path
) -> None:
    await push(adapters, write_adapter(tmp_path / "upper"), "upper")
    running.engine.gate.clear()
    call = generation.Generate(asked(adapter="upper"))
    await until(lambda: bool(running.engine.running))
    await adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=f"{TENANT}/adapters/upper"))
    running.engine.gate.set()
    assert (await call).samples[0].text == "hé>"


@pytest.mark.row(21)
async def test_an_upload_continues_at_its_committed_offset(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper", rank=8)
    upload = await create(adapters, folder, "upper")
    name, data = "adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()

    def part(offset: int, data: bytes) -> adapter_pb2.WriteUploadRequest:
        return adapter_pb2.WriteUploadRequest(upload=upload.name, file=name, offset_bytes=offset, data=data)

    await adapters.WriteUpload(iter([part(0, data[:1000])]))
    error = await refused(adapters.WriteUpload(iter([part(500, data[500:])])), Code.OUT_OF_RANGE, "OFFSET_MISMATCH")
    assert error_from_call(error).metadata == {"current_offset": "1000"}
    finish = adapter_pb2.FinishUploadRequest(name=upload.name)
    await refused(adapters.FinishUpload(finish), Code.FAILED_PRECONDITION, "UPLOAD_INCOMPLETE")
    upload = await adapters.GetUpload(adapter_pb2.GetUploadRequest(name=upload.name))
    assert {file.name: file.committed_bytes for file in upload.files}[name] == 1000
    written = await adapters.WriteUpload(write_requests(folder, upload))
    assert all(file.committed_bytes == file.size_bytes for file in written.files)
    first = await adapters.FinishUpload(finish)
    assert first.state == adapter_pb2.UPLOAD_STATE_PUBLISHED
    assert (await adapters.FinishUpload(finish)).version == first.version


@pytest.mark.row(23)
async def test_the_newest_writer_of_a_file_wins(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    upload = await create(adapters, folder, "upper")
    name = "adapter_model.safetensors"
    older = adapters.WriteUpload()
    await older.write(adapter_pb2.WriteUploadRequest(upload=upload.name, file=name, offset_bytes=0, data=b"a"))

    async def committed() -> int:
        found = await adapters.GetUpload(adapter_pb2.GetUploadRequest(name=upload.name))
        return sum(file.committed_bytes for file in found.files)

    while await committed() < 1:
        await asyncio.sleep(0.005)
    newer = adapter_pb2.WriteUploadRequest(upload=upload.name, file=name, offset_bytes=1, data=b"b")
    await adapters.WriteUpload(iter([newer]))
    await older.write(adapter_pb2.WriteUploadRequest(offset_bytes=2, data=b"c"))
    await refused(older, Code.ABORTED, "UPLOAD_SUPERSEDED")
    assert await committed() == 2


@pytest.mark.row(20)
async def test_wrong_bytes_are_refused_and_the_file_starts_again(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    upload = await create(adapters, folder, "upper")
    await adapters.WriteUpload(write_requests(folder, upload))
    wrong = adapter_pb2.CreateUploadRequest(parent=TENANT, adapter_id="upper", files=upload_files(folder))
    wrong.files[0].sha256 = hashlib.sha256(b"other").hexdigest()
    upload = await adapters.CreateUpload(wrong)
    await adapters.WriteUpload(write_requests(folder, upload))
    finish = adapters.FinishUpload(adapter_pb2.FinishUploadRequest(name=upload.name))
    await refused(finish, Code.INVALID_ARGUMENT, "DIGEST_MISMATCH")
    upload = await adapters.GetUpload(adapter_pb2.GetUploadRequest(name=upload.name))
    assert upload.files[0].committed_bytes == 0


@pytest.mark.parametrize(
    ("config", "code", "reason"),
    [
        ({"use_dora": True}, Code.FAILED_PRECONDITION, "UNSUPPORTED_FEATURE"),
        ({"r": 512}, Code.FAILED_PRECONDITION, "RANK_TOO_LARGE"),
        ({"r": 0}, Code.INVALID_ARGUMENT, "INVALID_ADAPTER"),
    ],
)
async def test_refused_content_tells_why_and_stays_invisible(
    adapters: Any, tmp_path: Path, config: dict[str, object], code: grpc.StatusCode, reason: str
) -> None:
    folder = write_adapter(tmp_path / "bad", **config)
    upload = await create(adapters, folder, "bad")
    await adapters.WriteUpload(write_requests(folder, upload))
    await refused(adapters.FinishUpload(adapter_pb2.FinishUploadRequest(name=upload.name)), code, reason)
    upload = await adapters.GetUpload(adapter_pb2.GetUploadRequest(name=upload.name))
    assert upload.state == adapter_pb2.UPLOAD_STATE_FAILED
    assert reason in [error.reason for error in upload.errors]
    get = adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=f"{TENANT}/adapters/bad"))
    await refused(get, Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


@pytest.mark.row(25)
async def test_the_same_content_again_is_stored_once(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    first, again = await push(adapters, folder, "upper"), await push(adapters, folder, "upper")
    assert first.version.digest == again.version.digest
    adapter = await adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=f"{TENANT}/adapters/upper"))
    assert len(adapter.versions) == 1


@pytest.mark.parametrize("bad_id", ["Upper", "ü", "upp\u0435r", "a\0b", "a" * 64, "", "-a", "a/b", "..", "base"])
@pytest.mark.row(27)
async def test_a_bad_id_is_refused(adapters: Any, tmp_path: Path, bad_id: str) -> None:
    call = create(adapters, write_adapter(tmp_path / "x"), bad_id)
    await refused(call, Code.INVALID_ARGUMENT, "INVALID_REFERENCE")


@pytest.mark.row(28)
async def test_another_tenant_has_nothing(running: Running, adapters: Any, tmp_path: Path) -> None:
    await push(adapters, write_adapter(tmp_path / "upper"), "upper")
    texts = [
        str((await refused(call, Code.NOT_FOUND, "ADAPTER_NOT_FOUND")).details())
        for call in (
            adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="tenants/other/adapters/upper")),
            adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="tenants/other/adapters/never")),
            adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=f"{TENANT}/adapters/never")),
            adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="tenants/other/adapters/upper")),
        )
    ]
    assert {text.replace("upper", "never") for text in texts} == {"adapter 'never' not found"}
    upload = adapters.GetUpload(adapter_pb2.GetUploadRequest(name="tenants/other/uploads/abc"))
    await refused(upload, Code.NOT_FOUND, "UPLOAD_NOT_FOUND")
    create_there = adapter_pb2.CreateUploadRequest(parent="tenants/other", adapter_id="a")
    await refused(adapters.CreateUpload(create_there), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_pages_of_adapters(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x")
    for adapter_id in ("a", "b", "c"):
        await push(adapters, folder, adapter_id)
    request = adapter_pb2.ListAdaptersRequest(parent=TENANT, page_size=2)
    first = await adapters.ListAdapters(request)
    request.page_token = first.next_page_token
    second = await adapters.ListAdapters(request)
    assert [each.adapter_id for page in (first, second) for each in page.adapters] == ["a", "b", "c"]
    assert not second.next_page_token
    for bad in ({"page_size": -1}, {"page_token": "forged"}):
        call = adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(parent=TENANT, **bad))
        await refused(call, Code.INVALID_ARGUMENT, "INVALID_PAGE")


async def test_an_upload_stream_without_messages_is_refused(adapters: Any) -> None:
    messages: Iterator[adapter_pb2.WriteUploadRequest] = iter(())
    await refused(adapters.WriteUpload(messages), Code.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_chunks_fit_the_message_cap_and_slow_links() -> None:
    assert CHUNK_BYTES <= 1 << 20
    slow_bytes_per_s = 4000
    assert slow_bytes_per_s * ServerConfig.stall_timeout_s > DOWNLOAD_BYTES


# The server


async def test_info_and_status(running: Running) -> None:
    stub: Any = server_pb2_grpc.ServerServiceStub(running.channel)
    info = await stub.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert (info.base_model.name, info.base_model.architecture) == ("base", "LlamaForCausalLM")
    assert (info.num_pages, info.block_tokens, info.max_rank) == (10, 16, 256)
    assert len(info.base_model.fingerprint) == 64
    assert not info.deterministic
    status = await stub.GetStatus(server_pb2.GetStatusRequest())
    assert status.state == server_pb2.ENGINE_STATE_READY
    assert (status.pool.num_pages, status.pool.free_pages) == (10, 10)
    running.engine.set_state("unavailable")
    status = await stub.GetStatus(server_pb2.GetStatusRequest())
    assert status.state == server_pb2.ENGINE_STATE_UNAVAILABLE
    assert not status.HasField("pool")


async def test_health_follows_the_engine(running: Running) -> None:
    stub: Any = health_pb2_grpc.HealthStub(running.channel)

    async def states() -> list[str]:
        names = ("", "lorasrv.v1.GenerationService", "lorasrv.v1.AdapterService", "lorasrv.v1.ServerService")
        checks = [await stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
        return [health_pb2.HealthCheckResponse.ServingStatus.Name(check.status) for check in checks]

    assert await states() == ["SERVING"] * 4
    running.engine.set_state("unavailable")
    while await states() != ["NOT_SERVING", "NOT_SERVING", "SERVING", "SERVING"]:
        await asyncio.sleep(0.005)
    running.engine.set_state("ready")
    while await states() != ["SERVING"] * 4:
        await asyncio.sleep(0.005)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nope"))
    assert caught.value.code() is Code.NOT_FOUND


async def test_reflection_lists_the_services(running: Running) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await anext(aiter(call))
    names = {service.name for service in response.list_services_response.service}
    ours = {f"lorasrv.v1.{name}Service" for name in ("Generation", "Adapter", "Server")}
    assert names >= ours | {"grpc.health.v1.Health"}
    call.cancel()


async def test_draining_ends_streams_with_unavailable(running: Running, generation: Any) -> None:
    running.engine.gate.clear()
    stream = generation.GenerateStream(asked())
    events = aiter(stream)
    await anext(events)
    await running.server.drain(grace_s=0.01)
    await refused(generation.Generate(asked()), Code.UNAVAILABLE, "DRAINING")
    await running.engine.close()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in events:
            pass
    assert (caught.value.code(), reason_of(caught.value)) == (Code.UNAVAILABLE, "ENGINE_UNAVAILABLE")


async def test_a_taken_port_is_said_before_a_model_is_loaded(running: Running, tmp_path: Path) -> None:
    engine = FakeEngine()
    server = Server(server_config(tmp_path / "other", listen=running.address), lambda config: engine)
    try:
        with pytest.raises(ConfigurationError, match=running.address):
            await server.start()
        assert engine.state == "starting"
    finally:
        await server.close()


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:1", "[::]:1", "example.com:1", "10.0.0.1:1", "127.0.0.1", "localhost:x", "::1:1"]
)
def test_only_loopback_is_served_without_credentials(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigurationError, match="listen address"):
        server_config(tmp_path, listen=listen)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:8470", "[::1]:8470", "127.8.9.1:1"])
def test_loopback_addresses(tmp_path: Path, listen: str) -> None:
    assert server_config(tmp_path, listen=listen).listen == listen
