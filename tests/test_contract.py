"""The wire contract is linted, and held to the one of the last release."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUF = Path(sys.executable).with_name("buf")


@pytest.fixture
def proto(tmp_path: Path) -> Path:
    return shutil.copytree(ROOT / "proto", tmp_path / "proto")


def buf(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BUF, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def breaking(proto: Path) -> str:
    """What buf has against the contract in `proto`; empty for nothing."""
    (released,) = (ROOT / "proto" / "released").glob("v*.binpb")
    done = buf("breaking", proto, "--against", released)
    assert (done.returncode == 0) == (done.stdout == ""), done.stderr
    return done.stdout


def edit(proto: Path, file: str, old: str, new: str) -> None:
    path = proto / "lorasrv" / "v1" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def test_the_contract_is_in_order() -> None:
    done = buf("lint", ROOT / "proto")
    assert done.returncode == 0, done.stdout
    assert breaking(ROOT / "proto") == ""


def test_additions_break_nothing(proto: Path) -> None:
    edit(proto, "server.proto", "message GetServerInfoRequest {}", "message GetServerInfoRequest { bool brief = 1; }")
    more = "rpc Rest(GetServerInfoRequest) returns (ServerInfo);"
    edit(proto, "server.proto", "service ServerService {", f"service ServerService {{ {more}")
    assert breaking(proto) == ""


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("server.proto", "  uint32 max_rank = 3;\n", "", '"max_rank" on message "ServerInfo" was deleted'),
        ("server.proto", "uint32 max_rank = 3;", "uint32 max_rank = 33;", '"3" with name "max_rank"'),
        ("server.proto", "uint32 max_rank = 3;", "string max_rank = 3;", 'changed type from "uint32" to "string"'),
        ("server.proto", "rpc Drain(", "rpc Empty(", 'RPC "Drain" on service "ServerService" was deleted'),
        ("generation.proto", "PRIORITY_BATCH = 2;", "PRIORITY_BATCH = 3;", '"2" on enum "Priority" was deleted'),
    ],
)
def test_what_would_break_a_client_is_refused(proto: Path, file: str, old: str, new: str, said: str) -> None:
    edit(proto, file, old, new)
    assert said in breaking(proto)


def test_a_bad_name_does_not_pass(proto: Path) -> None:
    edit(proto, "server.proto", "message GetServerInfoRequest {}", "message GetServerInfoRequest { bool Brief = 1; }")
    done = buf("lint", proto)
    assert done.returncode != 0 and "lower_snake_case" in done.stdout


def test_ci_asks_buf() -> None:
    """`make test`, which is what CI runs, lints and compares."""
    released = next((ROOT / "proto" / "released").glob("v*.binpb")).relative_to(ROOT)
    planned = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv/bin/buf lint proto\n" in planned
    assert f".venv/bin/buf breaking proto --against {released}\n" in planned
