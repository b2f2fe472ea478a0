"""Every method there is, on what another tenant has and on what nobody has: the same answer, byte for byte."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapter_folders import write_adapter
from keyed import TENANT_ROLES, Keyed, KeyRing, keyed_server
from lorasrv.client.messages import upload_files, write_requests
from lorasrv.v1 import adapter_pb2, generation_pb2, server_pb2
from running_server import METHODS, Running, asked

Code = grpc.StatusCode


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a call may name. Those of what is there and of what is not are equally long, so that replies are too."""

    tenant: str
    adapter_id: str
    tag: str
    digest: str
    upload_id: str
    folder: Path

    @property
    def parent(self) -> str:
        return f"tenants/{self.tenant}"

    @property
    def adapter(self) -> str:
        return f"{self.parent}/adapters/{self.adapter_id}"

    @property
    def version(self) -> str:
        return f"{self.adapter}/versions/{self.digest}"

    @property
    def tag_name(self) -> str:
        return f"{self.adapter}/tags/{self.tag}"

    @property
    def upload(self) -> str:
        return f"{self.parent}/uploads/{self.upload_id}"

    def masked(self, data: bytes) -> bytes:
        """`data` without the names."""
        for name in (self.tenant, self.adapter_id, self.tag, self.digest, self.upload_id):
            data = data.replace(name.encode(), b"*" * len(name))
        return data


def _tag(names: Names) -> adapter_pb2.Tag:
    return adapter_pb2.Tag(name=names.tag_name, versions=[adapter_pb2.WeightedVersion(digest=names.digest)])


