"""The command line: results, one-line errors, exit codes, and which server it talks to."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapter_folders import write_adapter
from fake_engine import BASE_MODEL
from keyed import KeyRing, keyed_server
from lorasrv.cli.job_file import read_jobs
from lorasrv.cli.main import app
from lorasrv.errors import ConfigurationError
from lorasrv.keys import Role
from lorasrv.types import FinishReason, LogitRules, PositionLogprobs, TokenDelta
from running_server import Running, running_server, subprocess_env, until
from terminal import terminal

COMMAND = [sys.executable, "-c", "from lorasrv.cli.main import app; app()"]


@pytest.fixture(autouse=True)
def no_user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_config(tmp_path, monkeypatch)


@pytest.fixture
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        monkeypatch.setenv("LORASRV_URL", found.address)
        yield found


def own_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of this machine's user says which server is meant; where the config file would be."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    for variable in ("LORASRV_URL", "LORASRV_CONTEXT", "LORASRV_API_KEY", "LORASRV_LISTEN"):
        monkeypatch.delenv(variable, raising=False)
    return folder / "config" / "lorasrv" / "config.toml"


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


async def in_thread(*arguments: object, stdin: str | None = None) -> Result:
    return await asyncio.to_thread(run, *arguments, stdin=stdin)


def assert_fails(result: Result, code: int, text: str) -> None:
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("lorasrv: ")
    assert text in line


async def test_adapters_from_push_to_rm(running: Running, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    pushed = await in_thread("adapters", "push", folder)
    assert pushed.exit_code == 0, pushed.output
    digest = pushed.stdout.strip().removeprefix("upper@sha256:")
    assert re.fullmatch("[0-9a-f]{64}", digest)
    other = json.loads((await in_thread("adapters", "push", folder, "--name", "other", "--json")).stdout)
    assert (other["adapter_id"], other["version"]["digest"]) == ("other", digest)

    listed = json.loads((await in_thread("adapters", "ls", "--json")).stdout)
    assert [adapter["adapter_id"] for adapter in listed["adapters"]] == ["other", "upper"]
    assert "upper" in (await in_thread("adapters", "ls")).stdout
    shown = json.loads((await in_thread("adapters", "show", "upper", "--json")).stdout)
    assert shown["tags"] == {"latest": digest}
    assert shown["versions"][0]["tier"] == "TIER_DISK"
    assert shown["versions"][0]["max_rank"] == 4
    assert digest in (await in_thread("adapters", "show", "upper")).stdout
    assert json.loads((await in_thread("adapters", "rm", "upper", "--json")).stdout) == {"deleted": "upper"}
    assert_fails(await in_thread("adapters", "show", "upper"), 3, "ADAPTER_NOT_FOUND: adapter 'upper' not found")


async def test_a_push_shows_a_bar_at_a_terminal_and_only_there(running: Running, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    async with terminal("adapters", "push", str(folder), kind="xterm") as screen:
        await screen.shows("━")
        await screen.shows("upper@sha256:")
        assert await screen.ends() == 0
    size = sum((folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors"))
    assert f"{size / 1000:.1f} kB" in screen.shown
    assert "━" not in (await in_thread("adapters", "push", folder, "--name", "other")).output


async def test_generate_streams_one_prompt(running: Running) -> None:
    result = await in_thread("generate", "hé there", "--max-tokens", 20, "--stop", "ere")
    assert (result.exit_code, result.stdout) == (0, "hé th\n")
    record = json.loads((await in_thread("generate", "hi", "--seed", 9, "--json")).stdout)
    assert (record["text"], record["seed"], record["finish_reason"]) == ("hi", 9, "eos")
    assert (record["adapter"], record["version_digest"]) == ("base", None)


async def test_generate_passes_every_knob_on(running: Running) -> None:
    knobs = "--min-p 0.5 --repetition-penalty 2 --presence-penalty 1 --frequency-penalty 0.5 --logit-bias 7=-2.5"
    more = "--logit-bias 8=1 --bad-words 1,2 --bad-words 3 --stop-token 5 --min-tokens 2 --ignore-eos"
    result = await in_thread("generate", "hi", *knobs.split(), *more.split(), "--echo")
    assert (result.exit_code, result.stdout) == (0, "hihi\n")
    line = {
        "prompt": "hi",
        "min_p": 0.5,
        "repetition_penalty": 2,
        "presence_penalty": 1,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": -2.5, "8": 1},
        "bad_words": [[1, 2], [3]],
        "stop_token_ids": [5],
        "min_tokens": 2,
        "ignore_eos": True,
        "echo": True,
    }
    result = await in_thread("generate", "-f", "-", stdin=json.dumps(line))
    assert (result.exit_code, result.stdout) == (0, "hihi\n"), result.output
    for request in running.engine.requests:
        assert request.rules == LogitRules(
            repetition_penalty=2.0,
            presence_penalty=1.0,
            frequency_penalty=0.5,
            logit_bias=((7, -2.5), (8, 1.0)),
            bad_words=((1, 2), (3,)),
        )
        assert (request.min_p, request.stop_token_ids, request.min_tokens) == (0.5, (5,), 2)
        assert request.ignore_eos
    assert len(running.engine.requests) == 2


async def test_generate_tells_samples_apart(running: Running) -> None:
    one = "--- prompt 0, sample 0 ---\nabc\n--- prompt 0, sample 1 ---\nbc\n"
    assert (await in_thread("generate", "abc", "--n", 2)).stdout == one
    lines = "\n".join(["abc", json.dumps({"prompt": "d", "n": 1})])
    assert (await in_thread("generate", "-f", "-", "--n", 2, stdin=lines)).stdout == one + "d\n"
    for arguments, stdin in ((("abc",), None), (("-f", "-"), "abc")):
        result = await in_thread("generate", *arguments, "--n", 2, "--json", stdin=stdin)
        records = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(each["index"], each["sample"], each["text"]) for each in records] == [(0, 0, "abc"), (0, 1, "bc")]


async def test_generate_prints_logprobs_as_json(running: Running) -> None:
    scores = (PositionLogprobs(token_id=71, logprob=-0.5, top=((9, -0.25),)),)
    running.engine.script = lambda request: [
        TokenDelta(
            request_id=request.request_id,
            token_ids=(71,),
            logprobs=scores,
            prompt_logprobs=scores * 2,
            finish=FinishReason.LENGTH,
        )
    ]
    result = await in_thread("generate", "hi", "--json", "--logprobs", 1, "--prompt-logprobs", 1)
    record = json.loads(result.stdout)
    assert record["logprobs"] == [{"token_id": 71, "logprob": -0.5, "top": {"9": -0.25}}]
    assert record["prompt_logprobs"] == record["logprobs"] * 2
    assert [request.logprobs for request in running.engine.requests] == [1]


async def test_generate_a_file_in_input_order(running: Running, tmp_path: Path) -> None:
    prompts = [f"p{'x' * (30 - index)}" for index in range(30)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    result = await in_thread("generate", "--file", file, "--concurrency", 8)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == prompts
    lines = "\n".join([json.dumps({"prompt": "abc", "max_tokens": 1}), json.dumps({"prompt": "d", "adapter": "nope"})])
    result = await in_thread("generate", "-f", "-", "--json", stdin=lines)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert (records[0]["text"], records[0]["finish_reason"]) == ("a", "length")
    assert records[1]["error"]["reason"] == "ADAPTER_NOT_FOUND"
    assert_fails(result, 3, "prompt 1: ADAPTER_NOT_FOUND")


async def test_a_file_that_is_no_text_is_named_by_its_line(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"fine\n\xff\n")
    assert_fails(await in_thread("generate", "--file", file), 2, "line 2: not UTF-8")
    result = await asyncio.to_thread(CliRunner().invoke, app, ["generate", "-f", "-"], input=b"fine\n\xff\n")
    assert_fails(result, 2, "line 2: not UTF-8")
    assert not running.engine.requests


async def test_so_many_of_a_file_run_at_once(running: Running) -> None:
    running.engine.gate.clear()
    task = asyncio.create_task(in_thread("generate", "-f", "-", "--concurrency", 3, stdin="hello\n" * 10))
    await until(lambda: len(running.engine.running) == 3)
    await asyncio.sleep(0.1)
    assert len(running.engine.running) == 3
    running.engine.gate.set()
    assert (await task).stdout == "hello\n" * 10


async def test_sigint_cancels_all_streams(running: Running, tmp_path: Path) -> None:
    running.engine.gate.clear()
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n" * 200)
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *("generate", "--file", str(file), "--concurrency", "32"),
        stderr=asyncio.subprocess.PIPE,
        env=subprocess_env(),
    )
    while len(running.engine.running) < 32:
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (130, "lorasrv: interrupted\n")
    while running.engine.running:
        await asyncio.sleep(0.005)
    status = json.loads((await in_thread("status", "--json")).stdout)["status"]
    assert (status["running_requests"], status["adapter_pins"], status["pool"]["sequence_pages"]) == (0, 0, 0)


async def test_status(running: Running) -> None:
    status = json.loads((await in_thread("status", "--json")).stdout)
    assert status["server"]["base_model"]["name"] == "base"
    assert status["status"]["state"] == "ENGINE_STATE_READY"
    assert status["status"]["pool"]["num_pages"] == 10
    assert "0 running" in (await in_thread("status")).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("generate", "hi", "-a", "nope"), 3, "ADAPTER_NOT_FOUND"),
        (("generate", "hi", "-a", "UP"), 5, "INVALID_REFERENCE"),
        (("generate", "hi", "--top-p", "7"), 5, "sampling.top_p: 7.0"),
        (("generate", "hi", "--logprobs", "99", "--json"), 5, "sampling.logprobs: 99"),
        (("generate", "hi", "--url", "nonsense"), 2, "--url: 'nonsense'"),
        (("generate", "--file", "/nowhere/prompts"), 3, "/nowhere/prompts"),
        (("adapters", "rm", "nope"), 3, "ADAPTER_NOT_FOUND"),
    ],
)
async def test_one_line_errors_and_exit_codes(
    running: Running, arguments: tuple[str, ...], code: int, text: str
) -> None:
    assert_fails(await in_thread(*arguments), code, text)


USAGE = [
    ("generate",),
    ("generate", "x", "-f", "y"),
    ("generate", "x", "--logit-bias", "7"),
    ("generate", "x", "--bad-words", "a,b"),
    ("generate", "x", "--logprobs", "3"),
    ("nope",),
    ("serve",),
]


@pytest.mark.parametrize("arguments", USAGE)
def test_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_check_needs_no_server(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good")
    checked = run("adapters", "check", good, "--model", BASE_MODEL)
    assert (checked.exit_code, checked.stdout) == (0, "ok: rank 4, q_proj\n")
    record: dict[str, Any] = json.loads(run("adapters", "check", good, "--model", BASE_MODEL, "--json").stdout)
    assert record == {"ok": True, "min_rank": 4, "max_rank": 4, "target_modules": ["q_proj"]}
    bad = write_adapter(tmp_path / "bad", use_dora=True)
    assert_fails(run("adapters", "check", bad, "--model", BASE_MODEL), 5, "use_dora")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"prompt": 3}',
        '{"prompt": "x", "max_token": 3}',
        '{"prompt": "x", "seed": true}',
        '{"prompt": "x", "max_tokens": -1}',
        '{"prompt": "x", "stop": [3]}',
        '{"prompt": "x", "ignore_eos": 1}',
        '{"prompt": "x", "logit_bias": [1]}',
        '{"prompt": "x", "logit_bias": {"a": 1}}',
        '{"prompt": "x", "bad_words": [1]}',
        '{"prompt": "x", "min_p": "0.1"}',
        '{"temperature": 0}',
        '{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}',
        '{"messages": "x"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": "x", "name": "y"}]}',
        '{"messages": [{"role": "user", "content": 3}]}',
        '{"prompt": "x", "temperature": NaN}',
        '{"prompt": "x", "temperature": 1' + "0" * 400 + "}",
        '{"prompt": "x", "top_k": 4294967296}',
        '{"prompt": "\\ud800"}',
        "a byte that is no UTF-8: \udcff",
    ],
)
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(ConfigurationError, match="line 2: "):
        read_jobs(["fine\n", line], "base", {}, jsonl=False)


def test_jsonl_is_read_as_objects() -> None:
    jobs = read_jobs(['{"prompt": "a", "seed": 1}\n', "\n"], "base", {"seed": 2, "top_k": 3}, jsonl=True)
    assert [(job.prompt, job.adapter, dict(job.sampling)) for job in jobs] == [("a", "base", {"seed": 1, "top_k": 3})]
    messages = [{"role": "user", "content": "hi"}]
    (job,) = read_jobs([json.dumps({"messages": messages, "adapter": "upper"})], "base", {}, jsonl=True)
    assert (job.prompt, job.adapter) == (messages, "upper")


def test_serve_refuses_other_than_loopback(tmp_path: Path) -> None:
    result = run("serve", "--model", BASE_MODEL, "--listen", "0.0.0.0:1", "--data-dir", tmp_path)
    assert_fails(result, 2, "0.0.0.0:1")


def test_serve_until_sigterm(tmp_path: Path) -> None:
    """The real engine: loads torch, so this is the slow one."""
    arguments = ["serve", "--model", BASE_MODEL, "--listen", "127.0.0.1:0", "--data-dir", tmp_path, "--pool-mib", 16]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_env(),
    )
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["event"] == "ready"
    result = run("generate", "hello>", "--temperature", 0, "--url", ready["address"])
    assert (result.exit_code, result.stdout) == (0, "hello\n")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, ""), errors
    assert "Traceback" not in errors


async def test_keys_and_roles_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    key = ring.add("acme", [Role.GENERATE])
    async with keyed_server(tmp_path, ring) as running:
        monkeypatch.setenv("LORASRV_URL", running.address)
        assert_fails(await in_thread("generate", "hi"), 4, "UNAUTHENTICATED: no valid API key")
        monkeypatch.setenv("LORASRV_API_KEY", key)
        assert (await in_thread("generate", "hi")).stdout == "hi\n"
        assert (await in_thread("generate", "-f", "-", stdin="a\nb")).stdout == "a\nb\n"
        assert_fails(await in_thread("adapters", "ls"), 4, "PERMISSION_DENIED")
