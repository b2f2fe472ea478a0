"""A client that knows no more than an address: it asks the server what it serves, and calls that.

    python stubless_client.py HOST:PORT [API_KEY]

Prints what it found as JSON. A program of its own, so that nothing of lorasrv is loaded with it.
"""

import json
import sys
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Sends an API key with every call, those of reflection included."""

    def __init__(self, key: str) -> None:
        self._metadata = (("authorization", f"Bearer {key}"),)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(client_call_details._replace(metadata=self._metadata), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(client_call_details._replace(metadata=self._metadata), request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(client_call_details._replace(metadata=self._metadata), request_iterator)


def call(channel: grpc.Channel, method: MethodDescriptor, **fields: Any) -> Any:
    """The answer, or a stream's answers, to a request with these fields."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kinds = {
        "request_serializer": GetMessageClass(method.input_type).SerializeToString,
        "response_deserializer": GetMessageClass(method.output_type).FromString,
    }
    request = GetMessageClass(method.input_type)(**fields)
    if method.server_streaming:
        return list(channel.unary_stream(path, **kinds)(request))
    return channel.unary_unary(path, **kinds)(request)


def main(address: str, *keys: str) -> None:
    with grpc.insecure_channel(address) as plain:
        channel = grpc.intercept_channel(plain, *map(WithKey, keys))
        try:
            found = look_and_call(channel)
        except grpc.RpcError as error:
            found = {"code": error.code().name}  # pyright: ignore[reportAttributeAccessIssue]
    ours = [name for name in sys.modules if name.split(".")[0].startswith("lorasrv")]
    print(json.dumps({**found, "modules_of_lorasrv": ours}))


def look_and_call(channel: grpc.Channel) -> dict[str, Any]:
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    generation = pool.FindServiceByName("lorasrv.v1.GenerationService").methods_by_name
    info = pool.FindServiceByName("lorasrv.v1.ServerService").methods_by_name["GetServerInfo"]
    fields = {"text": "banana>", "adapter": [{"name": "base"}], "sampling": {"temperature": 0, "max_tokens": 6}}
    answer = call(channel, generation["Generate"], **fields)
    events = call(channel, generation["GenerateStream"], **fields)
    return {
        "services": [service.name for service in listed.list_services_response.service],
        "model": call(channel, info).base_model.name,
        "text": answer.samples[0].text,
        "token_ids": list(answer.samples[0].token_ids),
        "streamed": [token for event in events for token in event.delta.token_ids],
    }


main(*sys.argv[1:])
