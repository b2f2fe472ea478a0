"""Servers that load can be sent to: ours through gRPC, and whatever speaks OpenAI's completions."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from lorasrv.client import AsyncClient, ClientError
from lorasrv.errors import ConfigurationError
from lorasrv_bench.asks import Ask
from lorasrv_bench.load import Backend, CallFailed, End, Piece


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where to send: tenant t's requests go with key t modulo their number; no keys are one tenant without a key.

    With `lora_ids`, an OpenAI server is told of an adapter by its number, as llama.cpp wants it, not as a model's name.
    """

    api: Literal["grpc", "openai"]
    url: str
    api_keys: tuple[str | None, ...] = (None,)
    lora_ids: Mapping[str, int] | None = None

    def connect(self) -> Backend:
        """A connection of the running event loop. Raises ConfigurationError where httpx2 is needed and missing."""
        return GrpcBackend(self) if self.api == "grpc" else OpenAIBackend(self)


class GrpcBackend:
    """Ours; a connection for each key."""

    def __init__(self, server: Server) -> None:
        self._clients = [AsyncClient(server.url, api_key=key) for key in server.api_keys]

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece | End, None]:
        client = self._clients[ask.tenant % len(self._clients)]
        version = None
        prompt_tokens = output_tokens = None
        sampling = {
            "temperature": 0.0,
            "max_tokens": ask.max_tokens,
            "ignore_eos": ask.exact_tokens,
            "ignore_version_defaults": True,
        }
        try:
            event: Any
            async for event in client.stream(ask.prompt, adapter=ask.name, **sampling):
                match event.DESCRIPTOR.name:
                    case "Started":
                        version, prompt_tokens = event.version_digest, event.prompt_tokens
                    case "Delta":
                        if event.token_ids or event.text:
                            tokens = tuple(event.token_ids)
                            yield Piece(num_tokens=len(tokens), token_ids=tokens, text=event.text)
                    case "Finished":
                        output_tokens = event.usage.completion_tokens
                    case _:  # Queued: the client's own clock says how long
                        pass
        except ClientError as error:
            raise CallFailed(f"{error.code.name}: {error.message}") from None
        yield End(prompt_tokens=prompt_tokens, output_tokens=output_tokens, version=version)

    async def close(self) -> None:
        for client in self._clients:
            await client.__aexit__(None, None, None)


class OpenAIBackend:
    """`POST /v1/completions`, streamed. An adapter is a model's name, and so is the base.

    Of `ignore_eos`, which vLLM, SGLang and llama.cpp know, the protocol knows nothing: a server that ends early is seen
    by its counts.
    """

    def __init__(self, server: Server) -> None:
        try:
            import httpx2
        except ModuleNotFoundError:
            raise ConfigurationError("httpx2 is not installed; pip install 'lorasrv[server,bench]' has it") from None
        self._errors = httpx2.HTTPError
        self._unanswered = httpx2.RemoteProtocolError
        self._lora_ids = server.lora_ids
        keys = server.api_keys
        self._headers: Sequence[dict[str, str]] = [{"authorization": f"Bearer {key}"} if key else {} for key in keys]
        self._client = httpx2.AsyncClient(
            base_url=server.url.rstrip("/").removesuffix("/v1"),
            # Only a server may queue, or its queue would not be measured.
            limits=httpx2.Limits(max_connections=None),
            timeout=None,
        )

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece | End, None]:
        body: dict[str, Any] = {
            "model": ask.name,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": ask.exact_tokens,
            # What vLLM tells on request; others ignore it.
            "return_token_ids": True,
        }
        if self._lora_ids is not None:
            # All of them: llama.cpp takes an empty list for its defaults, which are not those it was started with.
            body["lora"] = [{"id": each, "scale": float(name == ask.name)} for name, each in self._lora_ids.items()]
        usage: dict[str, int] = {}
        headers = self._headers[ask.tenant % len(self._headers)]
        try:
            async with aclosing(await self._opened(body, headers)) as response:
                if response.status_code != 200:
                    said = (await response.aread())[:300].decode(errors="replace")
                    raise CallFailed(f"HTTP {response.status_code}: {said}")
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or line.endswith("[DONE]"):
                        continue
                    event = json.loads(line.removeprefix("data:"))
                    if "error" in event:
                        raise CallFailed(str(event["error"])[:300])
                    usage = event.get("usage") or usage
                    if (piece := _piece(event)) is not None:
                        yield piece
        except (self._errors, ValueError) as error:
            raise CallFailed(f"{type(error).__name__}: {error}") from None
        yield End(prompt_tokens=usage.get("prompt_tokens"), output_tokens=usage.get("completion_tokens"))

    async def close(self) -> None:
        await self._client.aclose()

    async def _opened(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        """The response to a request, whose body has not been read."""
        request = self._client.build_request("POST", "/v1/completions", json=body, headers=headers)
        try:
            return await self._client.send(request, stream=True)
        except self._unanswered:
            # The server has closed a kept connection just when it was used again.
            return await self._client.send(request, stream=True)


def _piece(event: dict[str, Any]) -> Piece | None:
    for choice in event.get("choices") or ():
        tokens = tuple(choice.get("token_ids") or ())
        if choice.get("text") or tokens:
            return Piece(num_tokens=len(tokens) or 1, token_ids=tokens, text=choice.get("text") or "")
    return None
