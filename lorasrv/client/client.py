"""The client: one object with a method per verb. Loads grpc and protobuf, nothing else."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from lorasrv.client.errors import InvalidArgument, NotFound, translated
from lorasrv.client.messages import (
    DEFAULT_URL,
    OWN_TENANT,
    Event,
    Generation,
    Prompt,
    WarmTier,
    channel_options,
    credentials,
    detokenize_request,
    event_of,
    generate_request,
    list_request,
    target_of,
    tokenize_request,
    warm_request,
)
from lorasrv.client.transfer import Progress, default_id, push_folder, receive_folder
from lorasrv.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

RESUME_S = 60.0


class Client:
    """A connection to one server. Every method raises `errors.ClientError`.

        with Client("127.0.0.1:8470") as client:
            client.push("runs/upper", "upper")
            print(client.generate("hello", adapter="upper").text)

    Resources are the protobuf messages of `lorasrv.v1`. `timeout_s` bounds each call; None waits. An https:// URL is
    one of TLS. `api_key` is the one in LORASRV_API_KEY by default; the tenant is the key's.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        tenant: str = OWN_TENANT,
        timeout_s: float | None = None,
    ) -> None:
        self._tenant = f"tenants/{tenant}"
        self._timeout_s = timeout_s
        self._credentials = credentials(api_key)
        target, secure = target_of(url)
        self._channel = (
            grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=channel_options(target))
            if secure
            else grpc.insecure_channel(target, options=channel_options(target))
        )
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters: Any = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._server: Any = server_pb2_grpc.ServerServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> Generation:
        """All samples at once. `adapter` "base" is the base model; `sampling` as in `messages.generate_request`.

        The prompt is text, token ids, or a chat's messages: [{"role": "user", "content": "Hello"}].
        """
        request = generate_request(prompt, adapter=adapter, **sampling)
        return Generation(self._call(self._generation.Generate, request))

    def stream(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> Generator[Event, None, None]:
        """One Started, then the Deltas of all samples, each sample's ended by its Finished; these tell their `index`.

        While it waits for long, Queued says how many stand before it.
        Closing the iterator cancels the generation.
        """
        request = generate_request(prompt, adapter=adapter, **sampling)
        with translated():
            call = self._generation.GenerateStream(request, timeout=self._timeout_s, metadata=self._credentials)
            try:
                for response in call:
                    if (event := event_of(response)) is not None:
                        yield event
            finally:
                call.cancel()

    def tokenize(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        adapter: str = "base",
        with_offsets: bool = False,
        with_text: bool = False,
    ) -> generation_pb2.TokenizeResponse:
        """The tokens that a generation with this text or chat would begin with."""
        request = tokenize_request(prompt, adapter=adapter, with_offsets=with_offsets, with_text=with_text)
        return self._call(self._generation.Tokenize, request)

    def detokenize(self, token_ids: Sequence[int], *, with_special_tokens: bool = False) -> str:
        request = detokenize_request(token_ids, with_special_tokens=with_special_tokens)
        return self._call(self._generation.Detokenize, request).text

    def push(
        self,
        folder: str | Path,
        adapter_id: str | None = None,
        progress: Progress | None = None,
        *,
        create_only: bool = False,
        resume_s: float = RESUME_S,
    ) -> adapter_pb2.Version:
        """Upload a PEFT folder and publish it as the adapter's newest version; the id is the folder's name by default.

        Its serving.json, if it has one, says what holds for generations that do not say otherwise.
        A connection that breaks is taken up again at what the server has committed, until nothing has arrived for
        `resume_s`; so is, within a day, a push that was killed, when the same folder is pushed again. Files that the
        server has of this tenant are not sent. `create_only` refuses a name that is taken. `progress` is called with
        the bytes sent and the bytes in all. Raises FileNotFoundError too.
        """
        folder = Path(folder)
        request = adapter_pb2.CreateUploadRequest(
            parent=self._tenant,
            adapter_id=default_id(folder) if adapter_id is None else adapter_id,
            create_only=create_only,
        )
        return push_folder(self._adapters, self._call, folder, request, progress, resume_s)

    def pull(self, reference: str, folder: str | Path, progress: Progress | None = None) -> adapter_pb2.Version:
        """Write a version's files into a folder that has none of them; every byte is checked.

        Raises FileExistsError too.
        """
        request = adapter_pb2.DownloadVersionRequest(name=self.version(reference).name)
        with translated():
            call = self._adapters.DownloadVersion(request, timeout=self._timeout_s, metadata=self._credentials)
            try:
                return receive_folder(call, Path(folder), progress)
            finally:
                call.cancel()

    def import_adapter(self, source: str, adapter_id: str, *, create_only: bool = False) -> adapter_pb2.Version:
        """Publish a folder on the server's own disk, named relative to this tenant's import folder there."""
        request = adapter_pb2.ImportAdapterRequest(
            parent=self._tenant, adapter_id=adapter_id, source=source, create_only=create_only
        )
        return self._call(self._adapters.ImportAdapter, request).version

    def adapters(
        self, *, name_prefix: str = "", labels: Mapping[str, str] | None = None, show_deleted: bool = False
    ) -> list[adapter_pb2.Adapter]:
        """All adapters, or those whose names begin so and that have all of `labels`, by id."""
        request = list_request(self._tenant, name_prefix, labels, show_deleted)
        return [each for page in self._pages(self._adapters.ListAdapters, request) for each in page.adapters]

    def adapter(self, adapter_id: str, *, show_deleted: bool = False) -> adapter_pb2.Adapter:
        request = adapter_pb2.GetAdapterRequest(name=self._name(adapter_id), show_deleted=show_deleted)
        return self._call(self._adapters.GetAdapter, request)

    def update_adapter(
        self,
        adapter_id: str,
        *,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        etag: str = "",
    ) -> adapter_pb2.Adapter:
        """Replace labels, annotations or both; with an `etag` only if the adapter still has that one."""
        given = {"labels": labels, "annotations": annotations}
        request = adapter_pb2.UpdateAdapterRequest(
            adapter=adapter_pb2.Adapter(name=self._name(adapter_id), labels=labels, annotations=annotations, etag=etag),
            update_mask=FieldMask(paths=[name for name, value in given.items() if value is not None]),
        )
        return self._call(self._adapters.UpdateAdapter, request)

    def delete_adapter(self, adapter_id: str, *, purge: bool = False, etag: str = "") -> adapter_pb2.Adapter:
        """Hide an adapter until it is undeleted or expires; `purge` forgets it now.

        Running generations keep the version they started with.
        """
        request = adapter_pb2.DeleteAdapterRequest(name=self._name(adapter_id), purge=purge, etag=etag)
        return self._call(self._adapters.DeleteAdapter, request)

    def undelete_adapter(self, adapter_id: str) -> adapter_pb2.Adapter:
        return self._call(
            self._adapters.UndeleteAdapter, adapter_pb2.UndeleteAdapterRequest(name=self._name(adapter_id))
        )

    def pin_adapter(self, adapter_id: str) -> adapter_pb2.Adapter:
        """Keep an adapter from deletion."""
        return self._call(self._adapters.PinAdapter, adapter_pb2.PinAdapterRequest(name=self._name(adapter_id)))

    def unpin_adapter(self, adapter_id: str) -> adapter_pb2.Adapter:
        return self._call(self._adapters.UnpinAdapter, adapter_pb2.UnpinAdapterRequest(name=self._name(adapter_id)))

    def version(self, reference: str) -> adapter_pb2.Version:
        """The version that NAME, NAME@TAG or NAME@sha256:HEX means now."""
        name, _, wanted = reference.partition("@")
        adapter = self.adapter(name)
        digest = (
            wanted.removeprefix("sha256:") if wanted.startswith("sha256:") else adapter.tags.get(wanted or "latest")
        )
        found = [version for version in adapter.versions if digest and version.digest.startswith(digest)]
        if not found:
            raise NotFound(f"adapter version {reference!r} not found", reason="ADAPTER_NOT_FOUND")
        if len(found) > 1:
            raise InvalidArgument(
                f"{reference!r} is a prefix of {len(found)} versions; write more digits", reason="INVALID_REFERENCE"
            )
        return found[0]

    def versions(self, adapter_id: str) -> list[adapter_pb2.Version]:
        """Newest first."""
        request = adapter_pb2.ListVersionsRequest(parent=self._name(adapter_id), page_size=1000)
        return [each for page in self._pages(self._adapters.ListVersions, request) for each in page.versions]

    def delete_version(self, reference: str) -> None:
        """Forget an untagged version for good."""
        request = adapter_pb2.DeleteVersionRequest(name=self.version(reference).name)
        self._call(self._adapters.DeleteVersion, request)

    def set_tag(self, reference: str, tag: str) -> adapter_pb2.Tag:
        """Point a tag at the version that `reference` means now."""
        version = self.version(reference)
        name = f"{self._name(reference.partition('@')[0])}/tags/{tag}"
        wanted = adapter_pb2.Tag(name=name, versions=[adapter_pb2.WeightedVersion(digest=version.digest)])
        return self._call(self._adapters.SetTag, adapter_pb2.SetTagRequest(tag=wanted))

    def delete_tag(self, adapter_id: str, tag: str) -> None:
        request = adapter_pb2.DeleteTagRequest(name=f"{self._name(adapter_id)}/tags/{tag}")
        self._call(self._adapters.DeleteTag, request)

    def tags(self, adapter_id: str) -> list[adapter_pb2.Tag]:
        request = adapter_pb2.ListTagsRequest(parent=self._name(adapter_id), page_size=1000)
        return [each for page in self._pages(self._adapters.ListTags, request) for each in page.tags]

    def warm(self, reference: str, tier: WarmTier = "device", *, timeout_s: float | None = None) -> adapter_pb2.Version:
        """Wait until the server has the version that `reference` means now in host memory or on the device; its `tier`
        says where it then was.

        Without `timeout_s` the client's holds, and without that the server's 60 seconds. Nothing keeps the version
        there.
        """
        request = warm_request(self._tenant, reference, tier)
        return self._call(self._adapters.WarmAdapter, request, timeout_s)

    def verify(self, reference: str) -> adapter_pb2.VersionManifest:
        """Have the server read all stored bytes of a version again; its files, when they are what the digest says.

        Raises DataLoss when they are not.
        """
        request = adapter_pb2.VerifyVersionRequest(name=self.version(reference).name)
        return self._call(self._adapters.VerifyVersion, request)

    def status(self) -> server_pb2.ServerStatus:
        return self._call(self._server.GetStatus, server_pb2.GetStatusRequest())

    def watch_status(self, interval_s: float = 1.0) -> Iterator[server_pb2.ServerStatus]:
        """The status now and after each interval, of 0.1 to 60 seconds; without end, also where `timeout_s` is set."""
        request = server_pb2.WatchStatusRequest()
        request.interval.FromMilliseconds(round(interval_s * 1000))
        with translated():
            call = self._server.WatchStatus(request, metadata=self._credentials)
            try:
                yield from call
            finally:
                call.cancel()

    def drain(self) -> int:
        """Let the server admit no more generations, for good; how many are still to finish. Ask again to see."""
        return self._call(self._server.Drain, server_pb2.DrainRequest()).remaining_generations

    def info(self) -> server_pb2.ServerInfo:
        return self._call(self._server.GetServerInfo, server_pb2.GetServerInfoRequest())

    def _pages(self, method: Any, request: Any) -> Iterator[Any]:
        while True:
            page = self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _name(self, adapter_id: str) -> str:
        return f"{self._tenant}/adapters/{adapter_id}"

    def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        with translated():
            timeout_s = self._timeout_s if timeout_s is None else timeout_s
            return method(request, timeout=timeout_s, metadata=self._credentials)
