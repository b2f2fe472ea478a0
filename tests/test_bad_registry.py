"""Bad calls to the registry over real gRPC: replays, races, strangers, damage, forged tokens, and sources to import."""

import asyncio
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from adapter_folders import write_adapter
from fake_engine import BASE_MODEL, server_config
from lorasrv.client.messages import upload_files
from lorasrv.errors import AdapterCorrupt
from lorasrv.types import EngineRequest, Tier
from lorasrv.v1 import adapter_pb2, generation_pb2_grpc
from lorasrv_adapters.limits import RegistryLimits
from registry_calls import (
    CONFIG,
    TENANT,
    WEIGHTS,
    asked,
    create,
    finish,
    get_upload,
    innocent_neighbour,
    name_of,
    nothing_left,
    push,
    send,
    stub,
    tokens,
)
from running_server import Running, refused, running_server

Code = grpc.StatusCode
UPPER = name_of("upper")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    limits = RegistryLimits(pinned_adapters=2, import_root=tmp_path / "imports")
    async with running_server(tmp_path / "data", replace(server_config(tmp_path / "data"), registry=limits)) as found:
        yield found


@pytest.fixture
def adapters(running: Running) -> Any:
    return stub(running)


@pytest.fixture
def generation(running: Running) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(running.channel)


def get(adapters: Any, name: str = UPPER, **fields: Any) -> Any:
    return adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=name, **fields))


def delete(adapters: Any, name: str = UPPER, **fields: Any) -> Any:
    return adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name, **fields))


def set_tag(adapters: Any, tag: str, *digests: str, **fields: Any) -> Any:
    versions = [adapter_pb2.WeightedVersion(digest=digest) for digest in digests]
    wanted = adapter_pb2.Tag(name=f"{UPPER}/tags/{tag}", versions=versions)
    return adapters.SetTag(adapter_pb2.SetTagRequest(tag=wanted, **fields))


def update(adapters: Any, paths: list[str] | None = None, **fields: Any) -> Any:
    etag, request_id = fields.pop("etag", ""), fields.pop("request_id", "")
    request = adapter_pb2.UpdateAdapterRequest(
        adapter=adapter_pb2.Adapter(name=UPPER, etag=etag, **fields),
        update_mask=FieldMask(paths=paths or []),
        request_id=request_id,
    )
    return adapters.UpdateAdapter(request)


def delete_version(adapters: Any, digest: str, **fields: Any) -> Any:
    return adapters.DeleteVersion(adapter_pb2.DeleteVersionRequest(name=f"{UPPER}/versions/{digest}", **fields))


