"""The key file: what it accepts, what it says of what it refuses, and the command that writes it."""

import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorasrv.cli.main import app
from lorasrv.errors import ConfigurationError
from lorasrv.keys import Caller, KeyFile, Role, append_line, format_line, hash_key, new_key, parse_keys
from lorasrv.server.convert import generation_request
from lorasrv.v1 import generation_pb2

ACME = Caller(tenant="acme", roles=frozenset({Role.GENERATE, Role.PUBLISH}))
HASH = "ab" * 32


def line(name: str = "ci", tenant: str = '"acme"', roles: str = '["generate"]', sha256: str = f'"{HASH}"') -> str:
    return f"{name} = {{ tenant = {tenant}, roles = {roles}, sha256 = {sha256} }}"


def key_file(tmp_path: Path, *lines: str, mode: int = 0o600) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(lines))
    path.chmod(mode)
    return path


def test_a_key_is_its_callers(tmp_path: Path) -> None:
    key, other = new_key(), new_key()
    path = key_file(tmp_path, "# of the pipeline", format_line("ci", "acme", ACME.roles, hash_key(key)))
    keys = KeyFile(path)
    assert keys.caller(key) == ACME
    for wrong in ("", other, key[:-1], key + " ", hash_key(key), key.upper(), "\udcff"):
        assert keys.caller(wrong) is None
    assert key not in path.read_text()


def test_a_key_carries_its_tenants_weight(tmp_path: Path) -> None:
    key = new_key()
    text = format_line("ci", "acme", ACME.roles, hash_key(key)).replace(" }", ", weight = 2.5 }")
    caller = KeyFile(key_file(tmp_path, text)).caller(key)
    assert caller == replace(ACME, weight=2.5)
    assert caller is not None
    asked = generation_request(generation_pb2.GenerateRequest(text="x"), caller, None)
    assert (asked.tenant, asked.weight) == ("acme", 2.5)


def test_keys_are_long_and_never_the_same() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("lorasrv_") and len(key) >= 51 for key in made)


def test_the_hash_is_what_sha256sum_says() -> None:
    assert hash_key("lorasrv_abc") == "8011a5be4916712d4771539f2a0ff8e1574c3b04ae50d20e39b4aa7ce22d3bb0"


def test_a_key_ends_with_its_time(tmp_path: Path) -> None:
    now = 0.0
    key = new_key()
    expires = datetime(2027, 1, 31, tzinfo=UTC)
    keys = KeyFile(key_file(tmp_path, format_line("ci", "acme", ACME.roles, hash_key(key), expires)), lambda: now)
    now = expires.timestamp() - 1
    assert keys.caller(key) == ACME
    now = expires.timestamp()
    assert keys.caller(key) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ci = 1", "key 'ci': is not a table"),
        ("ci = {", "not a TOML file"),
        (line() + "\n" + line(), "not a TOML file"),
        (line() + "\n" + line("cd"), "key 'cd': another name has the same sha256"),
        (line('"Ci"'), "key 'Ci': name 'Ci' does not match"),
        (line(tenant='"Acme"'), "key 'ci': tenant 'Acme' does not match"),
        (line(tenant="3"), "key 'ci': tenant is missing or no string"),
        (line(roles='["generate", "root"]'), "key 'ci': role 'root' is not one of generate, read, publish, admin"),
        (line(roles="[[1]]"), "role [1] is not one of"),
        (line(roles="[]"), "key 'ci': roles is missing"),
        (line(roles='"generate"'), "key 'ci': roles is missing or no list"),
        (line(sha256='"abc"'), "key 'ci': sha256 'abc' is not 64"),
        (line(sha256=f'"{"AB" * 32}"'), "is not 64 lower-case"),
        (line().replace(" }", ", expires = 2027-01-31 }"), "expires is '2027-01-31', not a date and time"),
        (line().replace(" }", ", expires = 2027-01-31T00:00:00 }"), "with an offset"),
        (line().replace(" }", ", weight = 0 }"), "weight is 0, not a number from 0.001 to 1000"),
        (line().replace(" }", ", weight = nan }"), "weight is nan"),
        (line().replace(" }", ", weight = true }"), "weight is True"),
        (
            line() + "\n" + line("cd", sha256=f'"{"cd" * 32}"').replace(" }", ", weight = 2 }"),
            "key 'cd': another key of tenant 'acme' has weight 1.0",
        ),
        (line().replace(" }", ', role = "admin" }'), "unknown field 'role'"),
        (line().replace(" }", ', key = "secret-itself" }'), "unknown field 'key'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        KeyFile(key_file(tmp_path, text))
    assert said in str(caught.value)
    assert str(tmp_path / "keys.toml") in str(caught.value)
    assert "secret-itself" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        KeyFile(tmp_path / "nope.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="binary"):
        KeyFile(tmp_path / "binary")


def test_a_bad_file_changes_nothing_and_a_good_one_all(tmp_path: Path) -> None:
    old, new = new_key(), new_key()
    path = key_file(tmp_path, format_line("a", "acme", ACME.roles, hash_key(old)))
    keys = KeyFile(path)
    path.write_text("a = {")
    with pytest.raises(ConfigurationError):
        keys.reload()
    assert keys.caller(old) == ACME
    path.write_text(format_line("b", "acme", ACME.roles, hash_key(new)))
    keys.reload()
    assert (keys.caller(old), keys.caller(new)) == (None, ACME)
    path.write_text("")
    keys.reload()
    assert keys.caller(new) is None


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o620, True)])
def test_a_file_open_to_others_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    caplog.set_level(logging.INFO)
    KeyFile(key_file(tmp_path, line(), mode=mode))
    assert ("chmod 600" in caplog.text) == warned
    assert "1 keys of 1 tenants" in caplog.text
    assert HASH not in caplog.text


def test_lines_are_added_to_a_file_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    append_line(path, line("a"))
    assert path.stat().st_mode & 0o777 == 0o600
    with path.open("a") as file:
        file.write("# no newline at the end")
    append_line(path, line("b", sha256=f'"{"cd" * 32}"'))
    before = path.read_text()
    assert len(parse_keys(before)) == 2
    for wrong in (line("a", sha256=f'"{"ef" * 32}"'), line("c")):
        with pytest.raises(ConfigurationError):
            append_line(path, wrong)
    assert path.read_text() == before


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["keys", "new", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_key_and_its_line() -> None:
    code, out, _ = run("ci", "--tenant", "acme", "--role", "publish", "--role", "generate", "--days", "30")
    key, text = out.splitlines()
    ((sha256, entry),) = parse_keys(text).items()
    assert (code, sha256, entry.caller) == (0, hash_key(key), ACME)
    assert entry.expires is not None
    assert abs(entry.expires - datetime.now(UTC).timestamp() - 30 * 86400) < 60
    assert key not in text
    made = json.loads(run("ci", "--tenant", "acme", "--role", "admin", "--json")[1])
    assert list(parse_keys(made["line"])) == [hash_key(made["key"])]


def test_the_command_adds_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    arguments = ("--tenant", "acme", "--role", "publish", "--role", "generate", "--file", str(path))
    code, out, _ = run("ci", *arguments)
    assert (code, KeyFile(path).caller(out.strip())) == (0, ACME)
    code, out, said = run("ci", *arguments)
    assert (code, out) == (2, "")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [("Ci", "--tenant", "acme", "--role", "read"), ("ci", "--tenant", "a/b", "--role", "read")]
)
def test_the_command_refuses_what_the_server_would(arguments: tuple[str, ...]) -> None:
    code, out, said = run(*arguments)
    assert (code, out) == (2, "")
    assert "does not match" in said
