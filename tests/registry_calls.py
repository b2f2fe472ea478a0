"""Calls that the tests of uploads and registry share, and the innocent neighbour that runs while they misbehave."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapter_folders import write_adapter
from lorasrv.client.messages import upload_files, write_requests
from lorasrv.v1 import adapter_pb2, adapter_pb2_grpc, generation_pb2, generation_pb2_grpc
from running_server import Running

TENANT = "tenants/default"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def stub(running: Running) -> Any:
    return adapter_pb2_grpc.AdapterServiceStub(running.channel)


def name_of(adapter_id: str) -> str:
    return f"{TENANT}/adapters/{adapter_id}"


async def create(adapters: Any, folder: Path, adapter_id: str, **fields: Any) -> adapter_pb2.Upload:
    return await adapters.CreateUpload(
        adapter_pb2.CreateUploadRequest(parent=TENANT, adapter_id=adapter_id, files=upload_files(folder), **fields)
    )


async def send(adapters: Any, folder: Path, upload: adapter_pb2.Upload) -> None:
    if requests := list(write_requests(folder, upload)):
        await adapters.WriteUpload(iter(requests))


def finish(adapters: Any, upload: adapter_pb2.Upload) -> Any:
    return adapters.FinishUpload(adapter_pb2.FinishUploadRequest(name=upload.name))


def get_upload(adapters: Any, upload: adapter_pb2.Upload) -> Any:
    return adapters.GetUpload(adapter_pb2.GetUploadRequest(name=upload.name))


def part(upload: adapter_pb2.Upload, offset: int, data: bytes) -> adapter_pb2.WriteUploadRequest:
    return adapter_pb2.WriteUploadRequest(upload=upload.name, file=WEIGHTS, offset_bytes=offset, data=data)


async def push(adapters: Any, folder: Path, adapter_id: str, **fields: Any) -> str:
    """The digest of the version that is then `latest`."""
    upload = await create(adapters, folder, adapter_id, **fields)
    await send(adapters, folder, upload)
    return (await finish(adapters, upload)).version.digest


def write_raw(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def asked(adapter: str, text: str = "neighbour>", **fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        adapter=[generation_pb2.AdapterRef(name=adapter)],
        text=text,
        sampling=generation_pb2.SamplingParams(seed=5, max_tokens=40),
        **fields,
    )


async def tokens(events: AsyncIterator[generation_pb2.GenerateStreamResponse]) -> list[int]:
    return [token async for event in events for token in event.delta.token_ids]


@asynccontextmanager
async def innocent_neighbour(running: Running, tmp_path: Path) -> AsyncIterator[None]:
    """Runs a good stream while the block is bad: its tokens are those of a run without, and nothing is left behind."""
    generation: Any = generation_pb2_grpc.GenerationServiceStub(running.channel)
    await push(stub(running), write_adapter(tmp_path / "neighbour", seed=99), "neighbour")
    alone = await tokens(aiter(generation.GenerateStream(asked("neighbour"))))
    assert len(alone) > 5
    num_tasks = len(asyncio.all_tasks())
    running.engine.gate.clear()
    events = aiter(generation.GenerateStream(asked("neighbour")))
    seen = [token for _ in range(2) for token in (await anext(events)).delta.token_ids]
    assert 0 < len(seen) < len(alone)
    yield
    running.engine.gate.set()
    assert seen + await tokens(events) == alone
    await nothing_left(running)
    for _ in range(200):
        if len(asyncio.all_tasks()) <= num_tasks:
            break
        await asyncio.sleep(0.005)
    assert len(asyncio.all_tasks()) <= num_tasks, asyncio.all_tasks()


async def nothing_left(running: Running) -> None:
    """No pin, no running request; staged bytes only of uploads that receive, all blobs named: see `Registry.check`."""
    registry = running.server._registry
    for _ in range(200):
        if not registry.num_pins and not running.engine.running:
            break
        await asyncio.sleep(0.005)
    assert registry.num_pins == 0
    assert not running.engine.running
    await asyncio.to_thread(registry.check)
