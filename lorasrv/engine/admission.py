"""The admission check: one place, below all front ends, where a request meets its limits."""

import re
import secrets
from dataclasses import dataclass

from lorasrv.errors import InvalidRequest
from lorasrv.requests import AdapterRef, GenerationRequest
from lorasrv.types import (
    BASE_ID,
    DEFAULT_MAX_TOKENS,
    MAX_STOP_STRINGS,
    AdapterUse,
    EngineInfo,
    EngineRequest,
    SamplingParams,
)

MAX_STOP_CHARS = 256
MAX_TEMPERATURE = 100.0
MAX_SCALE = 100.0
MAX_SEED = 2**64 - 1

_GENERATION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class TokenLimits:
    """What bounds a sequence: the model's context and the whole pool."""

    vocab_size: int
    context_tokens: int
    pool_tokens: int

    @classmethod
    def of(cls, info: EngineInfo) -> "TokenLimits":
        return cls(
            vocab_size=info.vocab_size,
            context_tokens=info.context_tokens,
            pool_tokens=info.num_pages * info.block_tokens,
        )

    @property
    def sequence_tokens(self) -> int:
        return min(self.context_tokens, self.pool_tokens)


def check_request(request: GenerationRequest) -> AdapterRef:
    """Everything that can be told before the adapter is looked up and the prompt tokenized.

    Returns the one adapter reference; raises InvalidRequest.
    """
    if request.prompt is None:
        raise InvalidRequest("prompt", "set either text or tokens")
    if not request.prompt:
        raise InvalidRequest("prompt", "is empty; at least one token is needed")
    if request.generation_id is not None and not _GENERATION_ID.fullmatch(request.generation_id):
        raise InvalidRequest(
            "generation_id", f"{request.generation_id[:128]!r} does not match {_GENERATION_ID.pattern}"
        )
    _check_sampling(request.sampling)
    return _check_adapters(request.adapters)


def check_tokens(token_ids: tuple[int, ...], max_tokens: int | None, limits: TokenLimits) -> int:
    """How many tokens the generation may produce, its default included; raises InvalidRequest."""
    if not token_ids:
        raise InvalidRequest("prompt", "has no tokens; at least one is needed")
    outside = next((token for token in token_ids if not 0 <= token < limits.vocab_size), None)
    if outside is not None:
        raise InvalidRequest("prompt.tokens", f"token id {outside} is outside the vocabulary of {limits.vocab_size}")
    room = limits.sequence_tokens - len(token_ids)
    wanted = 1 if max_tokens is None else max_tokens
    if wanted > room:
        field = "prompt" if room < 1 else "sampling.max_tokens"
        asked = f"prompt of {len(token_ids)} tokens" + ("" if max_tokens is None else f" + max_tokens {max_tokens}")
        raise InvalidRequest(
            field,
            f"{asked} exceeds the limit: context {limits.context_tokens} tokens, pool {limits.pool_tokens} tokens",
        )
    return min(DEFAULT_MAX_TOKENS, room) if max_tokens is None else max_tokens


def engine_request(
    request_id: str,
    token_ids: tuple[int, ...],
    *,
    adapter: AdapterUse | None,
    sampling: SamplingParams,
    limits: TokenLimits,
    cache_salt: str = "",
) -> EngineRequest:
    """A checked, tokenized request as the engine takes it; an unset seed is drawn here. Raises InvalidRequest."""
    return EngineRequest(
        request_id=request_id,
        token_ids=token_ids,
        adapter=adapter,
        max_tokens=check_tokens(token_ids, sampling.max_tokens, limits),
        seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=None if sampling.top_k is None else min(sampling.top_k, limits.vocab_size),
        cache_salt=cache_salt,
    )


def _check_adapters(adapters: tuple[AdapterRef, ...]) -> AdapterRef:
    if len(adapters) != 1:
        raise InvalidRequest(
            "adapter", f"{len(adapters)} adapters given; exactly one is accepted ({BASE_ID!r} for none)"
        )
    adapter = adapters[0]
    if not adapter.name:
        raise InvalidRequest("adapter.name", f"is empty; {BASE_ID!r} names the base model")
    if adapter.scale is not None:
        if adapter.name == BASE_ID:
            raise InvalidRequest("adapter.scale", f"{adapter.scale} given for {BASE_ID!r}, which has no scale")
        if not abs(adapter.scale) <= MAX_SCALE:
            raise InvalidRequest("adapter.scale", f"{adapter.scale} is not within [-{MAX_SCALE:g}, {MAX_SCALE:g}]")
    return adapter


def _check_sampling(sampling: SamplingParams) -> None:
    # Comparisons are written so that NaN fails them.
    if not 0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest("sampling.temperature", f"{sampling.temperature} is not within [0, {MAX_TEMPERATURE:g}]")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest("sampling.top_p", f"{sampling.top_p} is not within (0, 1]")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise InvalidRequest("sampling.top_k", f"{sampling.top_k} is below 1; leave it unset to keep all tokens")
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise InvalidRequest("sampling.max_tokens", f"{sampling.max_tokens} is below 1")
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        raise InvalidRequest("sampling.seed", f"{sampling.seed} is not within [0, 2^64)")
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest("sampling.stop", f"{len(sampling.stop)} strings; at most {MAX_STOP_STRINGS} are accepted")
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                "sampling.stop", f"a string of {len(stop)} characters; 1 to {MAX_STOP_CHARS} are accepted"
            )
