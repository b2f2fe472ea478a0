"""AdapterService: convert, ask the registry in a worker thread, convert."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

import grpc
from google.protobuf.empty_pb2 import Empty

from lorasrv.engine.client import Engine
from lorasrv.errors import EngineUnavailable, InvalidRequest
from lorasrv.server import names, resources
from lorasrv.server.convert import deadline_s
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.types import AdapterResidency
from lorasrv.v1 import adapter_pb2, adapter_pb2_grpc
from lorasrv_adapters.downloads import Download
from lorasrv_adapters.errors import quote
from lorasrv_adapters.records import Adapter, Tag, Upload, VersionUse
from lorasrv_adapters.registry import Registry
from lorasrv_adapters.upload_writer import UploadWriter

Context = grpc.aio.ServicerContext[Any, Any]
P = ParamSpec("P")
T = TypeVar("T")

CHANGEABLE = ("labels", "annotations")
# So that registry workers are left for all else: a version may take seconds to read.
MAX_VERIFYING = 1


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """Every call is of its caller's tenant, which names may write as `-`; what other tenants have is not found."""

    def __init__(self, registry: Registry, engine: Engine, desk: FrontDesk, workers: Executor) -> None:
        self._registry = registry
        self._engine = engine
        self._desk = desk
        self._workers = workers
        self._verifying = asyncio.Semaphore(MAX_VERIFYING)

    async def CreateUpload(self, request: adapter_pb2.CreateUploadRequest, context: Context) -> adapter_pb2.Upload:
        tenant = names.own_tenant(request.parent)
        created = await self._run(
            self._registry.uploads.create,
            tenant,
            request.adapter_id,
            resources.upload_files(request.files),
            create_only=request.create_only,
            request_id=request.request_id or None,
        )
        return await self._upload_message(created)

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
        return await self._get_upload(upload_name)

    async def GetUpload(self, request: adapter_pb2.GetUploadRequest, context: Context) -> adapter_pb2.Upload:
        return await self._get_upload(request.name)

    async def FinishUpload(self, request: adapter_pb2.FinishUploadRequest, context: Context) -> adapter_pb2.Upload:
        tenant, upload_id = names.own_upload(request.name)
        return await self._upload_message(await self._run(self._registry.uploads.finish, tenant, upload_id))

    async def CancelUpload(self, request: adapter_pb2.CancelUploadRequest, context: Context) -> adapter_pb2.Upload:
        tenant, upload_id = names.own_upload(request.name)
        return await self._upload_message(await self._run(self._registry.uploads.cancel, tenant, upload_id))

    async def ImportAdapter(self, request: adapter_pb2.ImportAdapterRequest, context: Context) -> adapter_pb2.Upload:
        tenant = names.own_tenant(request.parent)
        imported = await self._run(
            self._registry.uploads.import_folder,
            tenant,
            request.adapter_id,
            request.source,
            create_only=request.create_only,
            request_id=request.request_id or None,
        )
        return await self._upload_message(imported)

    async def GetAdapter(self, request: adapter_pb2.GetAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        tenant, adapter_id = names.own_adapter(request.name)
        get = self._registry.adapters.get
        return await self._adapter_message(await self._run(get, tenant, adapter_id, show_deleted=request.show_deleted))

    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Context
    ) -> adapter_pb2.ListAdaptersResponse:
        tenant = names.own_tenant(request.parent)
        wanted = resources.adapter_filter(request)
        page = await self._run(
            self._registry.adapters.list, tenant, wanted, request.page_size, request.page_token or None
        )
        use = await self._use()
        return adapter_pb2.ListAdaptersResponse(
            adapters=[resources.adapter(each, use) for each in page.adapters],
            next_page_token=page.next_page_token or "",
        )

    async def UpdateAdapter(self, request: adapter_pb2.UpdateAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        tenant, adapter_id = names.own_adapter(request.adapter.name)
        fields = {"labels": dict(request.adapter.labels), "annotations": dict(request.adapter.annotations)}
        paths = list(request.update_mask.paths) or [name for name in CHANGEABLE if fields[name]]
        unknown = [path for path in paths if path not in (*CHANGEABLE, "*")]
        if unknown:
            raise InvalidRequest("update_mask", f"{quote(unknown[0])} is not one of {', '.join(CHANGEABLE)}")
        wanted = CHANGEABLE if "*" in paths else paths
        changed = await self._run(
            self._registry.adapters.update,
            tenant,
            adapter_id,
            labels=fields["labels"] if "labels" in wanted else None,
            annotations=fields["annotations"] if "annotations" in wanted else None,
            etag=request.adapter.etag or None,
            request_id=request.request_id or None,
        )
        return await self._adapter_message(changed)

    async def DeleteAdapter(self, request: adapter_pb2.DeleteAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        tenant, adapter_id = names.own_adapter(request.name)
        deleted = await self._run(
            self._registry.adapters.delete,
            tenant,
            adapter_id,
            purge=request.purge,
            etag=request.etag or None,
            request_id=request.request_id or None,
        )
        return await self._adapter_message(deleted)

    async def UndeleteAdapter(
        self, request: adapter_pb2.UndeleteAdapterRequest, context: Context
    ) -> adapter_pb2.Adapter:
        return await self._change(self._registry.adapters.undelete, request.name, request.request_id)

    async def PinAdapter(self, request: adapter_pb2.PinAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        return await self._change(self._registry.adapters.pin, request.name, request.request_id)

    async def UnpinAdapter(self, request: adapter_pb2.UnpinAdapterRequest, context: Context) -> adapter_pb2.Adapter:
        return await self._change(self._registry.adapters.unpin, request.name, request.request_id)

    async def GetVersion(self, request: adapter_pb2.GetVersionRequest, context: Context) -> adapter_pb2.Version:
        tenant, adapter_id, digest = names.own_version(request.name)
        found = await self._run(self._registry.adapters.version, tenant, adapter_id, digest)
        return resources.version(tenant, adapter_id, found, await self._use())

    async def ListVersions(
        self, request: adapter_pb2.ListVersionsRequest, context: Context
    ) -> adapter_pb2.ListVersionsResponse:
        tenant, adapter_id = names.own_adapter(request.parent)
        page = await self._run(
            self._registry.adapters.versions, tenant, adapter_id, request.page_size, request.page_token or None
        )
        use = await self._use()
        return adapter_pb2.ListVersionsResponse(
            versions=[resources.version(tenant, adapter_id, each, use) for each in page.versions],
            next_page_token=page.next_page_token or "",
        )

    async def DeleteVersion(self, request: adapter_pb2.DeleteVersionRequest, context: Context) -> Empty:
        delete, name = self._registry.adapters.delete_version, names.own_version(request.name)
        await self._run(delete, *name, request_id=request.request_id or None)
        return Empty()

    async def DownloadVersion(
        self, request: adapter_pb2.DownloadVersionRequest, context: Context
    ) -> AsyncGenerator[adapter_pb2.DownloadVersionResponse, None]:
        tenant, adapter_id, digest = names.own_version(request.name)
        async with self._download(tenant, adapter_id, digest) as download:
            version = resources.version(tenant, adapter_id, download.version, await self._use())
            yield adapter_pb2.DownloadVersionResponse(
                manifest=resources.manifest(version, await self._run(download.files))
            )
            while (chunk := await self._run(download.read)) is not None:
                yield resources.chunk(chunk)

    async def VerifyVersion(
        self, request: adapter_pb2.VerifyVersionRequest, context: Context
    ) -> adapter_pb2.VersionManifest:
        tenant, adapter_id, digest = names.own_version(request.name)
        await self._verifying.acquire()
        # A call that is cancelled keeps its place for as long as it keeps its thread.
        loop = asyncio.get_running_loop()
        running = self._workers.submit(self._registry.verify, tenant, adapter_id, digest)
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._verifying.release))
        version, manifest = await asyncio.wrap_future(running)
        return resources.manifest(resources.version(tenant, adapter_id, version, await self._use()), manifest.files)

    async def WarmAdapter(self, request: adapter_pb2.WarmAdapterRequest, context: Context) -> adapter_pb2.Version:
        tenant, tier = names.own_tenant(request.parent), resources.warm_tier(request.tier)
        warmed, reached = await self._desk.warm(tenant, request.reference, tier, deadline_s(context))
        found = await self._run(self._registry.adapters.version, tenant, warmed.adapter_id, warmed.digest)
        there = AdapterResidency(digest=warmed.digest, tier=reached, num_pages=0, pins=0)
        return resources.version(tenant, warmed.adapter_id, found, self._use_of([there]))

    async def SetTag(self, request: adapter_pb2.SetTagRequest, context: Context) -> adapter_pb2.Tag:
        tenant, adapter_id, name = names.own_tag(request.tag.name)
        if len(request.tag.versions) != 1:
            raise InvalidRequest("tag.versions", f"{len(request.tag.versions)} versions; a tag has exactly one")
        (wanted,) = request.tag.versions
        tag = Tag(tag=name, digest=wanted.digest, weight=wanted.weight or 1)
        etag, request_id = request.etag or None, request.request_id or None
        await self._run(self._registry.adapters.set_tag, tenant, adapter_id, tag, etag=etag, request_id=request_id)
        return resources.tag(tenant, adapter_id, tag)

    async def DeleteTag(self, request: adapter_pb2.DeleteTagRequest, context: Context) -> Empty:
        delete, name = self._registry.adapters.delete_tag, names.own_tag(request.name)
        await self._run(delete, *name, request_id=request.request_id or None)
        return Empty()

    async def ListTags(self, request: adapter_pb2.ListTagsRequest, context: Context) -> adapter_pb2.ListTagsResponse:
        tenant, adapter_id = names.own_adapter(request.parent)
        page = await self._run(
            self._registry.adapters.tags, tenant, adapter_id, request.page_size, request.page_token or None
        )
        return adapter_pb2.ListTagsResponse(
            tags=[resources.tag(tenant, adapter_id, each) for each in page.tags],
            next_page_token=page.next_page_token or "",
        )

    async def _change(self, change: Callable[..., Adapter], name: str, request_id: str) -> adapter_pb2.Adapter:
        tenant, adapter_id = names.own_adapter(name)
        return await self._adapter_message(await self._run(change, tenant, adapter_id, request_id=request_id or None))

    async def _open_writer(self, upload_name: str, file: str) -> UploadWriter:
        tenant, upload_id = names.own_upload(upload_name)
        return await self._run(self._registry.uploads.open_writer, tenant, upload_id, file)

    async def _get_upload(self, name: str) -> adapter_pb2.Upload:
        tenant, upload_id = names.own_upload(name)
        return await self._upload_message(await self._run(self._registry.uploads.get, tenant, upload_id))

    @asynccontextmanager
    async def _download(self, tenant: str, adapter_id: str, digest: str) -> AsyncGenerator[Download, None]:
        """A download, closed when the block is left, a call cancelled meanwhile included."""
        opening = self._workers.submit(self._registry.download, tenant, adapter_id, digest)
        try:
            yield await asyncio.shield(asyncio.wrap_future(opening))
        finally:
            await asyncio.shield(asyncio.wrap_future(self._workers.submit(_close, opening)))

    async def _upload_message(self, found: Upload) -> adapter_pb2.Upload:
        return resources.upload(found, await self._use())

    async def _adapter_message(self, found: Adapter) -> adapter_pb2.Adapter:
        return resources.adapter(found, await self._use())

    async def _use(self) -> resources.VersionUse:
        """How versions are used on this replica. Whose weights are loaded for others says nothing to this tenant."""
        try:
            status = await self._engine.status()
        except EngineUnavailable:
            # Without an engine every version is on disk only.
            held: tuple[AdapterResidency, ...] = ()
        else:
            held = status.adapters
        return self._use_of(held)

    def _use_of(self, held: Iterable[AdapterResidency]) -> resources.VersionUse:
        by_digest = {adapter.digest: adapter for adapter in held}

        def use(tenant: str, adapter_id: str, digest: str) -> tuple[AdapterResidency | None, VersionUse | None]:
            used = self._registry.use(tenant, adapter_id, digest)
            return None if used is None else by_digest.get(digest), used

        return use

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._workers.submit(function, *args, **kwargs))


def _close(opening: Future[Download]) -> None:
    if opening.exception() is None:
        opening.result().close()
