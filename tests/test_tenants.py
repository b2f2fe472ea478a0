"""Two tenants on one server, with the same names and the same bytes: neither can tell that the other is there."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapter_folders import write_adapter
from keyed import TENANT_ROLES, Keyed, KeyRing, keyed_server
from lorasrv.client.messages import upload_files, write_requests
from lorasrv.keys import Role
from lorasrv.server.seen import SeenVersions
from lorasrv.v1 import adapter_pb2, generation_pb2, server_pb2
from running_server import Running, reason_of

NEIGHBOUR_PROMPT = "an innocent neighbour"


@dataclass(frozen=True, kw_only=True)
class Tenants:
    """`acme` has pushed `upper`; `rival` has nothing yet."""

    running: Running
    acme: Keyed
    rival: Keyed
    operator: Keyed
    digest: str
    folder: Path


def asked(adapter: str = "base", generation_id: str = "") -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        adapter=[generation_pb2.AdapterRef(name=adapter)], text="abc", generation_id=generation_id
    )


async def push(caller: Keyed, folder: Path, adapter_id: str) -> adapter_pb2.Upload:
    upload = await caller.adapters.CreateUpload(
        adapter_pb2.CreateUploadRequest(parent="tenants/-", adapter_id=adapter_id, files=upload_files(folder))
    )
    if folder in caller.pushed:
        assert upload.files[-1].committed_bytes, "a tenant's own bytes are not sent again"
    else:
        assert [file.committed_bytes for file in upload.files] == [0] * len(upload.files)
        await caller.adapters.WriteUpload(write_requests(folder, upload))
        caller.pushed.add(folder)
    return await caller.adapters.FinishUpload(adapter_pb2.FinishUploadRequest(name=upload.name))


@asynccontextmanager
async def neighbour(caller: Keyed) -> AsyncIterator[None]:
    """While the block runs, generations on an adapter of `caller` follow each other, and all are the same."""

    async def tokens() -> list[int]:
        request = asked("upper")
        request.text = NEIGHBOUR_PROMPT
        return list((await caller.generation.Generate(request)).samples[0].token_ids)

    expected, ended = await tokens(), False

    async def run() -> int:
        rounds = 0
        while not ended or not rounds:
            assert await tokens() == expected
            rounds += 1
        return rounds

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        ended = True
        assert await task > 0


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[Tenants]:
    ring = KeyRing(tmp_path / "keys.toml")
    keys = [ring.add(tenant, TENANT_ROLES) for tenant in ("acme", "rival")]
    keys.append(ring.add("operations", Role))
    async with keyed_server(tmp_path, ring) as running:
        acme, rival, operator = (Keyed(running.channel, key) for key in keys)
        folder = write_adapter(tmp_path / "upper")
        digest = (await push(acme, folder, "upper")).version.digest
        async with neighbour(acme):
            yield Tenants(running=running, acme=acme, rival=rival, operator=operator, digest=digest, folder=folder)
        assert not running.engine.running
        running.server._registry.check()  # pyright: ignore[reportPrivateUsage]
        assert running.server._registry.num_pins == 0  # pyright: ignore[reportPrivateUsage]


async def answer(call: Any) -> tuple[grpc.StatusCode, str | None, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value), str(caught.value.details())


def calls_on(name: str) -> Iterator[tuple[str, Callable[[Keyed], Any]]]:
    """Every call that names an adapter by its resource name, as who makes it."""
    yield "get", lambda who: who.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=name))
    yield "delete", lambda who: who.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name))


def calls_on_upload(name: str) -> Iterator[tuple[str, Callable[[Keyed], Any]]]:
    message = adapter_pb2.WriteUploadRequest(upload=name, file="adapter_config.json", offset_bytes=0, data=b"{")
    yield "get", lambda who: who.adapters.GetUpload(adapter_pb2.GetUploadRequest(name=name))
    yield "write", lambda who: who.adapters.WriteUpload(iter([message]))
    yield "finish", lambda who: who.adapters.FinishUpload(adapter_pb2.FinishUploadRequest(name=name))


async def test_an_adapter_of_another_tenant_is_a_missing_one(tenants: Tenants) -> None:
    theirs, nobodys = "tenants/acme/adapters/upper", "tenants/nobody/adapters/upper"
    for name in (theirs, nobodys, "tenants/rival/adapters/upper", "tenants/-/adapters/upper"):
        for kind, call in calls_on(name):
            said = (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", "adapter 'upper' not found")
            assert await answer(call(tenants.rival)) == said, (kind, name)
    listing = [
        await answer(tenants.rival.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(parent=f"tenants/{tenant}")))
        for tenant in ("acme", "never")
    ]
    assert len({(code, reason, text.replace("acme", "never")) for code, reason, text in listing}) == 1
    own = await tenants.rival.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(parent="tenants/-"))
    assert not own.adapters
    found = await tenants.acme.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="tenants/-/adapters/upper"))
    assert found.name == theirs


async def test_an_upload_of_another_tenant_is_a_missing_one(tenants: Tenants) -> None:
    request = adapter_pb2.CreateUploadRequest(parent="tenants/-", adapter_id="open", files=upload_files(tenants.folder))
    upload = await tenants.acme.adapters.CreateUpload(request)
    upload_id = upload.name.rpartition("/")[2]
    for name in (upload.name, f"tenants/rival/uploads/{upload_id}", f"tenants/-/uploads/{upload_id}"):
        for kind, call in calls_on_upload(name):
            said = (grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", f"upload '{upload_id}' not found")
            assert await answer(call(tenants.rival)) == said, (kind, name)
    missing = f"tenants/-/uploads/{'0' * 32}"
    for _, call in calls_on_upload(missing):
        assert (await answer(call(tenants.rival)))[:2] == (grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND")
    after = await tenants.acme.adapters.GetUpload(adapter_pb2.GetUploadRequest(name=upload.name))
    assert after == upload


@pytest.mark.parametrize("parent", ["tenants/acme", "tenants/nobody"])
async def test_nobody_publishes_for_another_tenant(tenants: Tenants, parent: str) -> None:
    request = adapter_pb2.CreateUploadRequest(parent=parent, adapter_id="x", files=upload_files(tenants.folder))
    tenant = parent.removeprefix("tenants/")
    said = (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", f"tenant '{tenant}' not found")
    assert await answer(tenants.rival.adapters.CreateUpload(request)) == said
    assert await answer(tenants.operator.adapters.CreateUpload(request)) == said


async def test_no_reference_reaches_another_tenants_version(tenants: Tenants) -> None:
    digest = tenants.digest
    missing = "cd" * 32
    for theirs, nobodys in (
        ("upper", "lower"),
        ("upper@latest", "lower@latest"),
        (f"upper@sha256:{digest}", f"lower@sha256:{digest}"),
        (f"upper@sha256:{digest[:8]}", f"lower@sha256:{missing[:8]}"),
    ):
        told = [await answer(tenants.rival.generation.Generate(asked(name))) for name in (theirs, nobodys)]
        assert told[0][:2] == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
        assert told[0][2].replace("upper", "lower") == told[1][2]
    # With an adapter of its own under the same name, another tenant's digest still is no version of it.
    await push(tenants.rival, write_adapter(tenants.folder.parent / "other", rank=8), "upper")
    told = [
        await answer(tenants.rival.generation.Generate(asked(f"upper@sha256:{each}"))) for each in (digest, missing)
    ]
    assert told[0][:2] == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert told[0][2].replace(digest, missing) == told[1][2]


async def test_the_same_bytes_are_not_deduplicated_against_another_tenants(tenants: Tenants) -> None:
    """All bytes have to arrive (`push` sees to that), and memory that the other filled is not shown."""
    upload = await push(tenants.rival, tenants.folder, "mine")
    assert upload.version.digest == tenants.digest
    assert upload.version.name.startswith("tenants/rival/")

    async def tier() -> int:
        name = adapter_pb2.GetAdapterRequest(name="tenants/-/adapters/mine")
        return (await tenants.rival.adapters.GetAdapter(name)).versions[0].tier

    assert await tier() == adapter_pb2.TIER_DISK
    assert not (await tenants.rival.server.GetStatus(server_pb2.GetStatusRequest())).adapters
    await tenants.rival.generation.Generate(asked("mine"))
    assert await tier() == adapter_pb2.TIER_DEVICE
    # The bytes stay the neighbour's when this tenant lets go of them.
    await tenants.rival.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="tenants/-/adapters/mine"))
    await tenants.acme.generation.Generate(asked("upper"))


async def test_status_shows_a_tenant_its_own_versions(tenants: Tenants) -> None:
    other = (await push(tenants.rival, write_adapter(tenants.folder.parent / "other", rank=8), "mine")).version.digest
    await tenants.rival.generation.Generate(asked("mine"))

    async def shown(caller: Keyed) -> set[tuple[str, str]]:
        status = await caller.server.GetStatus(server_pb2.GetStatusRequest())
        return {(each.adapter_id, each.version_digest) for each in status.adapters}

    upper, mine = ("upper", tenants.digest), ("mine", other)
    assert await shown(tenants.acme) == {upper}
    assert await shown(tenants.rival) == {mine}
    assert await shown(tenants.operator) == {upper, mine}
    # The same bytes under a name of one's own.
    await push(tenants.rival, tenants.folder, "copied")
    await tenants.rival.generation.Generate(asked("copied"))
    assert await shown(tenants.acme) == {upper}
    assert await shown(tenants.rival) == {mine, ("copied", tenants.digest)}


async def test_generation_ids_are_a_tenants_own(tenants: Tenants) -> None:
    gate = tenants.running.engine.gate
    calls = []
    try:
        for caller in (tenants.acme, tenants.rival):
            gate.clear()
            call = caller.generation.GenerateStream(asked(generation_id="nightly"))
            await anext(aiter(call))
            calls.append(call)
        for caller in (tenants.acme, tenants.rival):
            said = await answer(caller.generation.Generate(asked(generation_id="nightly")))
            assert said[:2] == (grpc.StatusCode.ALREADY_EXISTS, "GENERATION_EXISTS")
    finally:
        gate.set()
        for call in calls:
            call.cancel()


async def test_prefixes_are_salted_with_the_tenant(tenants: Tenants) -> None:
    for caller in (tenants.acme, tenants.rival):
        await caller.generation.Generate(asked())
    salts = [request.tenant for request in tenants.running.engine.requests if request.adapter is None]
    assert salts == ["acme", "rival"]


async def test_a_page_token_is_its_tenants_alone(tenants: Tenants) -> None:
    for caller in (tenants.acme, tenants.rival):
        for adapter_id in ("a", "b"):
            await push(caller, tenants.folder, adapter_id)
    request = adapter_pb2.ListAdaptersRequest(parent="tenants/-", page_size=1)
    token = (await tenants.acme.adapters.ListAdapters(request)).next_page_token
    told = []
    for page_token in (token, "forged"):
        request.page_token = page_token
        code, reason, text = await answer(tenants.rival.adapters.ListAdapters(request))
        told.append((code, reason, text.replace(page_token, "TOKEN")))
    assert told[0] == told[1]
    assert told[0][:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE")
    own = request.page_token = (
        await tenants.rival.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(parent="tenants/-", page_size=1))
    ).next_page_token
    assert own != token
    assert [each.adapter_id for each in (await tenants.rival.adapters.ListAdapters(request)).adapters] == ["b"]


@pytest.mark.parametrize(
    "name", ["tenants/-x/adapters/upper", "tenants/--/adapters/upper", "-/adapters/upper", "tenants/-"]
)
async def test_a_dash_is_a_tenant_by_itself_only(tenants: Tenants, name: str) -> None:
    call = tenants.acme.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=name))
    assert (await answer(call))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REFERENCE")


def test_seen_versions_are_bounded_for_each_tenant() -> None:
    seen = SeenVersions(max_versions=2)
    seen.note("quiet", "d0", "old")
    for number in range(5):
        seen.note("loud", f"d{number}", f"a{number}")
        seen.note("loud", "d0", "kept")
    assert [seen.name("loud", f"d{number}") for number in range(5)] == ["kept", None, None, None, "a4"]
    assert seen.name("quiet", "d0") == "old"
    assert seen.name("nobody", "d0") is None
    assert (seen.any_name("d4"), seen.any_name("d3")) == ("a4", None)
