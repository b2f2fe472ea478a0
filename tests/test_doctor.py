"""`lorasrv doctor`: each thing that can be wrong is seen, and said with what to do; nothing wrong is exit code 0."""

import json
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_engine import BASE_MODEL
from keyed import KeyRing, keyed_server
from lorasrv import __version__
from lorasrv.cli import diagnosis
from lorasrv.cli.diagnosis import Finding, data_dir, devices, model, port
from lorasrv.keys import Role
from lorasrv_adapters.database import SCHEMA_VERSION, Database
from running_server import running_server
from test_cli import in_thread, own_config, run
from test_house import run_without


@pytest.fixture(autouse=True)
def no_user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_config(tmp_path, monkeypatch)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def states(findings: Iterator[Finding]) -> dict[str, str]:
    found = {}
    for finding in findings:
        assert (finding.advice is None) == (finding.state == "ok"), finding
        assert "\n" not in finding.detail + (finding.advice or "")
        found[finding.subject] = finding.state
    return found


def test_a_machine_where_all_is_well(tmp_path: Path, free_port: int) -> None:
    arguments = ("doctor", "--data-dir", tmp_path / "data", "--port", free_port, "--model", BASE_MODEL)
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    details = {finding["subject"]: finding["detail"] for finding in report["findings"]}
    assert report["ok"] is True
    assert {"lorasrv", "python", "torch", "triton", "transformers", "peft", "grpcio", "protobuf"} <= details.keys()
    assert "cores" in details["cpu"] and details["serve"] == "installed"
    assert details["port"] == f"{free_port} is free"
    assert "LlamaForCausalLM" in details["model"] and "no chat template" in details["model files"]
    assert not (tmp_path / "data").exists(), "it only looks"
    shown = run(*arguments)
    assert (shown.exit_code, shown.stdout.splitlines()[-1]) == (0, "a server can start")


async def test_a_port_with_a_server_tells_its_status(tmp_path: Path) -> None:
    async with running_server(tmp_path / "data") as running:
        number = running.address.rpartition(":")[2]
        done = await in_thread("doctor", "--port", number, "--data-dir", tmp_path / "data")
    assert done.exit_code == 5
    (taken,) = [line for line in done.stdout.splitlines() if "taken" in line]
    assert taken.startswith("! port ") and f"a lorasrv server {__version__} of base, ready: 0 running" in taken
    assert "! registry     held by a running server" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("a server cannot start")


async def test_a_port_with_a_server_that_wants_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    # Not for whoever happens to have the port.
    monkeypatch.setenv("LORASRV_API_KEY", ring.add("acme", [Role.READ]))
    async with keyed_server(tmp_path, ring) as running:
        done = await in_thread("doctor", "--port", running.address.rpartition(":")[2], "--data-dir", tmp_path / "other")
    assert "taken by a lorasrv server, which says UNAUTHENTICATED" in done.stdout


def test_a_port_with_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = port(taken.getsockname()[1])
    assert found.state == "problem" and "another program" in found.detail


def test_data_dirs_that_are_fine(tmp_path: Path) -> None:
    assert states(data_dir(tmp_path / "not" / "yet")) == {"data dir": "ok", "disk": "ok"}
    assert states(data_dir(tmp_path)) == {"data dir": "ok", "disk": "ok", "catalogue": "ok"}
    Database(tmp_path / "catalogue.sqlite3").close()
    found = list(data_dir(tmp_path))
    assert found[-1].detail == f"schema {SCHEMA_VERSION}"


def test_data_dirs_that_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert states(data_dir(tmp_path / "file")) == {"data dir": "problem"}
    assert states(data_dir(tmp_path / "file" / "below")) == {"data dir": "problem"}
    newer = tmp_path / "newer"
    newer.mkdir()
    with closing(sqlite3.connect(newer / "catalogue.sqlite3")) as catalogue:
        catalogue.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    assert states(data_dir(newer))["catalogue"] == "problem"
    (newer / "catalogue.sqlite3").write_bytes(b"damaged" * 1000)
    assert states(data_dir(newer))["catalogue"] == "problem"
    monkeypatch.setattr(diagnosis, "LOW_DISK_BYTES", 1 << 60)
    assert states(data_dir(tmp_path))["disk"] == "note"
    monkeypatch.setattr(diagnosis.os, "access", lambda path, mode: False)
    assert states(data_dir(tmp_path)) == {"data dir": "problem"}


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    assert states(model(tmp_path)) == {"model": "problem"}
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (found,) = model(tmp_path)
    assert "GPT2LMHeadModel" in found.detail
    (tmp_path / "config.json").write_bytes((BASE_MODEL / "config.json").read_bytes())
    *_, found = model(tmp_path)
    assert found.state == "problem" and "model.safetensors" in found.detail


def fake_torch(gpus: int) -> Any:
    cuda = SimpleNamespace(
        is_available=lambda: gpus > 0,
        device_count=lambda: gpus,
        device=lambda index: nullcontext(),
        mem_get_info=lambda: (70 << 30, 80 << 30),
        is_bf16_supported=lambda: True,
        get_device_name=lambda index: "NVIDIA H100",
    )
    cpu = SimpleNamespace(get_cpu_capability=lambda: "AVX2")
    return SimpleNamespace(cuda=cuda, backends=SimpleNamespace(cpu=cpu), __version__="2.13.0+cpu")


def test_devices(tmp_path: Path) -> None:
    *_, second = devices(fake_torch(2))
    assert (second.subject, second.detail) == ("cuda:1", "NVIDIA H100, 70.0 GiB of 80.0 GiB free; bf16 yes")
    assert states(devices(fake_torch(0), tmp_path / "nvidiactl")) == {"cpu": "ok", "cuda": "ok"}
    (tmp_path / "nvidiactl").touch()
    assert states(devices(fake_torch(0), tmp_path / "nvidiactl")) == {"cpu": "ok", "cuda": "note"}


def test_a_client_alone_is_told_that_it_cannot_serve(tmp_path: Path, free_port: int) -> None:
    blocked = ("torch", "numpy", "tokenizers", "msgspec", "zmq", "transformers", "safetensors", "jinja2", "re2")
    command = ("doctor", "--json", "--data-dir", str(tmp_path), "--port", str(free_port), "--model", str(BASE_MODEL))
    program = f"""
from contextlib import suppress
from lorasrv.cli.main import app
with suppress(SystemExit):
    app({list(command)!r})
"""
    (tmp_path / "call_doctor.py").write_text(program)
    report = json.loads(run_without(blocked, ["call_doctor"], tmp_path).splitlines()[0])
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert report["ok"] is False
    assert found["serve"]["detail"] == "not installed: there is no torch"
    assert found["serve"]["advice"] == "pip install 'lorasrv[server]'"
    assert found["model"]["state"] == "ok" and "not looked at" in found["model files"]["detail"]
    assert [name for name, finding in found.items() if finding["state"] == "problem"] == ["serve"]
