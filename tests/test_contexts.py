"""`lorasrv context`, and which server and key a verb takes."""

import json
import re
import stat
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from commands import bash, command_env, command_folder
from keyed import KeyRing, keyed_server
from lorasrv.cli.config_file import Context, UserConfig, read_config, write_config
from lorasrv.cli.connection import Target, api_key_of, resolve
from lorasrv.cli.output import INTERNAL
from lorasrv.errors import ConfigurationError
from lorasrv.keys import Role
from test_cli import assert_fails, in_thread, own_config, run


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_config(tmp_path, monkeypatch)


def url_of(target: Target | None = None) -> str:
    return resolve(target).context.url


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_contexts_come_and_go(config: Path) -> None:
    assert run("context", "ls", "--json").stdout == '{"current": null, "contexts": []}\n'
    assert run("context", "add", "lab", "lab:1").stdout == "added lab: lab:1\n"
    assert run("context", "add", "prod.eu", "https://llm.example.com:2").exit_code == 0
    assert url_of() == "127.0.0.1:8470"
    assert run("context", "use", "lab").stdout == "using lab: lab:1\n"
    assert tomllib.loads(config.read_text()) == {
        "current-context": "lab",
        "contexts": {"lab": {"url": "lab:1"}, "prod.eu": {"url": "https://llm.example.com:2"}},
    }
    assert run("context", "use", "prod.eu").exit_code == 0
    assert url_of() == "https://llm.example.com:2"
    shown = run("context", "ls").stdout.splitlines()
    assert [line.split()[:2] for line in shown[1:]] == [["lab", "lab:1"], ["*", "prod.eu"]]
    assert run("context", "rm", "prod.eu").exit_code == 0
    assert url_of() == "127.0.0.1:8470"
    assert_fails(run("context", "use", "prod.eu"), 3, "prod.eu")
    assert_fails(run("context", "rm", "prod.eu"), 3, "prod.eu")
    assert_fails(run("context", "add", "x", "nonsense"), 2, "'nonsense'")
    assert_fails(run("context", "add", "X Y", "a:1"), 5, "X Y")


def test_a_kept_key_is_for_its_owner_alone(config: Path) -> None:
    assert run("context", "add", "lab", "lab:1", "--api-key-stdin", stdin="of-the-lab\n").exit_code == 0
    assert run("context", "use", "lab").exit_code == 0
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert api_key_of(resolve(None)) == "of-the-lab"
    assert "of-the-lab" not in run("context", "ls", "--json").stdout + run("context", "ls").stdout
    assert [path.name for path in config.parent.iterdir()] == ["config.toml"]
    config.chmod(0o640)
    assert_fails(run("status"), 2, f"chmod 600 {config}")
    config.chmod(0o600)
    bad = run("context", "add", "lab", "lab:1", "--api-key-stdin", stdin="not a-key\n")
    assert_fails(bad, 2, "visible ASCII")
    assert_fails(run("context", "add", "lab", "lab:1", "--api-key-stdin", stdin="\n"), 2, "the API key is empty")
    assert "a-key" not in bad.stderr
    assert api_key_of(resolve(None)) == "of-the-lab"


