"""Bad calls for generations over real gRPC: what each gets, that all is bounded, and that no disk is asked."""

import builtins
import io
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc import StatusCode as Code
from grpc_status import rpc_status

import fake_engine
from adapter_folders import write_adapter
from lorasrv.config import EngineConfig, ModelConfig
from lorasrv.v1 import adapter_pb2, generation_pb2, generation_pb2_grpc
from registry_calls import create, innocent_neighbour, push, send, stub
from running_server import METHODS, Running, asked, refused, running_server

# More than any list or text may have; fewer bytes than a message may.
MANY, MANY_CHARS = 5000, 100_000


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        yield found


@pytest.fixture
def generation(running: Running) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(running.channel)


def call(running: Running, path: str, data: bytes) -> Any:
    """A call of any method, with these bytes for its message; of a stream the first answer."""
    method = METHODS[path]
    if method.client_streaming:
        return running.channel.stream_unary(path)(iter([data]))
    if method.server_streaming:
        return anext(aiter(running.channel.unary_stream(path)(data)))
    return running.channel.unary_unary(path)(data)


# Malformed messages


def length_delimited(number: int, data: bytes) -> bytes:
    key = number << 3 | 2
    assert len(data) < 128 and key < 1 << 14
    return (bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])) + bytes([len(data)]) + data


def without_utf8(descriptor: Descriptor, path: str = "") -> Iterator[tuple[str, bytes]]:
    """For every string that a message can hold, at any depth, the message with bytes there that are no UTF-8."""
    for field in descriptor.fields:
        if field.type == field.TYPE_STRING:
            yield path + field.name, length_delimited(field.number, b"a\xff")
        elif field.message_type is not None:
            for name, data in without_utf8(field.message_type, f"{path}{field.name}."):
                yield name, length_delimited(field.number, data)


@pytest.mark.row(37)
async def test_every_string_that_is_not_utf8_is_an_invalid_argument(running: Running, tmp_path: Path) -> None:
    asked_about: set[str] = set()
    async with innocent_neighbour(running, tmp_path):
        for path, method in METHODS.items():
            for name, data in without_utf8(method.input_type):
                error = await refused(call(running, path, data), Code.INVALID_ARGUMENT, "INVALID_REQUEST", name)
                assert error.details() == f"a message of {len(data)} bytes is not a valid protobuf message"
                asked_about.add(f"{method.name}.{name}")
    assert asked_about >= {
        "Generate.adapter.name",
        "GenerateStream.sampling.stop",
        "Tokenize.messages.messages.content",
        "WriteUpload.file",
        "UpdateAdapter.adapter.labels.key",
    }


# Sizes


def large(descriptor: Descriptor, path: str = "") -> Iterator[tuple[str, Callable[[Any], None]]]:
    """For every list and text that a message can hold, at any depth, what makes it large in an empty message."""
    for field in descriptor.fields:
        name, message_type = field.name, field.message_type
        is_text = field.type in (field.TYPE_STRING, field.TYPE_BYTES)
        if field.is_repeated:
            yield path + name, lambda message, field=field: fill(getattr(message, field.name), field)
            if is_text:
                yield f"{path}{name}[0]", lambda message, name=name: getattr(message, name).append("x" * MANY_CHARS)
        elif is_text:
            yield path + name, lambda message, name=name: setattr(message, name, "x" * MANY_CHARS)
        if message_type is not None and not message_type.GetOptions().map_entry:
            for inner, make in large(message_type, f"{path}{name}."):
                yield inner, lambda message, field=field, make=make: make(only(message, field))


def fill(target: Any, field: FieldDescriptor) -> None:
    for number in range(MANY):
        if field.message_type is None:
            target.append("x" if field.type == field.TYPE_STRING else 1)
        elif field.message_type.GetOptions().map_entry:
            target[number] = 1
        else:
            target.add()


def only(message: Message, field: FieldDescriptor) -> Any:
    """The message in a field that has none yet."""
    inner = getattr(message, field.name)
    return inner.add() if field.is_repeated else inner


# What the refusal of each names. A field that is not here has no cap, or none that this test knows of.
CAPS = {
    "adapter": "adapter",
    "adapter.name": None,
    "text": "prompt",
    "tokens.ids": "prompt",
    "messages.messages": "messages",
    "messages.messages.role": "messages[0].role",
    "messages.messages.content": "prompt",
    "sampling.stop": "sampling.stop",
    "sampling.stop[0]": "sampling.stop",
    "sampling.logit_bias": "sampling.logit_bias",
    "sampling.bad_words": "sampling.bad_words",
    "sampling.bad_words.ids": "sampling.bad_words",
    "sampling.stop_token_ids": "sampling.stop_token_ids",
    "generation_id": "generation_id",
    "session_key": "session_key",
}


