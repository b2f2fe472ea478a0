"""Exit codes: one table over all status codes, the same for every verb, each code reached by the real command."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.main

from keyed import KeyRing, keyed_server
from lorasrv.cli import output
from lorasrv.cli.main import app
from lorasrv.client.errors import ClientError
from running_server import running_server, subprocess_env, until
from test_cli import assert_fails, own_config, run
from test_client import free_address

CODES = {
    output.OK: "ok",
    output.INTERNAL: "internal error",
    output.USAGE: "usage",
    output.NOT_FOUND: "not found",
    output.AUTH: "not authorised",
    output.REFUSED: "refused",
    output.UNAVAILABLE: "server unavailable or deadline",
    output.INTERRUPTED: "interrupted",
}
# What the verbs that talk to a server ask for besides --url.
ARGUMENTS = {"generate": ["hi"], "import": ["there", "x"], "untag": ["x", "prod"], "tag": ["x", "prod"]}


@pytest.fixture(autouse=True)
def no_user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_config(tmp_path, monkeypatch)


def test_the_table_is_complete() -> None:
    assert set(output.OF_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    assert set(output.OF_CODE.values()) <= CODES.keys() - {output.OK, output.USAGE, output.INTERRUPTED}
    for kind in ClientError.__subclasses__():
        assert output.exit_code(kind("")) == output.OF_CODE[kind.code]
    assert output.exit_code(ClientError("")) == output.INTERNAL


def test_help_has_the_table() -> None:
    text = " ".join(run("--help").stdout.split())
    for code, meaning in CODES.items():
        assert f" {code} {meaning}" in text


def verbs(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_verb_that_wants_a_server_says_that_there_is_none(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    given = {**ARGUMENTS, "push": [tmp_path], "pull": ["x", tmp_path / "new"]}
    given["serve"] = ["--workload", "slora:n=1,requests=1", "--model", tmp_path]  # bench serve
    asked = []
    for path, command in verbs(typer.main.get_command(app)):
        options = {option for parameter in command.params for option in parameter.opts}
        if "--url" in options:
            stdin = "hi\n" if path == ("chat",) else None
            result = run(*path, *given.get(path[-1], wanted(command)), "--url", free_address(), stdin=stdin)
            assert_fails(result, output.UNAVAILABLE, "")
            asked.append(path)
    assert {("status",), ("generate",), ("chat",), ("adapters", "push"), ("adapters", "ls")} <= set(asked)
    assert len(asked) > 12


def wanted(command: Any) -> list[str]:
    return ["x" for parameter in command.params if parameter.required]


async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lorasrv.cli", *arguments),
        env={**subprocess_env(), **environment},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def code_of(*arguments: str, **environment: str) -> int:
    return await (await start(*arguments, **environment)).wait()


def defect(_request: object) -> list[Exception]:
    raise RuntimeError("a defect")


async def test_the_real_command_reaches_each_code(tmp_path: Path) -> None:
    reached = {output.USAGE: await code_of("generate")}
    reached[output.UNAVAILABLE] = await code_of("status", "--url", free_address())
    async with keyed_server(tmp_path / "keyed", KeyRing(tmp_path / "keys.toml")) as running:
        reached[output.AUTH] = await code_of("status", LORASRV_URL=running.address)
    async with running_server(tmp_path / "data") as running:
        at = {"LORASRV_URL": running.address}
        reached[output.OK] = await code_of("generate", "hi", **at)
        reached[output.NOT_FOUND] = await code_of("generate", "hi", "-a", "nope", **at)
        reached[output.REFUSED] = await code_of("generate", "hi", "--top-p", "7", **at)
        running.engine.gate.clear()
        process = await start("generate", "hi", **at)
        await until(lambda: bool(running.engine.running))
        process.send_signal(signal.SIGINT)
        reached[output.INTERRUPTED] = await process.wait()
        running.engine.gate.set()
        running.engine.script = defect
        reached[output.INTERNAL] = await code_of("generate", "hi", **at)
    assert reached == {code: code for code in CODES}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("generate", "-f", "."), output.REFUSED),
        (("generate", "\udcff", "--url", "127.0.0.1:1"), output.USAGE),
        (("generate", "x", "--top-k", "4294967296"), output.USAGE),
        (("generate", "x", "--max-tokens", "-1"), output.USAGE),
        (("generate", "x", "--logit-bias", "-1=2"), output.USAGE),
        (("generate", "x", "--bad-words", "4294967296"), output.USAGE),
    ],
)
def test_what_no_server_needs_to_see(arguments: tuple[str, ...], code: int) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