# How to call each method that names something, in an order in which the owner can make all calls.
NAMING: dict[str, Callable[[Names], Any]] = {
    "Generate": lambda names: asked(adapter=names.adapter_id),
    "GenerateStream": lambda names: asked(adapter=f"{names.adapter_id}@sha256:{names.digest}"),
    "Tokenize": lambda names: generation_pb2.TokenizeRequest(text="x", adapter=f"{names.adapter_id}@{names.tag}"),
    "CreateUpload": lambda names: adapter_pb2.CreateUploadRequest(
        parent=names.parent, adapter_id=names.adapter_id, files=upload_files(names.folder)
    ),
    "WriteUpload": lambda names: adapter_pb2.WriteUploadRequest(
        upload=names.upload, file="adapter_config.json", data=b"{"
    ),
    "GetUpload": lambda names: adapter_pb2.GetUploadRequest(name=names.upload),
    "FinishUpload": lambda names: adapter_pb2.FinishUploadRequest(name=names.upload),
    "ImportAdapter": lambda names: adapter_pb2.ImportAdapterRequest(
        parent=names.parent, adapter_id=names.adapter_id, source="x"
    ),
    "GetAdapter": lambda names: adapter_pb2.GetAdapterRequest(name=names.adapter),
    "ListAdapters": lambda names: adapter_pb2.ListAdaptersRequest(parent=names.parent),
    "UpdateAdapter": lambda names: adapter_pb2.UpdateAdapterRequest(
        adapter=adapter_pb2.Adapter(name=names.adapter, labels={"a": "b"})
    ),
    "UndeleteAdapter": lambda names: adapter_pb2.UndeleteAdapterRequest(name=names.adapter),
    "PinAdapter": lambda names: adapter_pb2.PinAdapterRequest(name=names.adapter),
    "UnpinAdapter": lambda names: adapter_pb2.UnpinAdapterRequest(name=names.adapter),
    "GetVersion": lambda names: adapter_pb2.GetVersionRequest(name=names.version),
    "ListVersions": lambda names: adapter_pb2.ListVersionsRequest(parent=names.adapter),
    "VerifyVersion": lambda names: adapter_pb2.VerifyVersionRequest(name=names.version),
    "WarmAdapter": lambda names: adapter_pb2.WarmAdapterRequest(parent=names.parent, reference=names.adapter_id),
    "DownloadVersion": lambda names: adapter_pb2.DownloadVersionRequest(name=names.version),
    "SetTag": lambda names: adapter_pb2.SetTagRequest(tag=_tag(names)),
    "ListTags": lambda names: adapter_pb2.ListTagsRequest(parent=names.adapter),
    "CancelUpload": lambda names: adapter_pb2.CancelUploadRequest(name=names.upload),
    "DeleteVersion": lambda names: adapter_pb2.DeleteVersionRequest(name=names.version),
    "DeleteTag": lambda names: adapter_pb2.DeleteTagRequest(name=names.tag_name),
    "DeleteAdapter": lambda names: adapter_pb2.DeleteAdapterRequest(name=names.adapter),
}
# Of these, those that name a tenant beside the rest: in one's own they find what is there, or miss something else.
PARENTS = ("CreateUpload", "ImportAdapter", "ListAdapters", "WarmAdapter")
# What these tell may not have a trace of another tenant.
NAMELESS: dict[str, Any] = {
    "Detokenize": generation_pb2.DetokenizeRequest(token_ids=[1]),
    "GetServerInfo": server_pb2.GetServerInfoRequest(),
    "GetStatus": server_pb2.GetStatusRequest(),
    "WatchStatus": server_pb2.WatchStatusRequest(),
    "Drain": server_pb2.DrainRequest(),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """All that a caller gets to see."""

    code: grpc.StatusCode
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Stranger:
    running: Running
    acme: Keyed
    rival: Keyed
    theirs: Names
    nobodys: Names


@pytest.fixture
async def stranger(tmp_path: Path) -> AsyncIterator[Stranger]:
    """`acme` has an adapter and an open upload, and runs a generation. `rival` has other things."""
    ring = KeyRing(tmp_path / "keys.toml")
    keys = [ring.add(tenant, TENANT_ROLES) for tenant in ("acme", "rival")]
    async with keyed_server(tmp_path, ring) as running:
        acme, rival = (Keyed(running.channel, key) for key in keys)
        folder, own = write_adapter(tmp_path / "upper"), write_adapter(tmp_path / "own", seed=1)
        digest = await push(acme, folder, "secret")
        await push(rival, own, "own")
        tag = adapter_pb2.Tag(
            name="tenants/-/adapters/secret/tags/prod", versions=[adapter_pb2.WeightedVersion(digest=digest)]
        )
        await acme.adapters.SetTag(adapter_pb2.SetTagRequest(tag=tag))
        upload = await create(acme, own, "secret")
        theirs = Names(
            tenant="acme",
            adapter_id="secret",
            tag="prod",
            digest=digest,
            upload_id=upload.name.rpartition("/")[2],
            folder=folder,
        )
        nobodys = Names(
            tenant="emca",
            adapter_id="terces",
            tag="dorp",
            digest="0f" * 32,
            upload_id="f" * len(theirs.upload_id),
            folder=folder,
        )
        await acme.generation.Generate(asked(adapter="secret"))
        running.engine.gate.clear()
        call = acme.generation.GenerateStream(asked(adapter="secret"))
        await anext(aiter(call))
        yield Stranger(running=running, acme=acme, rival=rival, theirs=theirs, nobodys=nobodys)
        running.engine.gate.set()
        call.cancel()


async def create(caller: Keyed, folder: Path, adapter_id: str) -> adapter_pb2.Upload:
    return await caller.adapters.CreateUpload(
        adapter_pb2.CreateUploadRequest(parent="tenants/-", adapter_id=adapter_id, files=upload_files(folder))
    )


async def push(caller: Keyed, folder: Path, adapter_id: str) -> str:
    upload = await create(caller, folder, adapter_id)
    await caller.adapters.WriteUpload(write_requests(folder, upload))
    finish = adapter_pb2.FinishUploadRequest(name=upload.name)
    return (await caller.adapters.FinishUpload(finish)).version.digest


async def answer(caller: Keyed, name: str, request: Any) -> Answer:
    """What `caller` gets for a call of the method; of a stream its first message."""
    path = next(path for path in METHODS if path.endswith(f"/{name}"))
    method, data = METHODS[path], request.SerializeToString()
    try:
        if method.client_streaming:
            reply = await caller.channel.stream_unary(path)(iter([data]), metadata=caller.metadata)
        elif method.server_streaming:
            call = caller.channel.unary_stream(path)(data, metadata=caller.metadata)
            reply = await anext(aiter(call))
            call.cancel()
        else:
            reply = await caller.channel.unary_unary(path)(data, metadata=caller.metadata)
    except grpc.aio.AioRpcError as error:
        told = f"{error.details()} {error.initial_metadata()} {error.trailing_metadata()}"
        return Answer(code=error.code(), data=told.encode())
    return Answer(code=Code.OK, data=reply)


def test_every_method_is_called() -> None:
    assert {path.rpartition("/")[2] for path in METHODS} == {*NAMING, *NAMELESS}
    assert len(METHODS) == len(NAMING) + len(NAMELESS)


@pytest.mark.row(28)
async def test_what_another_tenant_has_is_what_nobody_has(stranger: Stranger) -> None:
    """By its full name, and by its ids in the caller's own tenant."""

    async def owned() -> list[Answer]:
        return [
            await answer(stranger.acme, name, NAMING[name](stranger.theirs)) for name in ("GetAdapter", "GetUpload")
        ]

    before = await owned()
    for name, request in NAMING.items():
        told: set[Answer] = set()
        for names in (stranger.theirs, stranger.nobodys):
            for tenant in (names.tenant,) if name in PARENTS else (names.tenant, "rival", "-"):
                got = await answer(stranger.rival, name, request(replace(names, tenant=tenant)))
                told.add(replace(got, data=names.masked(got.data)))
        assert len(told) == 1, name
        (each,) = told
        assert each.code is Code.NOT_FOUND and b"_NOT_FOUND" in each.data, name
    assert await owned() == before


@pytest.mark.row(28)
@pytest.mark.parametrize("what", ["{0.adapter_id}", "{0.adapter_id}@{0.tag}", "{0.adapter_id}@sha256:{0.digest}"])
async def test_warming_finds_what_generating_finds(stranger: Stranger, what: str) -> None:
    """By another tenant's reference in one's own tenant; its parent is compared above."""
    told: set[Answer] = set()
    for names in (stranger.theirs, stranger.nobodys):
        request = adapter_pb2.WarmAdapterRequest(parent="tenants/-", reference=what.format(names))
        got = await answer(stranger.rival, "WarmAdapter", request)
        told.add(replace(got, data=names.masked(got.data)))
    assert {each.code for each in told} == {Code.NOT_FOUND}
    assert len(told) == 1


async def test_the_owner_finds_what_others_do_not(stranger: Stranger) -> None:
    """So that the test above says something: the names are right."""
    stranger.running.engine.gate.set()
    for name, request in NAMING.items():
        got = await answer(stranger.acme, name, request(stranger.theirs))
        assert got.code not in (Code.NOT_FOUND, Code.PERMISSION_DENIED) or name == "ImportAdapter", (name, got)


async def test_what_names_nothing_tells_nothing_of_another_tenant(stranger: Stranger) -> None:
    """Nor what was used last, nor what runs."""
    theirs = stranger.theirs
    listing = adapter_pb2.ListAdaptersRequest(parent="tenants/-", show_deleted=True)
    for name, request in (*NAMELESS.items(), ("ListAdapters", listing)):
        got = await answer(stranger.rival, name, request)
        assert (got.code is Code.OK) == (name != "Drain"), (name, got)
        for trace in (theirs.tenant, theirs.adapter_id, theirs.digest, theirs.upload_id):
            assert trace.encode() not in got.data, name
