"""AdapterService: convert, ask the registry in a worker thread, convert."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from lorasrv.engine.client import Engine
from lorasrv.errors import EngineUnavailable, InvalidRequest
from lorasrv.server import convert
from lorasrv.server.access import current_caller
from lorasrv.server.seen import SeenVersions
from lorasrv.types import Tier
from lorasrv.v1 import adapter_pb2, adapter_pb2_grpc
from lorasrv_adapters.errors import AdapterNotFound, UploadNotFound, quote
from lorasrv_adapters.records import Upload
from lorasrv_adapters.reference import parse_adapter_name, parse_tenant_name, parse_upload_name, tenant_name
from lorasrv_adapters.registry import Registry
from lorasrv_adapters.uploads import UploadWriter

Context = grpc.aio.ServicerContext[Any, Any]
P = ParamSpec("P")
T = TypeVar("T")


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """Every call is of its caller's tenant, which names may write as `-`; what other tenants have is not found."""

    def __init__(self, registry: Registry, engine: Engine, seen: SeenVersions, workers: Executor) -> None:
        self._registry = registry
        self._engine = engine
        self._seen = seen
        self._workers = workers

    @property
    def _tenant(self) -> str:
        return current_caller().tenant

    async def CreateUpload(self, request: adapter_pb2.CreateUploadRequest, context: Context) -> adapter_pb2.Upload:
        tenant = self._parent(request.parent)
        files = convert.upload_files(request.files)
        return convert.upload(await self._run(self._registry.create_upload, tenant, request.adapter_id, files))

    async def WriteUpload(
        self, request_iterator: AsyncIterator[adapter_pb2.WriteUploadRequest], context: Context
    ) -> adapter_pb2.Upload:
        upload_name, file, writer = "", "", None
        async for message in request_iterator:
            wanted = (message.upload or upload_name, message.file or file)
            if writer is None or wanted != (upload_name, file):
                upload_name, file = wanted
                writer = await self._open_writer(upload_name, file)
            await self._run(writer.write, message.offset_bytes, message.data)
        if writer is None:
            raise InvalidRequest("upload", "the stream had no message; the first one names upload and file")
        return convert.upload(await self._get_upload(upload_name))

    async def GetUpload(self, request: adapter_pb2.GetUploadRequest, context: Context) -> adapter_pb2.Upload:
        return convert.upload(await self._get_upload(request.name))

    async def FinishUpload(self, request: adapter_pb2.FinishUploadRequest, context: Context) -> adapter_pb2.Upload:
        tenant, upload_id = self._upload(request.name)
        return convert.upload(await self._run(self._registry.finish_upload, tenant, upload_id))

    async def GetAdapter(self, request: adapter_pb2.GetAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        tenant, adapter_id = self._adapter(request.name)
        found = await self._run(self._registry.get_adapter, tenant, adapter_id)
        return convert.adapter(found, await self._tiers())

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        tenant = self._parent(request.parent)
        page = await self._run(self._registry.list_adapters, tenant, request.page_size, request.page_token or None)
        tiers = await self._tiers()
        return adapter_pb2.ListAdaptersResponse(
            adapters=[convert.adapter(each, tiers) for each in page.adapters],
            next_page_token=page.next_page_token or "",
        )

    async def DeleteAdapter(self, request: adapter_pb2.DeleteAdapterRequest, context: Context) -> Empty:
        tenant, adapter_id = self._adapter(request.name)
        await self._run(self._registry.delete_adapter, tenant, adapter_id)
        return Empty()

    async def _open_writer(self, upload_name: str, file: str) -> UploadWriter:
        tenant, upload_id = self._upload(upload_name)
        return await self._run(self._registry.open_writer, tenant, upload_id, file)

    async def _get_upload(self, name: str) -> Upload:
        tenant, upload_id = self._upload(name)
        return await self._run(self._registry.get_upload, tenant, upload_id)

    async def _tiers(self) -> dict[str, Tier]:
        try:
            status = await self._engine.status()
        except EngineUnavailable:
            # Without an engine every version is on disk only.
            return {}
        return {
            adapter.digest: adapter.tier
            for adapter in status.adapters
            if self._seen.name(self._tenant, adapter.digest) is not None
        }

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._workers.submit(function, *args, **kwargs))

    def _full(self, name: str) -> str:
        """The name with the caller's tenant in the place of `-`."""
        own, _, rest = name.partition("/-")
        return f"{tenant_name(self._tenant)}{rest}" if own == "tenants" and rest[:1] in ("", "/") else name

    def _parent(self, name: str) -> str:
        tenant = parse_tenant_name(self._full(name))
        if tenant != self._tenant:
            raise AdapterNotFound(f"tenant {quote(tenant)} not found")
        return tenant

    def _adapter(self, name: str) -> tuple[str, str]:
        tenant, adapter_id = parse_adapter_name(self._full(name))
        if tenant != self._tenant:
            raise AdapterNotFound(f"adapter {quote(adapter_id)} not found")
        return tenant, adapter_id

    def _upload(self, name: str) -> tuple[str, str]:
        tenant, upload_id = parse_upload_name(self._full(name))
        if tenant != self._tenant:
            raise UploadNotFound(f"upload {quote(upload_id)} not found")
        return tenant, upload_id
