"""The client for programs that keep many generations going at once."""

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

import grpc

from lorasrv.client.errors import error_from_call
from lorasrv.client.messages import CHANNEL_OPTIONS, DEFAULT_URL, Event, Prompt, event_of, generate_request, target_of
from lorasrv.v1 import generation_pb2, generation_pb2_grpc


class AsyncClient:
    """Generation only; `Client` has the other verbs. Belongs to one event loop."""

    def __init__(self, url: str = DEFAULT_URL, *, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(target_of(url), options=CHANNEL_OPTIONS)
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def generate(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> generation_pb2.GenerateResponse:
        """As `Client.generate`."""
        request = generate_request(prompt, adapter=adapter, **sampling)
        try:
            return await self._generation.Generate(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise error_from_call(error) from None

    async def stream(self, prompt: Prompt, *, adapter: str, **sampling: Any) -> AsyncGenerator[Event, None]:
        """As `Client.stream`; closing the generator or cancelling its task cancels the generation."""
        request = generate_request(prompt, adapter=adapter, **sampling)
        call = self._generation.GenerateStream(request, timeout=self._timeout_s)
        try:
            async for response in call:
                if (event := event_of(response)) is not None:
                    yield event
        except grpc.RpcError as error:
            raise error_from_call(error) from None
        finally:
            call.cancel()
