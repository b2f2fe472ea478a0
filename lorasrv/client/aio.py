"""The client for programs that keep many generations going at once."""

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

import grpc

from lorasrv.client.errors import error_from_call
from lorasrv.client.messages import (
    CHANNEL_OPTIONS,
    DEFAULT_URL,
    Event,
    Generation,
    Prompt,
    credentials,
    event_of,
    generate_request,
    target_of,
)
from lorasrv.v1 import generation_pb2_grpc


class AsyncClient:
    """Generation only; `Client` has the other verbs, and says what the arguments are. Belongs to one event loop."""

    def __init__(self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._credentials = credentials(api_key)
        target, secure = target_of(url)
        self._channel = (
            grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options=CHANNEL_OPTIONS)
            if secure
            else grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        )
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def generate(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> Generation:
        """As `Client.generate`."""
        request = generate_request(prompt, adapter=adapter, **sampling)
        call = self._generation.Generate(request, timeout=self._timeout_s, metadata=self._credentials)
        try:
            return Generation(await call)
        except grpc.RpcError as error:
            raise error_from_call(error) from None

    async def stream(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> AsyncGenerator[Event, None]:
        """As `Client.stream`; closing the generator or cancelling its task cancels the generation."""
        request = generate_request(prompt, adapter=adapter, **sampling)
        call = self._generation.GenerateStream(request, timeout=self._timeout_s, metadata=self._credentials)
        try:
            async for response in call:
                if (event := event_of(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_from_call(error) from None
        finally:
            call.cancel()
