"""The client for programs that keep many generations going at once."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import grpc

from lorasrv.client.errors import DeadlineExceeded, translated
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
from lorasrv.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

# A server refuses a call beyond the 1024 of a connection, and counts those that it has not quite put away.
MAX_OPEN_CALLS = 768


class AsyncClient:
    """What a service that generates asks for while it runs, by the names of `Client`, which has the other verbs and
    says what the arguments are. Belongs to the event loop that first uses it. Any number of calls may be made at once:
    768 are open at a time, the others wait for their turn, within their time.
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
        self._target, self._secure = target_of(url)
        self._places = asyncio.Semaphore(MAX_OPEN_CALLS)

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        """Made when it is first used: gRPC ties it to the event loop that runs then."""
        options = channel_options(self._target)
        if self._secure:
            return grpc.aio.secure_channel(self._target, grpc.ssl_channel_credentials(), options=options)
        return grpc.aio.insecure_channel(self._target, options=options)

    @cached_property
    def _generation(self) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self._channel)

    @cached_property
    def _adapters(self) -> Any:
        return adapter_pb2_grpc.AdapterServiceStub(self._channel)

    @cached_property
    def _server(self) -> Any:
        return server_pb2_grpc.ServerServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def generate(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> Generation:
        """As `Client.generate`."""
        request = generate_request(prompt, adapter=adapter, **sampling)
        return Generation(await self._call(self._generation.Generate, request))

    async def stream(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> AsyncGenerator[Event, None]:
        """As `Client.stream`; closing the generator or cancelling its task cancels the generation."""
        request = generate_request(prompt, adapter=adapter, **sampling)
        async with self._place(self._timeout_s) as timeout_s:
            call = self._generation.GenerateStream(request, timeout=timeout_s, metadata=self._credentials)
            try:
                with translated():
                    async for response in call:
                        if (event := event_of(response)) is not None:
                            yield event
            finally:
                call.cancel()

    async def tokenize(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        adapter: str = "base",
        with_offsets: bool = False,
        with_text: bool = False,
    ) -> generation_pb2.TokenizeResponse:
        request = tokenize_request(prompt, adapter=adapter, with_offsets=with_offsets, with_text=with_text)
        return await self._call(self._generation.Tokenize, request)

    async def detokenize(self, token_ids: Sequence[int], *, with_special_tokens: bool = False) -> str:
        request = detokenize_request(token_ids, with_special_tokens=with_special_tokens)
        return (await self._call(self._generation.Detokenize, request)).text

    async def adapters(
        self, *, name_prefix: str = "", labels: Mapping[str, str] | None = None, show_deleted: bool = False
    ) -> list[adapter_pb2.Adapter]:
        request = list_request(self._tenant, name_prefix, labels, show_deleted)
        found: list[adapter_pb2.Adapter] = []
        while True:
            page = await self._call(self._adapters.ListAdapters, request)
            found += page.adapters
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def warm(
        self, reference: str, tier: WarmTier = "device", *, timeout_s: float | None = None
    ) -> adapter_pb2.Version:
        """As `Client.warm`; cancelling its task leaves nothing behind on the server."""
        request = warm_request(self._tenant, reference, tier)
        return await self._call(self._adapters.WarmAdapter, request, timeout_s)

    async def status(self) -> server_pb2.ServerStatus:
        return await self._call(self._server.GetStatus, server_pb2.GetStatusRequest())

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        async with self._place(self._timeout_s if timeout_s is None else timeout_s) as left_s:
            with translated():
                return await method(request, timeout=left_s, metadata=self._credentials)

    @asynccontextmanager
    async def _place(self, timeout_s: float | None) -> AsyncGenerator[float | None, None]:
        """One of the calls that may be open, and what is then left of the time. Raises DeadlineExceeded."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._places.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"{MAX_OPEN_CALLS} calls of this client were open for {timeout_s:g} s") from None
        try:
            yield None if timeout_s is None else timeout_s - (time.monotonic() - began_s)
        finally:
            self._places.release()
