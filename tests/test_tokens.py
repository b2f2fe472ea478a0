"""Tokenize and Detokenize over real gRPC, against the model's own tokenizer."""

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from adapter_folders import write_adapter
from fake_engine import BASE_MODEL, INFO
from lorasrv.client import Client
from lorasrv.client.errors import InvalidArgument, NotFound
from lorasrv.config import EngineConfig, ModelConfig
from lorasrv.errors import QueueFull
from lorasrv.server.server import ServerConfig
from lorasrv.server.tokens import MAX_RUNNING, MAX_TEXT_CHARS, MAX_TOKEN_IDS, MAX_WAITING, TokenDesk
from lorasrv.v1 import generation_pb2, generation_pb2_grpc
from running_server import Running, asked, refused, running_server

Code = grpc.StatusCode
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
TEXT = "hé> 😀\n"
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    model = tmp_path / "model"
    shutil.copytree(BASE_MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    config = ServerConfig(
        engine=EngineConfig(model=ModelConfig(path=str(model))), data_dir=str(tmp_path / "data"), listen="127.0.0.1:0"
    )
    async with running_server(tmp_path / "data", config) as found:
        yield found


@pytest.fixture
def generation(running: Running) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(running.channel)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE_MODEL / "tokenizer.json"))


async def test_tokens_are_those_that_a_generation_begins_with(
    running: Running, generation: Any, tokenizer: Tokenizer
) -> None:
    response = await generation.Tokenize(generation_pb2.TokenizeRequest(text=TEXT))
    assert list(response.token_ids) == tokenizer.encode(TEXT).ids
    assert (response.text, list(response.offsets)) == ("", [])
    await generation.Generate(asked(TEXT))
    assert list(running.engine.requests[0].token_ids) == list(response.token_ids)


async def test_offsets_are_characters_of_the_text(generation: Any, tokenizer: Tokenizer) -> None:
    request = generation_pb2.TokenizeRequest(text=TEXT, with_offsets=True, with_text=True)
    response = await generation.Tokenize(request)
    spans = [(each.start, each.end) for each in response.offsets]
    assert spans == tokenizer.encode(TEXT).offsets
    assert response.text == TEXT
    # A byte-level vocabulary: é is two tokens of one character, 😀 four.
    pieces = [TEXT[start:end] for start, end in spans]
    assert (pieces[0], pieces.count("é"), pieces.count("😀")) == ("", 2, 4)


async def test_a_chat_is_rendered_with_the_adapters_system_prompt(
    running: Running, generation: Any, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "french")
    (folder / "serving.json").write_text(json.dumps({"system_prompt": "fr"}))

    def session() -> None:
        with Client(running.address) as client:
            client.push(folder)
            plain = client.tokenize(CHAT, with_text=True)
            french = client.tokenize(CHAT, adapter="french", with_text=True)
            assert (plain.text, french.text) == ("<s>[user]hi>", "<s>[system]fr[user]hi>")
            answered = client.generate(CHAT, adapter="french", echo=True, max_tokens=1)
            assert list(answered.started.prompt_token_ids) == list(french.token_ids)
            assert client.tokenize("hi", adapter="french").token_ids == client.tokenize("hi").token_ids
            with pytest.raises(NotFound, match="nope"):
                client.tokenize(CHAT, adapter="nope")
            with pytest.raises(ValueError, match="neither text nor"):
                client.tokenize([1, 2])  # pyright: ignore[reportArgumentType]
            assert client.detokenize(french.token_ids) == "[system]fr[user]hi>"
            assert client.detokenize(french.token_ids, with_special_tokens=True) == french.text
            with pytest.raises(InvalidArgument, match="260"):
                client.detokenize([260])

    await asyncio.to_thread(session)


@pytest.mark.parametrize("ids", [[], [0xC3 - 1], [256, 257], [71, 72, 259]])
async def test_detokenizing_is_the_tokenizers_decoding(generation: Any, tokenizer: Tokenizer, ids: list[int]) -> None:
    for keep in (False, True):
        request = generation_pb2.DetokenizeRequest(token_ids=ids, with_special_tokens=keep)
        assert (await generation.Detokenize(request)).text == tokenizer.decode(ids, skip_special_tokens=not keep)


async def test_text_goes_there_and_back(generation: Any) -> None:
    tokens = (await generation.Tokenize(generation_pb2.TokenizeRequest(text=TEXT))).token_ids
    assert (await generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=tokens))).text == TEXT
    empty = await generation.Tokenize(generation_pb2.TokenizeRequest(text=""))
    assert len(empty.token_ids) == 1  # <s>


async def test_what_is_too_long_or_nothing_is_refused_and_a_neighbour_goes_on(
    running: Running, generation: Any
) -> None:
    running.engine.gate.clear()
    neighbour = generation.Generate(asked("neighbour"))
    messages = generation_pb2.ChatMessages()
    for tokenize in (
        generation_pb2.TokenizeRequest(),
        generation_pb2.TokenizeRequest(text="x" * (MAX_TEXT_CHARS + 1)),
        generation_pb2.TokenizeRequest(messages=messages),
    ):
        await refused(generation.Tokenize(tokenize), Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    for ids in ([260], [0] * (MAX_TOKEN_IDS + 1)):
        call = generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=ids))
        await refused(call, Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    bad = generation.Tokenize(generation_pb2.TokenizeRequest(text="x", adapter="UP"))
    await refused(bad, Code.INVALID_ARGUMENT, "INVALID_REFERENCE")
    running.engine.gate.set()
    assert (await neighbour).samples[0].text == "neighbour"


class Held:
    """A tokenizer that decodes when `gate` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.num_decoding = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.num_decoding += 1
        assert self.gate.wait(60)
        return str(ids)


async def test_few_run_at_once_a_bounded_number_waits_and_the_rest_is_told() -> None:
    held = Held()
    with ThreadPoolExecutor(MAX_RUNNING + 1) as workers:
        desk = TokenDesk(
            desk=None,  # pyright: ignore[reportArgumentType]
            tokenizer=held,  # pyright: ignore[reportArgumentType]
            chat_template=None,
            vocab_size=INFO.vocab_size,
            workers=workers,
        )

        def call(number: int) -> "asyncio.Task[str]":
            return asyncio.create_task(desk.detokenize([number], with_special_tokens=False))

        tasks = [call(number) for number in range(MAX_RUNNING + MAX_WAITING)]
        while held.num_decoding < MAX_RUNNING:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull, match=str(MAX_WAITING)):
            await call(99)
        # Threads are left to others; a call that is cancelled does not give its thread to the next one.
        assert await asyncio.wrap_future(workers.submit(lambda: "free")) == "free"
        tasks[0].cancel()
        tasks[-1].cancel()
        await asyncio.gather(tasks[0], tasks[-1], return_exceptions=True)
        assert held.num_decoding == MAX_RUNNING
        held.gate.set()
        assert await asyncio.gather(*tasks[1:-1]) == [f"[{number}]" for number in range(1, len(tasks) - 1)]
        assert await call(7) == "[7]"
