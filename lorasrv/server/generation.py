"""GenerationService: convert, ask the front desk, convert."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from lorasrv.requests import Delta, Finished, Started
from lorasrv.server import convert
from lorasrv.server.access import current_caller
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.v1 import generation_pb2, generation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Every call is of its caller's tenant."""

    def __init__(self, desk: FrontDesk) -> None:
        self._desk = desk

    @property
    def _tenant(self) -> str:
        return current_caller().tenant

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse()
        texts: defaultdict[int, list[str]] = defaultdict(list)
        async with aclosing(self._desk.generate(convert.generation_request(request, self._tenant))) as events:
            async for event in events:
                match event:
                    case Started():
                        response.started.CopyFrom(convert.started(event))
                    case Delta():
                        texts[event.index].append(event.text)
                        sample = _sample(response, event.index)
                        sample.token_ids.extend(event.token_ids)
                        sample.logprobs.extend(convert.logprobs(event.logprobs))
                        response.prompt_logprobs.extend(convert.logprobs(event.prompt_logprobs))
                    case Finished():
                        _sample(response, event.index).finished.CopyFrom(convert.finished(event))
        for index, sample in enumerate(response.samples):
            sample.text = "".join(texts[index])
        return response

    async def GenerateStream(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[generation_pb2.GenerateStreamResponse, None]:
        async with aclosing(self._desk.generate(convert.generation_request(request, self._tenant))) as events:
            async for event in events:
                yield convert.stream_response(event)


def _sample(response: generation_pb2.GenerateResponse, index: int) -> generation_pb2.Sample:
    """Sample number `index`, there from now on; the first thing of a sample may come before that of one before it."""
    while len(response.samples) <= index:
        response.samples.add()
    return response.samples[index]
