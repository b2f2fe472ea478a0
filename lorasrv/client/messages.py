"""What the sync and the async client share: addresses, requests, and an adapter folder as upload messages."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from lorasrv.addresses import host_and_port, is_loopback
from lorasrv.v1 import adapter_pb2, generation_pb2

# Text, token ids, or the messages of a chat: [{"role": "user", "content": "Hello"}].
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
Event = generation_pb2.Started | generation_pb2.Queued | generation_pb2.Delta | generation_pb2.Finished
# How much later than others a request may be admitted.
Priority = Literal["normal", "batch"]
# Where weights may be brought before a generation asks for them.
WarmTier = Literal["host", "device"]

DEFAULT_URL = "127.0.0.1:8470"
OWN_TENANT = "-"  # in resource names: the tenant of the API key
API_KEY_VARIABLE = "LORASRV_API_KEY"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DEFAULTS_FILE = "serving.json"
# A slow link passes one in seconds, so progress shows, and a break costs little.
CHUNK_BYTES = 64 << 10

PRIORITIES: Mapping[Priority, generation_pb2.Priority] = {
    "normal": generation_pb2.PRIORITY_NORMAL,
    "batch": generation_pb2.PRIORITY_BATCH,
}

WARM_TIERS: Mapping[WarmTier, adapter_pb2.Tier] = {
    "host": adapter_pb2.TIER_HOST,
    "device": adapter_pb2.TIER_DEVICE,
}

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    # Channels of one process would otherwise share one connection, and its flow control.
    ("grpc.use_local_subchannel_pool", 1),
    # A server that comes back is found soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name: how long one attempt may take, handshakes included; on a link that is full, each of their round
    # trips takes seconds.
    ("grpc.min_reconnect_backoff_ms", 20_000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A server that is gone without a word is found out, and a quiet connection is kept by NATs and balancers.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt. `text`, `token_ids`, `logprobs` and `finished` are those of its only sample.

    They raise ValueError where there are several: `samples` has them all, by index.
    """

    response: generation_pb2.GenerateResponse

    @property
    def started(self) -> generation_pb2.Started:
        return self.response.started

    @property
    def samples(self) -> Sequence[generation_pb2.Sample]:
        return self.response.samples

    @property
    def prompt_logprobs(self) -> Sequence[generation_pb2.PositionLogprobs]:
        return self.response.prompt_logprobs

    @property
    def text(self) -> str:
        return self._only.text

    @property
    def token_ids(self) -> Sequence[int]:
        return self._only.token_ids

    @property
    def logprobs(self) -> Sequence[generation_pb2.PositionLogprobs]:
        return self._only.logprobs

    @property
    def finished(self) -> generation_pb2.Finished:
        return self._only.finished

    @property
    def _only(self) -> generation_pb2.Sample:
        if len(self.samples) != 1:
            raise ValueError(f"there are {len(self.samples)} samples; `samples` has them")
        return self.samples[0]


def target_of(url: str) -> tuple[str, bool]:
    """`HOST:PORT` of a URL, and whether it says https://; raises ValueError."""
    secure = url.startswith("https://")
    target = url.removeprefix("https://" if secure else "http://").rstrip("/")
    host, _ = host_and_port(target)
    if not host:
        raise ValueError(f"{url!r} is not HOST:PORT")
    return target, secure


