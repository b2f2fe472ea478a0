"""Credentials over real gRPC: who is let in, to what, and that nothing is looked at before."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fake_engine import FakeEngine, server_config
from keyed import ALL_ROLES, KeyRing, bearer, keyed_server
from lorasrv.client import AsyncClient, Client
from lorasrv.client.errors import PermissionDenied, Unauthenticated
from lorasrv.errors import ConfigurationError
from lorasrv.keys import Role, format_line, hash_key, new_key
from lorasrv.server.access import METHOD_ROLES, UNAUTHENTICATED_MESSAGE, current_caller
from lorasrv.server.server import Server
from running_server import METHODS, Running, reason_of, running_server, subprocess_env

Code = grpc.StatusCode


@dataclass(frozen=True, kw_only=True)
class Guarded:
    running: Running
    ring: KeyRing
    keys: dict[Role, str]


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    ring = KeyRing(tmp_path / "keys.toml")
    keys = {role: ring.add("acme", [role]) for role in Role}
    async with keyed_server(tmp_path, ring) as running:
        yield Guarded(running=running, ring=ring, keys=keys)


async def outcome(channel: grpc.aio.Channel, path: str, data: bytes, metadata: Any) -> tuple[Any, str | None, str]:
    """Code, reason and text of a call with `data` for a message."""
    method = METHODS.get(path)
    try:
        if method is not None and method.client_streaming:
            await channel.stream_unary(path)(iter([data]), metadata=metadata)
        elif method is not None and method.server_streaming:
            await anext(aiter(channel.unary_stream(path)(data, metadata=metadata)))
        else:
            await channel.unary_unary(path)(data, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code(), reason_of(error), str(error.details())
    return Code.OK, None, ""


def test_every_method_has_a_role() -> None:
    assert set(METHOD_ROLES) == set(METHODS)
    assert METHODS


def test_outside_of_a_call_there_is_no_caller() -> None:
    with pytest.raises(LookupError):
        current_caller()


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("data", [b"\xff", b"\xff" * (5 << 20)], ids=["malformed", "oversize"])
@pytest.mark.row(48)
async def test_nothing_is_looked_at_before_the_key(guarded: Guarded, path: str, data: bytes) -> None:
    channel = guarded.running.channel
    unknown = (Code.UNAUTHENTICATED, "UNAUTHENTICATED", UNAUTHENTICATED_MESSAGE)
    assert await outcome(channel, path, data, ()) == unknown
    wrong = next(role for role in Role if role is not METHOD_ROLES[path])
    code, reason, text = await outcome(channel, path, data, bearer(guarded.keys[wrong]))
    assert (code, reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert text == f"the API key does not have the role that this method asks for: {METHOD_ROLES[path]}"
    code, _, _ = await outcome(channel, path, data, bearer(guarded.keys[METHOD_ROLES[path]]))
    assert code is (Code.INVALID_ARGUMENT if len(data) == 1 else Code.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize("role", Role)
@pytest.mark.row(48)
async def test_a_role_is_for_its_methods_alone(guarded: Guarded, path: str, role: Role) -> None:
    code, _, _ = await outcome(guarded.running.channel, path, b"\xff", bearer(guarded.keys[role]))
    assert (code is Code.PERMISSION_DENIED) == (role is not METHOD_ROLES[path])


@pytest.mark.row(48)
async def test_all_bad_credentials_get_one_answer(guarded: Guarded) -> None:
    good = guarded.keys[Role.READ]
    path = "/lorasrv.v1.ServerService/GetServerInfo"
    texts = ("", "Bearer", "Bearer ", good, f"Basic {good}", f"Bearer {good}x", f"Bearer {hash_key(good)}", "x" * 4000)
    attempts = [(("authorization", text),) for text in texts]
    attempts += [bearer(good) * 2, bearer(new_key()) + bearer(good), (("x-api-key", good),), ()]
    answers = {await outcome(guarded.running.channel, path, b"", attempt) for attempt in attempts}
    assert answers == {(Code.UNAUTHENTICATED, "UNAUTHENTICATED", UNAUTHENTICATED_MESSAGE)}
    lower = (("authorization", f"bearer {good}"),)
    assert (await outcome(guarded.running.channel, path, b"", lower))[0] is Code.OK


async def test_a_refused_upload_need_not_send_a_message(guarded: Guarded) -> None:
    call = guarded.running.channel.stream_unary("/lorasrv.v1.AdapterService/WriteUpload")()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 10)
    assert caught.value.code() is Code.UNAUTHENTICATED


async def test_health_is_open_and_all_else_asks_for_a_key(guarded: Guarded) -> None:
    channel = guarded.running.channel
    health: Any = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    for metadata, let_in in (((), False), (bearer(guarded.keys[Role.GENERATE]), True)):
        call = reflection.ServerReflectionInfo(iter([question]), metadata=metadata)
        if let_in:
            assert (await anext(aiter(call))).list_services_response.service
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert caught.value.code() is Code.UNAUTHENTICATED
        call.cancel()
    for path in ("/lorasrv.v1.AdapterService/Nope", "/other.Service/Call"):
        assert (await outcome(channel, path, b"", ()))[0] is Code.UNAUTHENTICATED
        told = await outcome(channel, path, b"", bearer(guarded.keys[Role.READ]))
        assert told == (Code.UNIMPLEMENTED, "UNKNOWN_METHOD", f"there is no method '{path}'")


@pytest.mark.row(38)
async def test_a_metadata_bomb_is_refused(guarded: Guarded) -> None:
    path = "/lorasrv.v1.ServerService/GetServerInfo"
    bomb = (*bearer(guarded.keys[Role.READ]), ("x-bomb", "x" * (64 << 10)))
    assert (await outcome(guarded.running.channel, path, b"", bomb))[0] is Code.RESOURCE_EXHAUSTED
    assert (await outcome(guarded.running.channel, path, b"", bearer(guarded.keys[Role.READ])))[0] is Code.OK


async def test_keys_come_and_go_while_a_stream_runs(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    running, ring = guarded.running, guarded.ring
    running.engine.gate.clear()
    client = AsyncClient(running.address, api_key=guarded.keys[Role.GENERATE])
    events = client.stream("hello", adapter="base")
    await anext(events)
    ring.path.write_text("")
    added = ring.add("acme", ALL_ROLES)
    running.server.reload_keys()
    with pytest.raises(Unauthenticated):
        await client.generate("x", adapter="base")
    running.engine.gate.set()
    assert len([event async for event in events]) > 2
    async with client, AsyncClient(running.address, api_key=added) as other:
        assert (await other.generate("x", adapter="base")).text == "x"
        ring.path.write_text("broken")
        running.server.reload_keys()
        assert "the keys stay as they were" in caplog.text
        assert (await other.generate("x", adapter="base")).text == "x"


async def test_an_expired_key_is_nobodys(tmp_path: Path) -> None:
    ring, key = KeyRing(tmp_path / "keys.toml"), new_key()
    line = format_line("old", "acme", ALL_ROLES, hash_key(key))
    ring.path.write_text(line.replace(" }", ", expires = 2020-01-01T00:00:00Z }"))
    async with keyed_server(tmp_path, ring) as running, AsyncClient(running.address, api_key=key) as client:
        with pytest.raises(Unauthenticated, match="no valid API key"):
            await client.generate("x", adapter="base")


async def test_clients_send_their_key(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    url, keys = guarded.running.address, guarded.keys

    def use() -> None:
        with Client(url, api_key=keys[Role.READ]) as client:
            assert client.adapters() == []
            with pytest.raises(PermissionDenied, match="generate") as caught:
                next(client.stream("x", adapter="base"))
            assert keys[Role.READ] not in f"{caught.value!r} {client!r} {caught.value.__cause__}"
        with Client(url) as client, pytest.raises(Unauthenticated):
            client.info()
        monkeypatch.setenv("LORASRV_API_KEY", keys[Role.GENERATE])
        with Client(url) as client:
            assert client.generate("x", adapter="base").text == "x"
        with Client(url, api_key=keys[Role.READ]) as client, pytest.raises(PermissionDenied):
            client.generate("x", adapter="base")

    await asyncio.to_thread(use)
    async with AsyncClient(url) as client:
        assert (await client.generate("x", adapter="base")).text == "x"


@pytest.mark.parametrize("key", ["two\nlines", "späce", "a b", "x\0"])
def test_a_key_that_is_none_is_never_quoted(key: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="visible ASCII") as caught:
            kind("127.0.0.1:1", api_key=key)
        assert key not in str(caught.value)


async def test_a_key_does_not_hurt_where_none_is_asked_for(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running, AsyncClient(running.address, api_key=new_key()) as client:
        assert (await client.generate("x", adapter="base")).text == "x"


# The port


async def test_other_addresses_are_served_with_keys_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    key = ring.add("acme", [Role.GENERATE])
    async with keyed_server(tmp_path, ring, listen="0.0.0.0:0") as running:
        assert "without TLS: API keys and prompts pass in the clear" in caplog.text
        async with AsyncClient(running.address.replace("0.0.0.0", "127.0.0.1"), api_key=key) as client:
            assert (await client.generate("x", adapter="base")).text == "x"


def test_a_key_file_that_is_wrong_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    for name in ("nope.toml", "keys.toml"):
        (tmp_path / "keys.toml").write_text("ci = 3")
        config = replace(server_config(tmp_path / "data"), api_keys=str(tmp_path / name))
        with pytest.raises(ConfigurationError, match=name):
            Server(config, lambda _: FakeEngine())
    assert not (tmp_path / "data").exists()


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout {key} -out {cert}"
    )
    options = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    return {"tls_cert": str(cert), "tls_key": str(key)}


async def test_tls(tmp_path: Path, certificate: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    key = ring.add("acme", ALL_ROLES)
    roots = Path(certificate["tls_cert"]).read_bytes()
    async with keyed_server(tmp_path, ring, listen="0.0.0.0:0", **certificate) as running:
        assert "without TLS" not in caplog.text
        address = running.address.replace("0.0.0.0", "127.0.0.1")
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots)) as channel:
            path = "/lorasrv.v1.ServerService/GetServerInfo"
            assert (await outcome(channel, path, b"", bearer(key)))[0] is Code.OK
            assert (await outcome(channel, path, b"", ()))[0] is Code.UNAUTHENTICATED
        program = (
            "import sys; from lorasrv.client import Client; print(Client(sys.argv[1], timeout_s=20).info().max_rank)"
        )
        told = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", program, f"https://{address}"],
            capture_output=True,
            text=True,
            env={
                **subprocess_env(),
                "LORASRV_API_KEY": key,
                "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": certificate["tls_cert"],
            },
        )
        assert told.stdout.strip() == "256", told.stderr


def test_tls_files_that_are_wrong_are_said(tmp_path: Path, certificate: dict[str, str]) -> None:
    for wrong, said in (
        ({"tls_cert": certificate["tls_cert"]}, "go together"),
        ({**certificate, "tls_key": certificate["tls_cert"]}, "not a certificate and its key"),
        ({**certificate, "tls_key": str(tmp_path / "nope")}, "No such file"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            Server(replace(server_config(tmp_path / "data"), **wrong), lambda _: FakeEngine())
