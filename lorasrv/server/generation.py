"""GenerationService: convert, ask the front desk, convert."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from lorasrv.requests import Delta, Event, Finished, Queued, Started
from lorasrv.server import convert
from lorasrv.server.access import current_caller
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.server.metrics import Metrics
from lorasrv.server.tokens import TokenDesk
from lorasrv.types import BASE_ID
from lorasrv.v1 import generation_pb2, generation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Every call is of its caller's tenant."""

    def __init__(self, desk: FrontDesk, tokens: TokenDesk, metrics: Metrics) -> None:
        self._desk = desk
        self._tokens = tokens
        self._metrics = metrics

    @property
    def _tenant(self) -> str:
        return current_caller().tenant

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        response = generation_pb2.GenerateResponse()
        texts: defaultdict[int, list[str]] = defaultdict(list)
        async with aclosing(self._generate(request, context)) as events:
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
                    case Queued():
                        pass
                    case Finished():
                        _sample(response, event.index).finished.CopyFrom(convert.finished(event))
        for index, sample in enumerate(response.samples):
            sample.text = "".join(texts[index])
        return response

    async def GenerateStream(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[generation_pb2.GenerateStreamResponse, None]:
        async with aclosing(self._generate(request, context)) as events:
            async for event in events:
                yield convert.stream_response(event)

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        prompt = convert.text_or_chat(request)
        tokenized = await self._tokens.tokenize(prompt, self._tenant, request.adapter or BASE_ID)
        return convert.tokenized(tokenized, with_offsets=request.with_offsets, with_text=request.with_text)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        text = await self._tokens.detokenize(request.token_ids, with_special_tokens=request.with_special_tokens)
        return generation_pb2.DetokenizeResponse(text=text)

    def _generate(self, request: generation_pb2.GenerateRequest, context: Context) -> AsyncGenerator[Event, None]:
        asked = convert.generation_request(request, current_caller(), convert.deadline_s(context))
        return self._metrics.observed(self._desk.generate(asked))


def _sample(response: generation_pb2.GenerateResponse, index: int) -> generation_pb2.Sample:
    """Sample number `index`, there from now on; the first thing of a sample may come before that of one before it."""
    while len(response.samples) <= index:
        response.samples.add()
    return response.samples[index]
