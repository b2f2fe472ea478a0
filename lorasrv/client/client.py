"""The client: one object with a method per verb. Loads grpc and protobuf, nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from lorasrv.client.errors import Unavailable, error_from_call
from lorasrv.client.messages import (
    CHANNEL_OPTIONS,
    DEFAULT_URL,
    OWN_TENANT,
    Event,
    Generation,
    Prompt,
    committed_bytes,
    credentials,
    event_of,
    generate_request,
    target_of,
    tokenize_request,
    upload_files,
    write_requests,
)
from lorasrv.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

Progress = Callable[[int, int], None]
PUSH_ATTEMPTS = 3


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
            grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=CHANNEL_OPTIONS)
            if secure
            else grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
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

    def stream(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> Iterator[Event]:
        """One Started, then the Deltas of all samples, each sample's ended by its Finished; these tell their `index`.

        While it waits for long, Queued says how many stand before it.
        Closing the iterator cancels the generation.
        """
        request = generate_request(prompt, adapter=adapter, **sampling)
        with _translated():
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
        request = generation_pb2.DetokenizeRequest(token_ids=token_ids, with_special_tokens=with_special_tokens)
        return self._call(self._generation.Detokenize, request).text

    def push(
        self, folder: str | Path, adapter_id: str | None = None, progress: Progress | None = None
    ) -> adapter_pb2.Version:
        """Upload a PEFT folder and publish it as the adapter's newest version; the id is the folder's name by default.

        Its serving.json, if it has one, says what holds for generations that do not say otherwise.
        A connection that breaks is taken up again at what the server has committed. `progress` is called with the
        bytes sent and the bytes in all. Raises FileNotFoundError too.
        """
        folder = Path(folder)
        request = adapter_pb2.CreateUploadRequest(
            parent=self._tenant,
            adapter_id=folder.resolve().name if adapter_id is None else adapter_id,
            files=upload_files(folder),
        )
        upload: adapter_pb2.Upload = self._call(self._adapters.CreateUpload, request)
        self._write(folder, upload, progress)
        finished = self._call(self._adapters.FinishUpload, adapter_pb2.FinishUploadRequest(name=upload.name))
        return finished.version

    def adapters(self) -> list[adapter_pb2.Adapter]:
        """All adapters, by id."""
        found: list[adapter_pb2.Adapter] = []
        request = adapter_pb2.ListAdaptersRequest(parent=self._tenant, page_size=1000)
        while True:
            page = self._call(self._adapters.ListAdapters, request)
            found += page.adapters
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def adapter(self, adapter_id: str) -> adapter_pb2.Adapter:
        return self._call(self._adapters.GetAdapter, adapter_pb2.GetAdapterRequest(name=self._name(adapter_id)))

    def delete_adapter(self, adapter_id: str) -> None:
        """Running generations keep the version they started with."""
        self._call(self._adapters.DeleteAdapter, adapter_pb2.DeleteAdapterRequest(name=self._name(adapter_id)))

    def status(self) -> server_pb2.ServerStatus:
        return self._call(self._server.GetStatus, server_pb2.GetStatusRequest())

    def watch_status(self, interval_s: float = 1.0) -> Iterator[server_pb2.ServerStatus]:
        """The status now and after each interval, of 0.1 to 60 seconds; without end, also where `timeout_s` is set."""
        request = server_pb2.WatchStatusRequest()
        request.interval.FromMilliseconds(round(interval_s * 1000))
        with _translated():
            call = self._server.WatchStatus(request)
            try:
                yield from call
            finally:
                call.cancel()

    def drain(self) -> int:
        """Let the server admit no more generations, for good; how many are still to finish. Ask again to see."""
        return self._call(self._server.Drain, server_pb2.DrainRequest()).remaining_generations

    def info(self) -> server_pb2.ServerInfo:
        return self._call(self._server.GetServerInfo, server_pb2.GetServerInfoRequest())

    def _write(self, folder: Path, upload: adapter_pb2.Upload, progress: Progress | None) -> None:
        total = sum(file.size_bytes for file in upload.files)
        for attempt in range(PUSH_ATTEMPTS):
            sent = committed_bytes(upload)
            if sent == total:
                return
            requests = _reported(write_requests(folder, upload), sent, total, progress)
            try:
                upload = self._call(self._adapters.WriteUpload, requests)
            except Unavailable:
                if attempt == PUSH_ATTEMPTS - 1:
                    raise
                upload = self._call(self._adapters.GetUpload, adapter_pb2.GetUploadRequest(name=upload.name))

    def _name(self, adapter_id: str) -> str:
        return f"{self._tenant}/adapters/{adapter_id}"

    def _call(self, method: Any, request: Any) -> Any:
        with _translated():
            return method(request, timeout=self._timeout_s, metadata=self._credentials)


def _reported(
    requests: Iterator[adapter_pb2.WriteUploadRequest], sent: int, total: int, progress: Progress | None
) -> Iterator[adapter_pb2.WriteUploadRequest]:
    for request in requests:
        yield request
        sent += len(request.data)
        if progress is not None:
            progress(sent, total)


@contextmanager
def _translated() -> Iterator[None]:
    """grpc's errors as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_call(error) from None