@pytest.mark.row(24)
async def test_a_write_sent_again_gets_its_first_result(running: Running, adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    async with innocent_neighbour(running, tmp_path):
        upload = await create(adapters, folder, "upper", request_id="a-1", create_only=True)
        assert await create(adapters, folder, "upper", request_id="a-1", create_only=True) == upload
        await send(adapters, folder, upload)
        digest = (await finish(adapters, upload)).version.digest
        # Create-only a second time, but the same request: the same upload.
        again = await create(adapters, folder, "upper", request_id="a-1", create_only=True)
        assert (again.name, again.state) == (upload.name, adapter_pb2.UPLOAD_STATE_PUBLISHED)
        await refused(create(adapters, folder, "other", request_id="a-1"), Code.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        for bad in ("a b", "x" * 129, "a\0"):
            await refused(create(adapters, folder, "upper", request_id=bad), Code.INVALID_ARGUMENT, "INVALID_FIELD")

        changed = await update(adapters, labels={"stage": "one"}, request_id="u-1")
        await update(adapters, labels={"stage": "two"})
        assert await update(adapters, labels={"stage": "one"}, request_id="u-1") == changed
        assert dict((await get(adapters)).labels) == {"stage": "two"}

        await set_tag(adapters, "prod", digest, request_id="t-1")
        await adapters.DeleteTag(adapter_pb2.DeleteTagRequest(name=f"{UPPER}/tags/prod", request_id="t-2"))
        await set_tag(adapters, "prod", digest, request_id="t-1")
        await adapters.DeleteTag(adapter_pb2.DeleteTagRequest(name=f"{UPPER}/tags/prod", request_id="t-2"))
        assert "prod" not in (await get(adapters)).tags

        deleted = await delete(adapters, request_id="d-1")
        undelete = adapter_pb2.UndeleteAdapterRequest(name=UPPER)
        await adapters.UndeleteAdapter(undelete)
        assert await delete(adapters, request_id="d-1") == deleted
        await get(adapters)
        await refused(adapters.UndeleteAdapter(undelete), Code.ALREADY_EXISTS, "ADAPTER_EXISTS")


@pytest.mark.row(24)
async def test_replays_outlive_a_restart_but_not_a_day(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    async with running_server(tmp_path / "data") as running:
        await push(stub(running), folder, "upper")
        changed = await update(stub(running), labels={"a": "1"}, request_id="u-1")
        await update(stub(running), labels={"a": "2"})
    async with running_server(tmp_path / "data") as running:
        assert await update(stub(running), labels={"a": "1"}, request_id="u-1") == changed
        assert dict((await get(stub(running))).labels) == {"a": "2"}
        clock = running.server._registry._replays._clock
        running.server._registry._replays._clock = lambda: clock() + 24 * 3600
        await update(stub(running), labels={"a": "1"}, request_id="u-1")
        assert dict((await get(stub(running))).labels) == {"a": "1"}


@pytest.mark.row(26)
async def test_names_that_are_taken_and_things_that_are_held(running: Running, adapters: Any, tmp_path: Path) -> None:
    first, second = (write_adapter(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    async with innocent_neighbour(running, tmp_path):
        racing = await create(adapters, second, "upper", create_only=True)
        digest = await push(adapters, first, "upper", create_only=True)
        call = create(adapters, second, "upper", create_only=True)
        await refused(call, Code.ALREADY_EXISTS, "ADAPTER_EXISTS")
        await send(adapters, second, racing)
        await refused(finish(adapters, racing), Code.ALREADY_EXISTS, "ADAPTER_EXISTS")
        assert (await get(adapters)).tags["latest"] == digest

        etag = (await get(adapters)).etag
        assert (await get(adapters)).etag == etag
        await update(adapters, annotations={"note": "x"}, etag=etag)
        for stale in (
            update(adapters, labels={"a": "b"}, etag=etag),
            delete(adapters, etag=etag),
            set_tag(adapters, "prod", digest, etag=etag),
        ):
            await refused(stale, Code.ABORTED, "STALE_ETAG")

        await refused(delete_version(adapters, digest), Code.FAILED_PRECONDITION, "VERSION_TAGGED")
        await push(adapters, second, "upper")
        await set_tag(adapters, "prod", digest)
        await refused(delete_version(adapters, digest), Code.FAILED_PRECONDITION, "VERSION_TAGGED")
        await adapters.DeleteTag(adapter_pb2.DeleteTagRequest(name=f"{UPPER}/tags/prod"))
        await delete_version(adapters, digest)
        await refused(delete_version(adapters, digest), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")

        await adapters.PinAdapter(adapter_pb2.PinAdapterRequest(name=UPPER))
        await refused(delete(adapters), Code.FAILED_PRECONDITION, "ADAPTER_PINNED")
        await adapters.PinAdapter(adapter_pb2.PinAdapterRequest(name=name_of("neighbour")))
        await push(adapters, first, "third")
        third = adapters.PinAdapter(adapter_pb2.PinAdapterRequest(name=name_of("third")))
        await refused(third, Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        await adapters.UnpinAdapter(adapter_pb2.UnpinAdapterRequest(name=UPPER))
        await delete(adapters)
        call = create(adapters, second, "upper", create_only=True)
        await refused(call, Code.ALREADY_EXISTS, "ADAPTER_EXISTS")


@pytest.mark.row(27)
async def test_bad_fields(running: Running, adapters: Any, tmp_path: Path) -> None:
    async with innocent_neighbour(running, tmp_path):
        digest = await push(adapters, write_adapter(tmp_path / "upper"), "upper")
        invalid = (Code.INVALID_ARGUMENT, "INVALID_FIELD")
        for labels in ({"Key": "x"}, {"a\0": "x"}, {'a"b': "x"}, {"a": "x" * 64}, {"a": "\u0430"}, {"a": "x y"}):
            await refused(update(adapters, labels=labels), *invalid)
            listed = adapter_pb2.ListAdaptersRequest(parent=TENANT, labels=labels)
            await refused(adapters.ListAdapters(listed), *invalid)
        await refused(update(adapters, labels={f"k{i}": "" for i in range(65)}), *invalid)
        await refused(update(adapters, annotations={"a": "x" * (64 << 10)}), *invalid)
        for path in ("tags", "etag", "labels.a", "nope\0"):
            await refused(update(adapters, [path], labels={"a": "b"}), Code.INVALID_ARGUMENT, "INVALID_REQUEST")
        for digests in ((), (digest, digest)):
            await refused(set_tag(adapters, "prod", *digests), Code.INVALID_ARGUMENT, "INVALID_REQUEST")
        await refused(set_tag(adapters, "prod", "f" * 64), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        for tag in ("Prod", "a\0b", "x" * 64, ""):
            await refused(set_tag(adapters, tag, digest), Code.INVALID_ARGUMENT, "INVALID_REFERENCE")
        version = adapter_pb2.GetVersionRequest(name=f"{UPPER}/versions/{digest[:8]}")
        await refused(adapters.GetVersion(version), Code.INVALID_ARGUMENT, "INVALID_REFERENCE")


async def test_weights_that_others_use_look_unused(
    running: Running, adapters: Any, generation: Any, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "upper")
    digest = await push(adapters, folder, "upper")
    await push(adapters, folder, "twin")
    await generation.Generate(asked("twin"))
    assert {each.digest: each.tier for each in (await running.engine.status()).adapters} == {digest: Tier.DEVICE}
    for name, tier, hits in (("upper", adapter_pb2.TIER_DISK, 0), ("twin", adapter_pb2.TIER_DEVICE, 1)):
        (version,) = (await get(adapters, name_of(name))).versions
        assert (version.tier, version.hits, version.HasField("last_use_time")) == (tier, hits, bool(hits))


@pytest.mark.row(32)
async def test_damaged_blobs_are_data_loss_for_their_adapter_alone(
    running: Running, adapters: Any, generation: Any, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "upper")
    registry = running.server._registry

    def load(request: EngineRequest) -> Any:
        assert request.adapter is not None
        if request.adapter.digest == digest:
            return [AdapterCorrupt(f"version {digest}: a blob is damaged")]
        return good(request)

    async def state() -> int:
        name = f"{UPPER}/versions/{digest}"
        return (await adapters.GetVersion(adapter_pb2.GetVersionRequest(name=name))).state

    async with innocent_neighbour(running, tmp_path):
        digest = await push(adapters, folder, "upper")
        good = running.engine.script
        running.engine.script = load
        # Said to be damaged, found in order: not quarantined.
        await refused(generation.Generate(asked("upper")), Code.DATA_LOSS, "ADAPTER_CORRUPT")
        assert await state() == adapter_pb2.VERSION_STATE_READY
        blob = registry.blobs.path(hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
        for damage in (lambda: blob.write_bytes(b"x"), blob.unlink):
            damage()
            await refused(generation.Generate(asked("upper")), Code.DATA_LOSS, "ADAPTER_CORRUPT")
            assert await state() == adapter_pb2.VERSION_STATE_QUARANTINED
            num_asked = len(running.engine.requests)
            error = await refused(generation.Generate(asked("upper")), Code.DATA_LOSS, "VERSION_QUARANTINED")
            assert str(tmp_path) not in str(error.details())
            assert len(running.engine.requests) == num_asked
            await push(adapters, folder, "upper")
            assert await state() == adapter_pb2.VERSION_STATE_READY
        running.engine.script = good
    await generation.Generate(asked("upper"))


@pytest.mark.row(32, 34)
async def test_a_download_is_whole_or_data_loss(running: Running, adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper", rank=64)
    async with innocent_neighbour(running, tmp_path):
        digest = await push(adapters, folder, "upper")
        request = adapter_pb2.DownloadVersionRequest(name=f"{UPPER}/versions/{digest}")
        files: dict[str, bytes] = {}
        announced: dict[str, str] = {}
        async for response in adapters.DownloadVersion(request):
            if response.WhichOneof("content") == "manifest":
                announced = {file.name: file.sha256 for file in response.manifest.files}
            else:
                assert response.chunk.offset_bytes == len(files.get(response.chunk.file, b""))
                files[response.chunk.file] = files.get(response.chunk.file, b"") + response.chunk.data
        assert files == {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        assert announced == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

        # Deleted while it is read: the pin wins.
        call = adapters.DownloadVersion(request)
        events = aiter(call)
        await anext(events)
        await delete(adapters, purge=True)
        assert sum([len(event.chunk.data) async for event in events]) == sum(map(len, files.values()))

        await push(adapters, folder, "upper")
        blob = running.server._registry.blobs.path(announced[WEIGHTS])
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in adapters.DownloadVersion(request):
                pass
        assert caught.value.code() is Code.DATA_LOSS
        version = await adapters.GetVersion(adapter_pb2.GetVersionRequest(name=request.name))
        assert version.state == adapter_pb2.VERSION_STATE_QUARANTINED


@pytest.mark.row(32)
async def test_a_blob_that_went_missing_while_the_server_was_away(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    async with running_server(tmp_path / "data") as running:
        await push(stub(running), folder, "upper")
        blob = running.server._registry.blobs.path(hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
    blob.unlink()
    async with running_server(tmp_path / "data") as running:
        (version,) = (await get(stub(running))).versions
        assert version.state == adapter_pb2.VERSION_STATE_QUARANTINED
        await nothing_left(running)


@pytest.mark.row(12)
async def test_another_base_models_version_is_refused_until_it_is_pushed_again(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    async with running_server(tmp_path / "data") as running:
        digest = await push(stub(running), folder, "upper")
    other = shutil.copytree(BASE_MODEL, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 20000.0
    (other / "config.json").write_text(json.dumps(settings))
    config = server_config(tmp_path / "data")
    config = replace(config, engine=replace(config.engine, model=replace(config.engine.model, path=str(other))))
    async with running_server(tmp_path / "data", config) as running:
        adapters, generation = stub(running), generation_pb2_grpc.GenerationServiceStub(running.channel)
        async with innocent_neighbour(running, tmp_path):
            error = await refused(generation.Generate(asked("upper")), Code.FAILED_PRECONDITION, "BASE_MISMATCH")
            assert "validated against base model" in str(error.details())
            (version,) = (await get(adapters)).versions
            assert (version.digest, version.state) == (digest, adapter_pb2.VERSION_STATE_INCOMPATIBLE)
            assert await push(adapters, folder, "upper") == digest
        assert (await generation.Generate(asked("upper"))).started.version_digest == digest


@pytest.mark.row(33)
async def test_a_locked_catalogue_is_told_and_streams_go_on(running: Running, adapters: Any, tmp_path: Path) -> None:
    async with innocent_neighbour(running, tmp_path):
        await push(adapters, write_adapter(tmp_path / "upper"), "upper")
        running.server._registry._catalogue._database._db.execute("PRAGMA busy_timeout=50")
        with sqlite3.connect(tmp_path / "data" / "catalogue.sqlite3", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            error = await refused(update(adapters, labels={"a": "b"}), Code.UNAVAILABLE, "REGISTRY_UNAVAILABLE")
            assert str(tmp_path) not in str(error.details())
            other.execute("ROLLBACK")
        other.close()
        assert dict((await update(adapters, labels={"a": "b"})).labels) == {"a": "b"}


@pytest.mark.row(35)
async def test_forged_and_stale_page_tokens(running: Running, adapters: Any, tmp_path: Path) -> None:
    async with innocent_neighbour(running, tmp_path):
        for seed in range(3):
            digest = await push(adapters, write_adapter(tmp_path / "x", seed=seed), "upper")
            await set_tag(adapters, f"t{seed}", digest)
        lists: list[tuple[Any, Any, dict[str, Any]]] = [
            (adapters.ListAdapters, adapter_pb2.ListAdaptersRequest, {"parent": TENANT}),
            (adapters.ListVersions, adapter_pb2.ListVersionsRequest, {"parent": UPPER}),
            (adapters.ListTags, adapter_pb2.ListTagsRequest, {"parent": UPPER}),
        ]
        given = [(await method(kind(**fields, page_size=1))).next_page_token for method, kind, fields in lists]
        assert all(given)
        for index, (method, kind, fields) in enumerate(lists):
            others = [token for other, token in enumerate(given) if other != index]
            turned = ("B" if given[index][0] == "A" else "A") + given[index][1:]
            for bad in ("x", "AAAA", "\u0430", turned, given[index][:-4], *others):
                call = method(kind(**fields, page_size=1, page_token=bad))
                await refused(call, Code.INVALID_ARGUMENT, "INVALID_PAGE", bad)
            await refused(method(kind(**fields, page_size=-1)), Code.INVALID_ARGUMENT, "INVALID_PAGE")
            await method(kind(**fields, page_size=1, page_token=given[index]))
        filtered = adapter_pb2.ListAdaptersRequest(parent=TENANT, name_prefix="u", page_token=given[0])
        await refused(adapters.ListAdapters(filtered), Code.INVALID_ARGUMENT, "INVALID_PAGE")


async def test_pages_and_filters_list_everything_once(adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "x")
    names = ["a1", "a2", "b1", "upper"]
    for name in names:
        await push(adapters, folder, name)
    await update(adapters, labels={"team/x": "one", "env": ""})

    async def listed(**fields: Any) -> list[str]:
        found: list[str] = []
        request = adapter_pb2.ListAdaptersRequest(parent=TENANT, page_size=1, **fields)
        while True:
            page = await adapters.ListAdapters(request)
            found += [adapter.adapter_id for adapter in page.adapters]
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    assert await listed() == names
    assert await listed(name_prefix="a") == ["a1", "a2"]
    assert await listed(labels={"team/x": "one"}) == await listed(labels={"team/x": "one", "env": ""}) == ["upper"]
    assert await listed(labels={"team/x": "two"}) == []
    await delete(adapters, name_of("a1"))
    assert await listed(name_prefix="a") == ["a2"]
    assert await listed(name_prefix="a", show_deleted=True) == ["a1", "a2"]


@pytest.mark.row(56)
async def test_tag_moved_and_version_deleted_while_streams_run(
    running: Running, adapters: Any, generation: Any, tmp_path: Path
) -> None:
    count = 20
    old = await push(adapters, write_adapter(tmp_path / "old", seed=0), "upper")
    running.engine.gate.clear()
    streams = [aiter(generation.GenerateStream(asked("upper"))) for _ in range(count)]
    assert {(await anext(stream)).started.version_digest for stream in streams} == {old}
    new = await push(adapters, write_adapter(tmp_path / "new", seed=1), "upper")
    await delete_version(adapters, old)
    assert running.server._registry.num_pins == count
    assert running.server._registry.blobs.has(old)
    later = await anext(aiter(generation.GenerateStream(asked("upper"))))
    assert later.started.version_digest == new
    await refused(generation.Generate(asked(f"upper@sha256:{old}")), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    running.engine.gate.set()
    answers = [await tokens(stream) for stream in streams]
    assert len(answers[0]) > 5
    assert answers == [answers[0]] * count
    asked_for = [request.adapter.digest for request in running.engine.requests if request.adapter is not None]
    assert asked_for == [old] * count + [new]
    await nothing_left(running)
    assert not running.server._registry.blobs.has(old)


# Imports


def import_folder(adapters: Any, source: str, **fields: Any) -> Any:
    request = adapter_pb2.ImportAdapterRequest(parent=TENANT, adapter_id="upper", source=source, **fields)
    return adapters.ImportAdapter(request)


@pytest.mark.row(36)
async def test_only_plain_folders_below_the_tenants_own_are_imported(
    running: Running, adapters: Any, tmp_path: Path
) -> None:
    own = tmp_path / "imports" / "default"
    folder = write_adapter(own / "runs" / "upper")
    outside = write_adapter(tmp_path / "outside")
    write_adapter(tmp_path / "imports" / "rival" / "secret")
    (own / "link").symlink_to(outside)
    (own / "up").symlink_to(tmp_path / "imports")
    write_adapter(own / "linked-file")
    (own / "linked-file" / WEIGHTS).unlink()
    (own / "linked-file" / WEIGHTS).symlink_to(outside / WEIGHTS)
    write_adapter(own / "pipe")
    (own / "pipe" / WEIGHTS).unlink()
    os.mkfifo(own / "pipe" / WEIGHTS)
    sources = [
        "http://169.254.169.254/latest/meta-data",
        "https://example.com/redirect",
        "file:///etc",
        "s3://bucket/a",
        "169.254.169.254:80",
        str(outside),
        "/etc",
        "../rival/secret",
        "runs/../../rival/secret",
        "./runs/upper",
        "runs//upper",
        "link",
        "up/rival/secret",
        "linked-file",
        "pipe",
        "runs/upper/" + CONFIG,
        "a\0b",
        "",
    ]
    async with innocent_neighbour(running, tmp_path):
        for source in sources:
            error = await refused(import_folder(adapters, source), Code.PERMISSION_DENIED, "IMPORT_REFUSED", source)
            assert str(own) not in str(error.details())
        for missing in ("runs/nope", "runs"):
            await refused(import_folder(adapters, missing), Code.INVALID_ARGUMENT, "INVALID_UPLOAD", missing)
        imported = await import_folder(adapters, "runs/upper", request_id="i-1")
        assert imported.state == adapter_pb2.UPLOAD_STATE_PUBLISHED
        (folder / CONFIG).unlink()
        assert await import_folder(adapters, "runs/upper", request_id="i-1") == imported
        await refused(import_folder(adapters, "runs/upper"), Code.INVALID_ARGUMENT, "INVALID_UPLOAD")
    uploads = [file.sha256 for file in upload_files(outside)]
    assert {file.sha256 for file in imported.files} == set(uploads)
    assert (await get_upload(adapters, imported)).version == imported.version


@pytest.mark.row(36)
async def test_without_an_import_root_nothing_is_imported(tmp_path: Path) -> None:
    async with running_server(tmp_path / "data") as running:
        await refused(import_folder(stub(running), "runs/upper"), Code.PERMISSION_DENIED, "IMPORT_REFUSED")


async def test_an_import_that_fails_leaves_nothing(running: Running, adapters: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "imports" / "default" / "bad", r=0)
    await refused(import_folder(adapters, "bad"), Code.INVALID_ARGUMENT, "INVALID_ADAPTER")
    assert not list((tmp_path / "data" / "staging").iterdir())
    await asyncio.to_thread(running.server._registry.check)
