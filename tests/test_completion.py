"""Completion in a real bash: installed by typer's own options, adapter names from the server."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter_folders import write_adapter
from commands import bash, command_env, command_folder
from lorasrv.client import Client
from running_server import Running, running_server
from test_client import free_address

# What pressing tab behind the last of the words does.
COMPLETE = """
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _lorasrv_completion lorasrv
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        yield found


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return command_env(command_folder(tmp_path / "bin"), tmp_path)


def completed(env: dict[str, str], *lines: str) -> list[list[str]]:
    """What each line may go on with; the last word of a line is completed."""
    script = 'eval "$(lorasrv --show-completion)"' + "".join(
        COMPLETE.format(words=line) + "echo --\n" for line in lines
    )
    done = bash(script, env)
    assert (done.returncode, done.stderr) == (0, "")
    return [part.split() for part in done.stdout.split("--\n")[:-1]]


async def test_adapters_of_the_server_complete(running: Running, env: dict[str, str], tmp_path: Path) -> None:
    def push() -> None:
        with Client(running.address) as client:
            for name in ("upper", "uppish", "lower"):
                client.push(write_adapter(tmp_path / name), name)

    await asyncio.to_thread(push)
    env["LORASRV_URL"] = running.address
    both, option, one = await asyncio.to_thread(
        completed, env, "lorasrv generate -a up", "lorasrv chat --adapter l", "lorasrv adapters show uppi"
    )
    assert both == ["upper", "uppish"]
    assert (option, one) == (["lower"], ["uppish"])
    env["LORASRV_URL"] = free_address()
    assert bash(f"lorasrv context add here {running.address}", env).returncode == 0
    url, context, neither = await asyncio.to_thread(
        completed,
        env,
        f"lorasrv generate --url {running.address} -a upp",
        "lorasrv --context here adapters rm lo",
        "lorasrv adapters rm lo",
    )
    assert (url, context, neither) == (["upper", "uppish"], ["lower"], [])


def test_without_a_server_there_is_nothing_and_no_word(env: dict[str, str]) -> None:
    verbs, url, adapters = completed(
        env, "lorasrv c", "lorasrv generate --u", f"lorasrv generate --url {free_address()} -a u"
    )
    assert verbs == ["chat", "context"]
    assert url == ["--url"]
    assert adapters == []


def test_contexts_complete(env: dict[str, str]) -> None:
    assert bash("lorasrv context add prod a:1 && lorasrv context add lab b:1", env).returncode == 0
    assert completed(env, "lorasrv --context p", "lorasrv context use l") == [["prod"], ["lab"]]


def test_completion_is_installed_by_the_command(env: dict[str, str], tmp_path: Path) -> None:
    done = bash("lorasrv --install-completion && . ~/.bashrc && complete -p lorasrv", env)
    assert done.returncode == 0, done.stderr
    assert "-F _lorasrv_completion lorasrv" in done.stdout
    assert "_LORASRV_COMPLETE" in (tmp_path / ".bash_completions" / "lorasrv.sh").read_text()
