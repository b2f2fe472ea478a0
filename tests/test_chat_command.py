"""`lorasrv chat`: from a pipe, and at a terminal with its control keys."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fake_engine import BASE_MODEL, server_config
from lorasrv.config import ModelConfig
from lorasrv.errors import QueueFull
from running_server import Running, running_server, until
from terminal import terminal
from test_chat_end_to_end import linked
from test_cli import assert_fails, in_thread, own_config

# The fake engine says again what it was told, so an answer shows the whole conversation.
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"


@asynccontextmanager
async def chatty(tmp_path: Path) -> AsyncIterator[Running]:
    model = linked(BASE_MODEL, tmp_path / "model")
    (model / "chat_template.jinja").write_text("<s>" + TEMPLATE)
    config = server_config(tmp_path / "data")
    config = replace(config, engine=replace(config.engine, model=ModelConfig(path=str(model))))
    async with running_server(tmp_path / "data", config) as running:
        yield running


@pytest.fixture
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    own_config(tmp_path, monkeypatch)
    async with chatty(tmp_path) as found:
        monkeypatch.setenv("LORASRV_URL", found.address)
        yield found


async def test_a_line_of_a_pipe_is_a_message_and_history_is_kept(running: Running) -> None:
    done = await in_thread("chat", "--system", "be", stdin="one\n\ntwo\n")
    first = "s:be;u:one;"
    assert (done.exit_code, done.stdout.splitlines()) == (0, [first, f"{first}a:{first};u:two;"]), done.output


async def test_sampling_options_are_those_of_generate(running: Running) -> None:
    options = ("--max-tokens", 3, "--temperature", 0, "--seed", 7, "--min-p", 0.5, "--bad-words", "1,2", "--ignore-eos")
    done = await in_thread("chat", *options, stdin="hello")
    assert (done.exit_code, done.stdout) == (0, "u:h\n"), done.output
    assert (await in_thread("generate", "hello", *options)).exit_code == 0
    chat, generate = running.engine.requests
    own = {"request_id": generate.request_id, "token_ids": generate.token_ids, "session_key": None}
    assert replace(chat, **own) == generate
    assert chat.temperature == 0 and chat.rules is not None and chat.rules.bad_words == ((1, 2),)


async def test_an_error_ends_a_pipe_with_its_code(running: Running) -> None:
    assert_fails(await in_thread("chat", "-a", "nope", stdin="one\ntwo\n"), 3, "ADAPTER_NOT_FOUND")
    assert not running.engine.requests


async def test_a_base_without_a_template_is_the_servers_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_config(tmp_path, monkeypatch)
    async with running_server(tmp_path / "data") as running:
        assert_fails(await in_thread("chat", "--url", running.address, stdin="hi"), 5, "chat template")


async def test_control_keys_at_a_terminal(running: Running) -> None:
    running.engine.gate.clear()
    async with terminal("chat", "--system", "be") as screen:
        await screen.shows("> ")
        screen.type("one\n")
        await asyncio.wait_for(until(lambda: bool(running.engine.running)), 60)
        await screen.shows("\ns")
        screen.type("\x03")
        await asyncio.wait_for(until(lambda: not running.engine.running), 60)
        running.engine.gate.set()
        await screen.shows("s^C\n> ")
        screen.type("half a line")
        await screen.shows("half a line")
        screen.type("\x03")
        await screen.shows("half a line\n> ")
        screen.type("two\n")
        # What had been said before it was stopped is the answer that the conversation goes on from.
        await screen.shows("s:be;u:one;a:s;u:two;\n> ")
        screen.type("\x04")
        assert await screen.ends() == 0
    assert "Traceback" not in screen.shown


async def test_a_terminal_survives_an_error_and_ends_with_the_last_turns_code(running: Running) -> None:
    echo: Callable[..., object] = running.engine.script
    running.engine.script = lambda request: [QueueFull("2048 requests wait")]
    async with terminal("chat") as screen:
        screen.type("one\n")
        await screen.shows("lorasrv: QUEUE_FULL: 2048 requests wait\n> ")
        running.engine.script = echo
        screen.type("two\n")
        await screen.shows("u:two;\n> ")
        running.engine.script = lambda request: [QueueFull("2048 requests wait")]
        screen.type("three\n")
        await asyncio.wait_for(until(lambda: screen.shown.count("QUEUE_FULL") == 2), 60)
        screen.type("\x04")
        assert await screen.ends() == 5
