"""What the sync and the async client share: addresses, requests, and an adapter folder as upload messages."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lorasrv.v1 import adapter_pb2, generation_pb2

# Text, token ids, or the messages of a chat: [{"role": "user", "content": "Hello"}].
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
Event = generation_pb2.Started | generation_pb2.Delta | generation_pb2.Finished

DEFAULT_URL = "127.0.0.1:8470"
DEFAULT_TENANT = "default"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DEFAULTS_FILE = "serving.json"
CHUNK_BYTES = 1 << 20

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    # Channels of one process would otherwise share one connection, and its flow control.
    ("grpc.use_local_subchannel_pool", 1),
    # A server that comes back is found soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
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


def target_of(url: str) -> str:
    """`HOST:PORT` of a URL, which may say http://; raises ValueError."""
    target = url.removeprefix("http://").rstrip("/")
    host, colon, port = target.rpartition(":")
    if not host or not colon or not port.isdigit() or "/" in target:
        raise ValueError(f"{url!r} is not HOST:PORT or http://HOST:PORT")
    return target


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
    stop: Sequence[str] = (),
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
            stop=stop,
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
    )
    if ignore_eos is not None:
        request.sampling.ignore_eos = ignore_eos
    if isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping):
        messages = [generation_pb2.ChatMessage(**message) for message in cast(Sequence[Mapping[str, str]], prompt)]
        request.messages.CopyFrom(generation_pb2.ChatMessages(messages=messages))
    else:
        request.tokens.CopyFrom(generation_pb2.TokenIds(ids=cast(Sequence[int], prompt)))
    return request


def event_of(response: generation_pb2.GenerateStreamResponse) -> Event | None:
    """The event of a response; None for a kind that this client does not know yet."""
    match response.WhichOneof("event"):
        case "started":
            return response.started
        case "delta":
            return response.delta
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
    """What the server has not committed yet, in messages of at most 1 MiB."""
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
