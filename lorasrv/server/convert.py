"""Protobuf to our types and back: nothing is checked or decided here."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from lorasrv.engine.client import EngineState
from lorasrv.errors import InvalidRequest
from lorasrv.keys import Caller
from lorasrv.requests import (
    AdapterRef,
    Chat,
    ChatMessage,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Queued,
    Started,
    Tokenized,
)
from lorasrv.types import (
    AdapterResidency,
    EngineStatus,
    FinishReason,
    PositionLogprobs,
    Priority,
    SamplingParams,
    Tier,
)
from lorasrv.v1 import adapter_pb2, generation_pb2, server_pb2

FINISH_REASONS = {
    FinishReason.EOS: generation_pb2.FINISH_REASON_EOS,
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}

PRIORITIES = {
    generation_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    generation_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    generation_pb2.PRIORITY_BATCH: Priority.BATCH,
}

TIERS = {
    Tier.DISK: adapter_pb2.TIER_DISK,
    Tier.QUEUED: adapter_pb2.TIER_QUEUED,
    Tier.READING: adapter_pb2.TIER_READING,
    Tier.HOST: adapter_pb2.TIER_HOST,
    Tier.COPYING: adapter_pb2.TIER_COPYING,
    Tier.DEVICE: adapter_pb2.TIER_DEVICE,
    Tier.FAILED: adapter_pb2.TIER_FAILED,
}

ENGINE_STATES = {
    "starting": server_pb2.ENGINE_STATE_STARTING,
    "ready": server_pb2.ENGINE_STATE_READY,
    "unavailable": server_pb2.ENGINE_STATE_UNAVAILABLE,
}


def deadline_s(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """When the caller stops waiting, on the clock that all processes of this machine share; None if it never does."""
    left_s = context.time_remaining()
    return None if left_s is None else time.monotonic() + left_s


def generation_request(
    request: generation_pb2.GenerateRequest, caller: Caller, deadline_s: float | None
) -> GenerationRequest:
    """Raises InvalidRequest for a value of an enum that is not known here."""
    prompt: str | tuple[int, ...] | Chat | None = text_or_chat(request)
    if request.WhichOneof("prompt") == "tokens":
        prompt = tuple(request.tokens.ids)
    if request.priority not in PRIORITIES:
        raise InvalidRequest("priority", f"{request.priority} is no class; {sorted(PRIORITIES)} are")
    return GenerationRequest(
        tenant=caller.tenant,
        weight=caller.weight,
        adapters=tuple(
            AdapterRef(name=ref.name, scale=ref.scale if ref.HasField("scale") else None) for ref in request.adapter
        ),
        prompt=prompt,
        sampling=sampling_params(request.sampling),
        generation_id=request.generation_id or None,
        echo=request.echo,
        ignore_version_defaults=request.ignore_version_defaults,
        priority=PRIORITIES[request.priority],
        session_key=request.session_key or None,
        deadline_s=deadline_s,
    )


def text_or_chat(request: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest) -> str | Chat | None:
    """The prompt; None when it is neither."""
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "messages":
            messages = request.messages.messages
            return Chat(messages=tuple(ChatMessage(role=each.role, content=each.content) for each in messages))
        case _:
            return None


def sampling_params(sampling: generation_pb2.SamplingParams) -> SamplingParams:
    scalars = {field.name: value for field, value in sampling.ListFields() if not field.is_repeated}
    return SamplingParams(
        **scalars,
        stop=tuple(sampling.stop),
        logit_bias=dict(sampling.logit_bias),
        bad_words=tuple(tuple(word.ids) for word in sampling.bad_words),
        stop_token_ids=tuple(sampling.stop_token_ids),
    )


def sampling_message(sampling: SamplingParams) -> generation_pb2.SamplingParams:
    given = sampling.given()
    given["bad_words"] = [generation_pb2.TokenIds(ids=word) for word in sampling.bad_words]
    return generation_pb2.SamplingParams(**given)


def tokenized(
    found: Tokenized, *, with_offsets: bool = False, with_text: bool = False
) -> generation_pb2.TokenizeResponse:
    spans = found.offsets if with_offsets else ()
    return generation_pb2.TokenizeResponse(
        token_ids=found.token_ids,
        offsets=[generation_pb2.TextSpan(start=start, end=end) for start, end in spans],
        text=found.text if with_text else "",
    )


def stream_response(event: Event) -> generation_pb2.GenerateStreamResponse:
    match event:
        case Started():
            return generation_pb2.GenerateStreamResponse(started=started(event))
        case Queued():
            return generation_pb2.GenerateStreamResponse(queued=generation_pb2.Queued(position=event.position))
        case Delta():
            delta = generation_pb2.Delta(
                index=event.index,
                text=event.text,
                token_ids=event.token_ids,
                logprobs=logprobs(event.logprobs),
                prompt_logprobs=logprobs(event.prompt_logprobs),
            )
            return generation_pb2.GenerateStreamResponse(delta=delta)
        case Finished():
            return generation_pb2.GenerateStreamResponse(finished=finished(event))


def started(event: Started) -> generation_pb2.Started:
    return generation_pb2.Started(
        generation_id=event.generation_id,
        version_digest=event.version_digest or "",
        prompt_tokens=event.prompt_tokens,
        seed=event.seed,
        prompt_text=event.prompt.text if event.prompt else "",
        prompt_token_ids=event.prompt.token_ids if event.prompt else (),
    )


def logprobs(positions: Iterable[PositionLogprobs]) -> list[generation_pb2.PositionLogprobs]:
    return [
        generation_pb2.PositionLogprobs(
            token=generation_pb2.TokenLogprob(token_id=each.token_id, logprob=each.logprob),
            top=[generation_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in each.top],
        )
        for each in positions
    ]


def finished(event: Finished) -> generation_pb2.Finished:
    first = event.time_to_first_token_s
    return generation_pb2.Finished(
        index=event.index,
        reason=FINISH_REASONS[event.reason],
        stop=event.stop if isinstance(event.stop, str) else "",
        stop_token_id=event.stop if isinstance(event.stop, int) else None,
        usage=generation_pb2.Usage(prompt_tokens=event.prompt_tokens, completion_tokens=event.completion_tokens),
        timings=generation_pb2.Timings(
            time_to_first_token=None if first is None else duration(first), total=duration(event.total_s)
        ),
    )


def server_status(
    state: EngineState,
    status: EngineStatus | None,
    names: Mapping[str, str],
    *,
    uptime_s: float,
    draining: bool,
    open_generations: int,
) -> server_pb2.ServerStatus:
    """`status` None while the engine cannot tell; of its adapters those whose digest has a name in `names`."""
    message = server_pb2.ServerStatus(
        state=ENGINE_STATES[state],
        uptime=duration(uptime_s),
        draining=draining,
        open_generations=open_generations,
    )
    if status is None:
        return message
    message.pool.CopyFrom(
        server_pb2.PoolStatus(
            num_pages=status.pool.num_pages,
            free_pages=status.pool.free,
            sequence_pages=status.pool.sequences,
            adapter_pages=status.pool.adapters,
            prefix_pages=status.pool.prefix,
        )
    )
    message.running_requests = status.running
    message.waiting_requests = status.waiting
    message.adapter_pins = status.pins
    message.adapters.extend(
        server_pb2.AdapterStatus(
            adapter_id=names[each.digest],
            version_digest=each.digest,
            tier=TIERS[each.tier],
            num_pages=each.num_pages,
            pins=each.pins,
            failure=failure_text(each),
        )
        for each in status.adapters
        if each.digest in names
    )
    message.counters.CopyFrom(server_pb2.Counters(**asdict(status.counters)))
    return message


def failure_text(residency: AdapterResidency) -> str:
    """Why an adapter's last load failed; empty unless it did."""
    return "" if residency.failure is None else residency.failure.message


def timestamp(unix_s: float) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(int(unix_s * 1e9))
    return message


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message