@pytest.mark.row(44)
async def test_every_list_and_text_has_a_cap(tmp_path: Path) -> None:
    makers = dict(large(generation_pb2.GenerateRequest.DESCRIPTOR))
    assert set(makers) == set(CAPS)
    model = shutil.copytree(fake_engine.BASE_MODEL, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for each in messages %}{{ each.content }}{% endfor %}")
    config = fake_engine.server_config(tmp_path / "data")
    config = replace(config, engine=EngineConfig(model=ModelConfig(path=str(model))))
    async with running_server(tmp_path / "data", config) as running, innocent_neighbour(running, tmp_path):
        generation: Any = generation_pb2_grpc.GenerationServiceStub(running.channel)
        num_asked = len(running.engine.requests)
        for path, make in makers.items():
            request = asked()
            request.ClearField(path.partition(".")[0])
            make(request)
            if path == "messages.messages.content":
                request.messages.messages[0].role = "user"
            for method in (generation.Generate, lambda asked: anext(aiter(generation.GenerateStream(asked)))):
                reason = "INVALID_REFERENCE" if CAPS[path] is None else "INVALID_REQUEST"
                error = await refused(method(request), Code.INVALID_ARGUMENT, reason, path)
                status, bad = rpc_status.from_call(error), error_details_pb2.BadRequest()
                assert status is not None and status.ByteSize() < 4096, path
                named = [bad.field_violations[0].field for detail in status.details if detail.Unpack(bad)]
                assert named == ([] if CAPS[path] is None else [CAPS[path]]), error.details()
        assert len(running.engine.requests) == num_asked


@pytest.mark.row(41)
async def test_what_the_pool_could_never_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_engine, "INFO", replace(fake_engine.INFO, num_pages=3))
    async with running_server(tmp_path / "data") as running:
        generation = generation_pb2_grpc.GenerationServiceStub(running.channel)
        for request in (asked("x" * 50), asked("x" * 40, max_tokens=20)):
            error = await refused(generation.Generate(request), Code.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert "context 64 tokens, pool 48 tokens" in str(error.details())
        # The default gives way to what there is room for.
        await generation.Generate(asked("x" * 40))
        assert running.engine.requests[-1].max_tokens == 48 - 41


@pytest.mark.row(45)
@pytest.mark.parametrize(("text", "stop", "before"), [("ab stop tail", "stop", "ab "), ("naïve ünd", "ü", "naïve ")])
async def test_nothing_behind_a_stop_string_is_sent(generation: Any, text: str, stop: str, before: str) -> None:
    """The fake engine answers with a token for each byte: the string comes in pieces, and so does its last letter."""
    events = [event async for event in generation.GenerateStream(asked(text, stop=["nope", stop], max_tokens=30))]
    assert "".join(event.delta.text for event in events) == before
    assert sum(len(event.delta.token_ids) for event in events) == len((before + stop).encode())
    assert (events[-1].finished.reason, events[-1].finished.stop) == (generation_pb2.FINISH_REASON_STOP, stop)


# What is not there


@contextmanager
def disk_calls(folder: Path) -> Iterator[list[str]]:
    """What is asked of the file system about anything in the folder while the block runs, by Python code."""
    seen: list[str] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, str | os.PathLike) and str(folder) in os.fspath(path):
                seen.append(os.fspath(path))
            return function(path, *args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (os, ("stat", "lstat", "open", "listdir", "scandir", "access", "mkdir", "unlink", "rename", "replace")),
            (io, ("open",)),
            (builtins, ("open",)),
        ):
            for name in names:
                patch.setattr(module, name, watched(getattr(module, name)))
        yield seen


@pytest.mark.row(46)
async def test_what_is_not_there_is_not_looked_for_on_disk(running: Running, generation: Any, tmp_path: Path) -> None:
    adapters = stub(running)
    async with innocent_neighbour(running, tmp_path):
        digest = await push(adapters, write_adapter(tmp_path / "upper"), "upper")
        upload = await create(adapters, write_adapter(tmp_path / "other", seed=1), "other")
        missing = "0f" * 32
        with disk_calls(tmp_path / "data") as seen:
            for name in ("nope", "nope@prod", f"nope@sha256:{digest}", "upper@nope", f"upper@sha256:{missing[:8]}"):
                requests = [asked(adapter=name), generation_pb2.TokenizeRequest(text="x", adapter=name)]
                for request, method in zip(requests, (generation.Generate, generation.Tokenize), strict=True):
                    await refused(method(request), Code.NOT_FOUND, "ADAPTER_NOT_FOUND", name)
            for name in ("../upper", "/etc/passwd", "a/../upper", "upper@../x", "upper@sha256:..", "upper\0"):
                await refused(generation.Generate(asked(adapter=name)), Code.INVALID_ARGUMENT, "INVALID_REFERENCE")
            version = adapter_pb2.GetVersionRequest(name=f"tenants/default/adapters/upper/versions/{missing}")
            await refused(adapters.GetVersion(version), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
            assert seen == []
            await send(adapters, tmp_path / "other", upload)
            assert seen, "nothing would have been seen"