def test_what_names_the_server(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert url_of() == "127.0.0.1:8470"
    contexts = {name: Context(url=f"{name}:1") for name in ("lab", "home", "away")}
    write_config(config, UserConfig(current="lab", contexts=contexts))
    assert url_of() == "lab:1"
    monkeypatch.setenv("LORASRV_CONTEXT", "away")
    assert url_of() == "away:1"
    monkeypatch.setenv("LORASRV_URL", "env:3")
    assert url_of() == "env:3"
    assert url_of(Target(context="home")) == "home:1"
    assert url_of(Target(url="option:4", context="home")) == "option:4"
    assert_fails(run("--context", "nope", "status"), 2, "--context: there is no context 'nope'")
    monkeypatch.delenv("LORASRV_URL")
    monkeypatch.setenv("LORASRV_CONTEXT", "gone")
    assert_fails(run("status"), 2, "LORASRV_CONTEXT: there is no context 'gone'")


async def test_the_option_before_the_verb(config: Path, tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    key = ring.add("acme", [Role.GENERATE])
    async with keyed_server(tmp_path, ring) as running:
        named = {"mine": Context(url=running.address, api_key=key), "keyless": Context(url=running.address)}
        write_config(config, UserConfig(current="keyless", contexts=named))
        assert (await in_thread("--context", "mine", "generate", "hi")).stdout == "hi\n"
        assert (await in_thread("--context", "mine", "generate", "-f", "-", stdin="a\nb")).stdout == "a\nb\n"
        assert_fails(await in_thread("generate", "hi"), 4, "UNAUTHENTICATED")
        # The key is for the context's server, and goes to no other.
        assert_fails(await in_thread("--context", "mine", "generate", "hi", "--url", running.address), 4, "UNAUTH")


def test_a_contexts_key_is_for_its_own_server(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("of-the-context\n")
    assert api_key_of(resolve(None)) is None
    assert run("context", "add", "prod", "a:1", "--api-key-file", tmp_path / "key").exit_code == 0
    assert run("context", "use", "prod").exit_code == 0
    assert api_key_of(resolve(None)) == "of-the-context"
    assert api_key_of(resolve(Target(url="b:1"))) is None
    monkeypatch.setenv("LORASRV_URL", "b:1")
    assert api_key_of(resolve(None)) is None
    monkeypatch.setenv("LORASRV_API_KEY", "of-the-environment")
    assert api_key_of(resolve(None)) == api_key_of(resolve(Target(url="b:1"))) == "of-the-environment"


def test_a_bad_key_is_said_but_not_shown(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("not a-secret")
    context = Context(url="127.0.0.1:1", api_key_file=str(tmp_path / "key"))
    write_config(config, UserConfig(current="prod", contexts={"prod": context}))
    result = run("status")
    assert_fails(result, 2, "visible ASCII")
    assert "a-secret" not in result.stderr
    write_config(config, UserConfig(current="prod", contexts={"prod": replace(context, api_key_file="/nowhere")}))
    assert_fails(run("status"), 2, "No such file")
    monkeypatch.setenv("LORASRV_API_KEY", "not a-secret")
    assert_fails(run("status"), 2, "LORASRV_API_KEY: the API key has characters")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not toml", "Expected"),
        ("\ufffd".encode().decode("latin-1"), "Invalid"),
        ('current-context = "gone"', "'gone'"),
        ("contexts = 3", "contexts is no table"),
        ("[contexts.a]\n", "no url in [contexts.a]"),
        ('[contexts.a]\nurl = "a"', "'a' is not HOST:PORT"),
        ("[contexts.a]\nurl = 3", "url in [contexts.a] is no string"),
        ('[contexts.a]\nurl = "a:1"\nkey = "x"', "'key' in [contexts.a]"),
        ('[contexts.a]\nurl = "a:1"\napi_key = "x"\napi_key_file = "y"', "exclude each other"),
        ('context = "a"', "'context' in the file"),
    ],
)
def test_a_bad_config_says_so(config: Path, text: str, said: str) -> None:
    write(config, text)
    with pytest.raises(ConfigurationError, match=f"{re.escape(str(config))}: .*{re.escape(said)}"):
        read_config(config)


def test_what_is_written_is_what_is_read(config: Path) -> None:
    odd = 'a "b" \\ \x7f \t ü]'
    written = UserConfig(current=odd, contexts={odd: Context(url="a:1", api_key_file=odd), "b": Context(url="b:1")})
    write_config(config, written)
    assert read_config(config) == written


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_takes(tmp_path: Path, unbuffered: str) -> None:
    """Behind `| head` there is nothing to say; on a full disk there is, in one line."""
    env = {**command_env(command_folder(tmp_path / "bin"), tmp_path), "PYTHONUNBUFFERED": unbuffered}
    done = bash("lorasrv context add prod a:1 && lorasrv context ls | true; echo ${PIPESTATUS[0]}", env)
    assert (done.stdout, done.stderr) == ("added prod: a:1\n0\n", "")
    for verb in ("context ls", "context ls --json", "context use prod"):
        full = bash(f"lorasrv {verb} >/dev/full", env)
        assert (full.returncode, full.stderr) == (INTERNAL, "lorasrv: [Errno 28] No space left on device\n")


def test_a_user_without_a_home(tmp_path: Path) -> None:
    env = {**command_env(command_folder(tmp_path / "bin"), tmp_path), "HOME": "/dev/null"}
    done = bash("lorasrv context ls --json", env)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"current": None, "contexts": []})
