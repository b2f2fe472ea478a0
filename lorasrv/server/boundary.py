"""The edge of the server: every call of ours is parsed, run and answered here, so that each failure is described."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from lorasrv.errors import InvalidRequest, LorasrvError, PermissionDenied, SlowReader, Unauthenticated, UnknownMethod
from lorasrv.keys import Caller
from lorasrv.server.access import PACKAGE_PREFIX, Access, calling
from lorasrv.server.status import describe, is_described
from lorasrv_adapters.errors import quote

log = logging.getLogger(__name__)


class Boundary(grpc.aio.ServerInterceptor):
    """Lets in whom `access` does, takes parsing out of gRPC's hands, whose answer to malformed bytes is UNKNOWN, and
    maps errors to statuses.

    Who calls is asked before a message is read. What a service does is done as `access.current_caller`.
    An error of ours becomes its status; any other is logged with its traceback and masked as INTERNAL. A stream whose
    reader takes nothing for `stall_timeout_s` while a message waits to be written ends with SlowReader: what gRPC and
    the network hold in front of that message is bounded by their flow control.
    """

    def __init__(self, access: Access, stall_timeout_s: float) -> None:
        self._access = access
        self._stall_timeout_s = stall_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        try:
            caller = self._access.authenticate(method, handler_call_details.invocation_metadata)
            handler = await continuation(handler_call_details)
            if handler is None:
                raise UnknownMethod(f"there is no method {quote(method)}")
            if not method.startswith(PACKAGE_PREFIX):
                return handler
            self._access.authorise(method, caller)
        except (Unauthenticated, PermissionDenied, UnknownMethod) as error:
            return _refusal(error)
        if handler.request_streaming:
            call = _stream_unary(handler.stream_unary, handler.request_deserializer, caller)
            return grpc.stream_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)
        if handler.response_streaming:
            call = _unary_stream(handler.unary_stream, handler.request_deserializer, caller, self._stall_timeout_s)
            return grpc.unary_stream_rpc_method_handler(call, response_serializer=handler.response_serializer)
        call = _unary_unary(handler.unary_unary, handler.request_deserializer, caller)
        return grpc.unary_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)


def _refusal(error: LorasrvError) -> Any:
    """A handler for calls of any kind that answers without reading a message."""

    async def call(chunks: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _fail(context, error)

    return grpc.stream_stream_rpc_method_handler(call)


def _unary_unary(
    behaviour: Callable[..., Awaitable[Any]], parse: Callable[[bytes], Any], caller: Caller
) -> Callable[..., Any]:
    async def call(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            with calling(caller):
                return await behaviour(_parsed(data, parse), context)
        except Exception as error:
            await _fail(context, error)

    return call


def _unary_stream(
    behaviour: Callable[..., AsyncGenerator[Any, None]],
    parse: Callable[[bytes], Any],
    caller: Caller,
    stall_timeout_s: float,
) -> Callable[..., Any]:
    async def write(context: grpc.aio.ServicerContext[Any, Any], response: Any) -> None:
        try:
            async with asyncio.timeout(stall_timeout_s):  # on the loop's monotonic clock
                await context.write(response)
        except TimeoutError:
            raise SlowReader(f"the stream was not read for {stall_timeout_s:g} s") from None

    async def call(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            # Written here rather than yielded: when the client is gone the generator is closed now, not by the
            # garbage collector.
            with calling(caller):
                async with aclosing(behaviour(_parsed(data, parse), context)) as responses:
                    async for response in responses:
                        await write(context, response)
        except Exception as error:
            await _fail(context, error)

    return call


def _stream_unary(
    behaviour: Callable[..., Awaitable[Any]], parse: Callable[[bytes], Any], caller: Caller
) -> Callable[..., Any]:
    async def call(chunks: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async def requests() -> AsyncGenerator[Any, None]:
            async for data in chunks:
                yield _parsed(data, parse)

        try:
            with calling(caller):
                async with aclosing(requests()) as messages:
                    return await behaviour(messages, context)
        except Exception as error:
            await _fail(context, error)

    return call


def _parsed(data: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(data)
    except DecodeError as error:
        # Its text may quote the bytes; ours is fixed.
        raise InvalidRequest("", f"a message of {len(data)} bytes is not a valid protobuf message") from error


async def _fail(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    if context.done():
        # The caller is gone, and what failed is the writing to it.
        raise error
    if not is_described(error):
        log.error("a call failed on our side", exc_info=error)
    status = describe(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")