def channel_options(target: str) -> tuple[tuple[str, int], ...]:
    """Those of a channel to HOST:PORT. A proxy that the environment names could not reach this very machine."""
    host, _ = host_and_port(target)
    return (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if is_loopback(host) else CHANNEL_OPTIONS


def credentials(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that an API key is sent in; None is the one in LORASRV_API_KEY, if any. Raises ValueError."""
    key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
    if not key:
        return ()
    if not all("!" <= character <= "~" for character in key):
        # gRPC's own error would quote it.
        raise ValueError("the API key has characters that no key has: it is one line of visible ASCII without spaces")
    return (("authorization", f"Bearer {key}"),)


def generate_request(
    prompt: Prompt,
    *,
    adapter: str,
    scale: float | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    bad_words: Sequence[Sequence[int]] = (),
    stop_token_ids: Sequence[int] = (),
    min_tokens: int | None = None,
    ignore_eos: bool | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int | None = None,
    echo: bool = False,
    generation_id: str = "",
    ignore_version_defaults: bool = False,
    priority: Priority | None = None,
    session_key: str = "",
) -> generation_pb2.GenerateRequest:
    """A request; what is None is left to the defaults of the adapter version, then of the server. The proto file's
    SamplingParams says what is what.
    """
    request = generation_pb2.GenerateRequest(
        adapter=[generation_pb2.AdapterRef(name=adapter, scale=scale)],
        sampling=generation_pb2.SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            max_tokens=max_tokens,
            # A string is a sequence of strings too.
            stop=[stop] if isinstance(stop, str) else stop,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            bad_words=[generation_pb2.TokenIds(ids=word) for word in bad_words],
            stop_token_ids=stop_token_ids,
            min_tokens=min_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=n,
        ),
        generation_id=generation_id,
        echo=echo,
        ignore_version_defaults=ignore_version_defaults,
        session_key=session_key,
    )
    if priority is not None:
        request.priority = PRIORITIES[priority]
    if ignore_eos is not None:
        request.sampling.ignore_eos = ignore_eos
    if not _set_text(request, prompt):
        if isinstance(prompt, bytes):
            raise TypeError("the prompt is bytes, which are neither text nor token ids")
        request.tokens.CopyFrom(generation_pb2.TokenIds(ids=cast(Sequence[int], prompt)))
    return request


def tokenize_request(
    prompt: str | Sequence[Mapping[str, str]], *, adapter: str, with_offsets: bool, with_text: bool
) -> generation_pb2.TokenizeRequest:
    """Raises ValueError for a prompt that is tokens already, or nothing."""
    request = generation_pb2.TokenizeRequest(adapter=adapter, with_offsets=with_offsets, with_text=with_text)
    if not _set_text(request, prompt):
        raise ValueError("the prompt is neither text nor the messages of a chat")
    return request


def detokenize_request(token_ids: Sequence[int], *, with_special_tokens: bool) -> generation_pb2.DetokenizeRequest:
    return generation_pb2.DetokenizeRequest(token_ids=token_ids, with_special_tokens=with_special_tokens)


def warm_request(parent: str, reference: str, tier: WarmTier) -> adapter_pb2.WarmAdapterRequest:
    """Raises ValueError for another tier."""
    if tier not in WARM_TIERS:
        raise ValueError(f"tier {tier!r} is not one of {', '.join(WARM_TIERS)}")
    return adapter_pb2.WarmAdapterRequest(parent=parent, reference=reference, tier=WARM_TIERS[tier])


def list_request(
    parent: str, name_prefix: str, labels: Mapping[str, str] | None, show_deleted: bool
) -> adapter_pb2.ListAdaptersRequest:
    return adapter_pb2.ListAdaptersRequest(
        parent=parent, page_size=1000, name_prefix=name_prefix, labels=labels, show_deleted=show_deleted
    )


def _set_text(request: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest, prompt: Prompt) -> bool:
    """Set a prompt that is a text or a chat; whether it is one."""
    if isinstance(prompt, str):
        request.text = prompt
        return True
    if len(prompt) and isinstance(prompt[0], Mapping):
        messages = [generation_pb2.ChatMessage(**message) for message in cast(Sequence[Mapping[str, str]], prompt)]
        request.messages.CopyFrom(generation_pb2.ChatMessages(messages=messages))
        return True
    return False


def event_of(response: generation_pb2.GenerateStreamResponse) -> Event | None:
    """The event of a response; None for a kind that this client does not know yet."""
    match response.WhichOneof("event"):
        case "started":
            return response.started
        case "delta":
            return response.delta
        case "queued":
            return response.queued
        case "finished":
            return response.finished
        case _:
            return None


def upload_files(folder: Path) -> list[adapter_pb2.UploadFile]:
    """The files of a PEFT folder that make the adapter, with their digests; raises FileNotFoundError."""
    files: list[adapter_pb2.UploadFile] = []
    for name in (*ADAPTER_FILES, DEFAULTS_FILE) if (folder / DEFAULTS_FILE).exists() else ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files.append(adapter_pb2.UploadFile(name=name, size_bytes=file.tell(), sha256=digest))
    return files


def write_requests(folder: Path, upload: adapter_pb2.Upload) -> Iterator[adapter_pb2.WriteUploadRequest]:
    """What the server has not committed yet, in messages of at most CHUNK_BYTES."""
    for wanted in upload.files:
        offset = wanted.committed_bytes
        with (folder / wanted.name).open("rb") as file:
            file.seek(offset)
            while offset < wanted.size_bytes and (data := file.read(CHUNK_BYTES)):
                yield adapter_pb2.WriteUploadRequest(
                    upload=upload.name, file=wanted.name, offset_bytes=offset, data=data
                )
                offset += len(data)


def committed_bytes(upload: adapter_pb2.Upload) -> int:
    return sum(file.committed_bytes for file in upload.files)
