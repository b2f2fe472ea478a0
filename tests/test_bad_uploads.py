"""Bad uploads over real gRPC: what each gets, that it stays invisible, and that a neighbour never notices."""

import asyncio
import errno
import hashlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapter_files import safetensors_bytes
from adapter_folders import write_adapter
from bad_content import CONTENT, GOOD, arrays, config
from fake_engine import server_config
from lorasrv.client.messages import upload_files
from lorasrv.v1 import adapter_pb2
from lorasrv_adapters.limits import RegistryLimits
from registry_calls import (
    CONFIG,
    TENANT,
    WEIGHTS,
    create,
    finish,
    get_upload,
    innocent_neighbour,
    name_of,
    nothing_left,
    part,
    push,
    send,
    stub,
    write_raw,
)
from running_server import Running, refused, running_server

Code = grpc.StatusCode


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        yield found


@pytest.fixture
def adapters(running: Running) -> Any:
    return stub(running)


def staged(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "data" / "staging").rglob("*") if path.is_file()]


# Adapter content


@pytest.mark.row(*sorted({row for row, *_ in CONTENT}))
async def test_bad_content_is_refused_by_reason_and_leaves_nothing(
    running: Running, adapters: Any, tmp_path: Path
) -> None:
    async with innocent_neighbour(running, tmp_path):
        for row, what, configuration, weights, (code, reason), said in CONTENT:
            folder = write_raw(tmp_path / "bad", {CONFIG: configuration, WEIGHTS: weights})
            upload = await create(adapters, folder, "bad")
            await send(adapters, folder, upload)
            error = await refused(finish(adapters, upload), code, reason, f"row {row}, {what}")
            assert said in str(error.details()), (row, what)
            assert str(tmp_path) not in str(error.details())
            found = await get_upload(adapters, upload)
            assert found.state == adapter_pb2.UPLOAD_STATE_FAILED
            assert reason in {each.reason for each in found.errors}, what
            assert not staged(tmp_path)
        get = adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=name_of("bad")))
        await refused(get, Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_unknown_modules_are_all_named(adapters: Any, tmp_path: Path) -> None:
    names = [f"nope{index}" for index in range(30)]
    folder = write_raw(tmp_path / "bad", {CONFIG: config(target_modules=["q_proj", *names]), WEIGHTS: GOOD})
    upload = await create(adapters, folder, "bad")
    await send(adapters, folder, upload)
    error = await refused(finish(adapters, upload), Code.FAILED_PRECONDITION, "UNSUPPORTED_FEATURE")
    assert all(name in str(error.details()) for name in names)


async def test_many_reasons_fit_a_status_and_all_are_in_the_upload(adapters: Any, tmp_path: Path) -> None:
    changes = {f"unknown_key_{index}_{'x' * 200}": index + 1 for index in range(60)}
    folder = write_raw(tmp_path / "bad", {CONFIG: config(r=0, **changes), WEIGHTS: b""})
    upload = await create(adapters, folder, "bad")
    await send(adapters, folder, upload)
    error = await refused(finish(adapters, upload), Code.INVALID_ARGUMENT, "CONTENT_REFUSED")
    assert sum(len(str(key)) + len(value) for key, value in error.trailing_metadata() or ()) < 8192
    found = await get_upload(adapters, upload)
    assert {each.reason for each in found.errors} == {"MALFORMED_FILE", "INVALID_ADAPTER", "UNSUPPORTED_FEATURE"}
    assert "unknown_key_59" in str(found.errors)


@pytest.mark.row(19)
async def test_an_adapter_of_zeros_is_accepted(adapters: Any, tmp_path: Path) -> None:
    weights = safetensors_bytes(arrays(fill=0.0))
    assert await push(adapters, write_raw(tmp_path / "zeros", {CONFIG: config(), WEIGHTS: weights}), "zeros")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.zip", "../adapter_model.safetensors", "a\0b", ""])
@pytest.mark.row(16, 17)
async def test_other_files_are_refused_when_announced(adapters: Any, tmp_path: Path, name: str) -> None:
    files = upload_files(write_adapter(tmp_path / "x"))
    files[1].name = name
    call = adapters.CreateUpload(adapter_pb2.CreateUploadRequest(parent=TENANT, adapter_id="x", files=files))
    await refused(call, Code.INVALID_ARGUMENT, "INVALID_UPLOAD")


# Uploads


@pytest.mark.row(22)
async def test_a_stream_aborted_midway_resumes_after_a_restart_and_others_expire(tmp_path: Path) -> None:
    settings = replace(server_config(tmp_path / "data"), registry=RegistryLimits(upload_ttl_s=3600))
    folder = write_adapter(tmp_path / "upper", rank=8)
    data = (folder / WEIGHTS).read_bytes()
    async with running_server(tmp_path / "data", settings) as running:
        adapters = stub(running)
        async with innocent_neighbour(running, tmp_path):
            upload = await create(adapters, folder, "upper")
            call = adapters.WriteUpload()
            await call.write(part(upload, 0, data[:1000]))
            while (await get_upload(adapters, upload)).files[1].committed_bytes < 1000:
                await asyncio.sleep(0.005)
            call.cancel()
    async with running_server(tmp_path / "data", settings) as running:
        adapters = stub(running)
        upload = await get_upload(adapters, upload)
        assert upload.files[1].committed_bytes == 1000
        await send(adapters, folder, upload)
        assert (await finish(adapters, upload)).state == adapter_pb2.UPLOAD_STATE_PUBLISHED
        other = write_adapter(tmp_path / "other", seed=3)
        abandoned = await create(adapters, other, "other", request_id="a")
        await adapters.WriteUpload(iter([part(abandoned, 0, b"x" * 100)]))
        registry = running.server._registry
        registry.uploads._clock = lambda: time.time() + 3601
        await asyncio.to_thread(registry.reap)
        await refused(get_upload(adapters, abandoned), Code.NOT_FOUND, "UPLOAD_NOT_FOUND")
        assert not staged(tmp_path)
        assert (await create(adapters, other, "other", request_id="a")).name != abandoned.name
        await nothing_left(running)


async def test_a_cancelled_upload_is_over(running: Running, adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    async with innocent_neighbour(running, tmp_path):
        upload = await create(adapters, folder, "upper")
        open_stream = adapters.WriteUpload()
        await open_stream.write(part(upload, 0, b"x" * 100))
        get = adapter_pb2.GetUploadRequest(name=upload.name)
        # Until the first message is done with: one that a cancel overtakes ends the stream by itself.
        while sum(file.committed_bytes for file in (await adapters.GetUpload(get)).files) < 100:
            await asyncio.sleep(0.005)
        cancel = adapter_pb2.CancelUploadRequest(name=upload.name)
        for _ in range(2):
            assert (await adapters.CancelUpload(cancel)).state == adapter_pb2.UPLOAD_STATE_CANCELLED
        assert not staged(tmp_path)
        await open_stream.write(part(upload, 100, b"y"))
        await refused(open_stream, Code.FAILED_PRECONDITION, "UPLOAD_NOT_RECEIVING")
        await refused(finish(adapters, upload), Code.FAILED_PRECONDITION, "UPLOAD_NOT_RECEIVING")
        published = await create(adapters, folder, "upper")
        await send(adapters, folder, published)
        await finish(adapters, published)
        call = adapters.CancelUpload(adapter_pb2.CancelUploadRequest(name=published.name))
        await refused(call, Code.FAILED_PRECONDITION, "UPLOAD_NOT_RECEIVING")


@pytest.mark.row(25)
async def test_bytes_are_skipped_for_what_the_tenant_has_and_only_if_it_is_in_order(
    running: Running, adapters: Any, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "upper")
    async with innocent_neighbour(running, tmp_path):
        digest = await push(adapters, folder, "upper")
        again = await create(adapters, folder, "twin")
        assert [file.committed_bytes for file in again.files] == [file.size_bytes for file in again.files]
        assert (await finish(adapters, again)).version.digest == digest
        blob = running.server._registry.blobs.path(hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
        damaged = bytearray(blob.read_bytes())
        damaged[-1] ^= 1
        blob.write_bytes(damaged)
        again = await create(adapters, folder, "third")
        assert again.files[1].committed_bytes == 0
        await send(adapters, folder, again)
        await finish(adapters, again)
        assert blob.read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.row(29)
async def test_a_quota_passed_midstream_ends_the_stream_at_once(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"a{seed}", rank=8, seed=seed) for seed in range(3)]
    neighbour = write_adapter(tmp_path / "size", seed=99)
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    room = size + sum(path.stat().st_size for path in neighbour.iterdir())
    settings = replace(server_config(tmp_path / "data"), registry=RegistryLimits(tenant_bytes=room + 500))
    async with running_server(tmp_path / "data", settings) as running:
        adapters = stub(running)
        async with innocent_neighbour(running, tmp_path):
            first, second = [await create(adapters, folder, "upper") for folder in folders[:2]]
            await send(adapters, folders[0], first)
            open_stream = adapters.WriteUpload()
            await open_stream.write(part(second, 0, b"x" * 501))
            await refused(open_stream, Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            assert sum(file.committed_bytes for file in (await get_upload(adapters, second)).files) == 0
            await finish(adapters, first)
            await refused(create(adapters, folders[2], "third"), Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            # Deleted bytes are kept, so they count; purged ones do not.
            await adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name_of("upper")))
            await refused(create(adapters, folders[2], "third"), Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            await adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name_of("upper"), purge=True))
            assert await push(adapters, folders[2], "third")


@pytest.mark.row(30)
async def test_a_full_disk_is_told_and_its_space_given_back(
    running: Running, adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "upper", rank=8)
    data = (folder / WEIGHTS).read_bytes()
    async with innocent_neighbour(running, tmp_path):
        upload = await create(adapters, folder, "upper")
        await adapters.WriteUpload(iter([part(upload, 0, data[:1000])]))
        staging = running.server._registry._staging

        def full(upload_id: str, name: str, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

        with monkeypatch.context() as patch:
            patch.setattr(staging, "append", full)
            call = adapters.WriteUpload(iter([part(upload, 1000, data[1000:2000])]))
            error = await refused(call, Code.RESOURCE_EXHAUSTED, "STORAGE_FULL")
        assert str(tmp_path) not in str(error.details())
        assert not staged(tmp_path)
        upload = await get_upload(adapters, upload)
        assert [file.committed_bytes for file in upload.files] == [0, 0]
        await send(adapters, folder, upload)
        assert (await finish(adapters, upload)).state == adapter_pb2.UPLOAD_STATE_PUBLISHED


@pytest.mark.row(20)
async def test_more_bytes_than_announced_are_refused(running: Running, adapters: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    data = (folder / WEIGHTS).read_bytes()
    async with innocent_neighbour(running, tmp_path):
        upload = await create(adapters, folder, "upper")
        await adapters.WriteUpload(iter([part(upload, 0, data[:1000])]))
        call = adapters.WriteUpload(iter([part(upload, 1000, data[1000:] + b"x")]))
        error = await refused(call, Code.INVALID_ARGUMENT, "INVALID_UPLOAD")
        assert f"byte {len(data) + 1} is past the size of {len(data)}" in str(error.details())
        await send(adapters, folder, await get_upload(adapters, upload))
        await finish(adapters, upload)
