"""The admission check: one place, below all front ends, where a request meets its limits."""

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from lorasrv.engine.chat import check_chat
from lorasrv.errors import InvalidRequest
from lorasrv.requests import AdapterRef, Chat, GenerationRequest
from lorasrv.types import (
    BASE_ID,
    DEFAULT_MAX_TOKENS,
    MAX_STOP_STRINGS,
    AdapterUse,
    CompleteSampling,
    EngineInfo,
    EngineRequest,
    LogitRules,
    SamplingParams,
)

MAX_SESSION_KEY_CHARS = 128
MAX_STOP_CHARS = 256
MAX_TEMPERATURE = 100.0
MAX_SCALE = 100.0
MAX_SEED = 2**64 - 1
MAX_REPETITION_PENALTY = 64.0
MAX_COUNT_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASED_TOKENS = 300
MAX_BAD_WORDS = 64
MAX_BAD_WORD_TOKENS = 16
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_SAMPLES = 64

UNSET = SamplingParams()

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
        raise InvalidRequest("prompt", "set text, tokens or messages")
    if isinstance(request.prompt, Chat):
        check_chat(request.prompt)
    elif not request.prompt:
        raise InvalidRequest("prompt", "is empty; at least one token is needed")
    if request.generation_id is not None and not _GENERATION_ID.fullmatch(request.generation_id):
        raise InvalidRequest(
            "generation_id", f"{request.generation_id[:128]!r} does not match {_GENERATION_ID.pattern}"
        )
    if request.session_key is not None and len(request.session_key) > MAX_SESSION_KEY_CHARS:
        raise InvalidRequest(
            "session_key", f"{len(request.session_key)} characters; at most {MAX_SESSION_KEY_CHARS} are accepted"
        )
    check_sampling(request.sampling)
    return _check_adapters(request.adapters)


def check_sampling(sampling: SamplingParams) -> None:
    """What can be told without a model; raises InvalidRequest."""
    _check_values(CompleteSampling.of(sampling))
    _check_lists(sampling)


def check_vocabulary(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest for a token id that the model does not have."""
    check_token_ids("sampling.logit_bias", sampling.logit_bias, vocab_size)
    check_token_ids("sampling.bad_words", (token_id for word in sampling.bad_words for token_id in word), vocab_size)
    check_token_ids("sampling.stop_token_ids", sampling.stop_token_ids, vocab_size)


def check_tokens(
    token_ids: tuple[int, ...], max_tokens: int | None, limits: TokenLimits, default: int = DEFAULT_MAX_TOKENS
) -> int:
    """How many tokens the generation may produce; unset, it is `default` or what there is room for. Raises
    InvalidRequest.
    """
    if not token_ids:
        raise InvalidRequest("prompt", "has no tokens; at least one is needed")
    _check_max_tokens(max_tokens)
    room = limits.sequence_tokens - len(token_ids)
    wanted = 1 if max_tokens is None else max_tokens
    if wanted > room:
        field = "prompt" if room < 1 else "sampling.max_tokens"
        asked = f"prompt of {len(token_ids)} tokens" + ("" if max_tokens is None else f" + max_tokens {max_tokens}")
        raise InvalidRequest(
            field,
            f"{asked} exceeds the limit: context {limits.context_tokens} tokens, pool {limits.pool_tokens} tokens",
        )
    # Behind the length, which bounds what this costs.
    check_token_ids("prompt.tokens", token_ids, limits.vocab_size)
    return min(default, room) if max_tokens is None else max_tokens


def engine_request(
    request_id: str,
    token_ids: tuple[int, ...],
    *,
    adapter: AdapterUse | None,
    sampling: SamplingParams,
    limits: TokenLimits,
    defaults: SamplingParams = UNSET,
    tenant: str = "",
) -> EngineRequest:
    """A checked, tokenized request as the engine takes it. Raises InvalidRequest.

    What `sampling` leaves unset is as the adapter version's `defaults` say, else the system's; an unset seed is drawn
    here. Defaults of max_tokens and min_tokens give way to what there is room for and what the request sets.
    """
    asked, sampling = sampling, CompleteSampling.of(sampling.over(defaults))
    max_tokens = check_tokens(token_ids, asked.max_tokens, limits, defaults.max_tokens or DEFAULT_MAX_TOKENS)
    if asked.min_tokens is not None and asked.min_tokens > max_tokens:
        raise InvalidRequest("sampling.min_tokens", f"{asked.min_tokens} is above max_tokens {max_tokens}")
    check_vocabulary(sampling, limits.vocab_size)
    rules = LogitRules(
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        bad_words=tuple(tuple(word) for word in sampling.bad_words),
    )
    return EngineRequest(
        request_id=request_id,
        token_ids=token_ids,
        adapter=adapter,
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=min(sampling.top_k, limits.vocab_size) if sampling.top_k else None,
        min_p=sampling.min_p,
        rules=None if rules == LogitRules() else rules,
        stop_token_ids=tuple(sampling.stop_token_ids),
        min_tokens=min(sampling.min_tokens, max_tokens),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        n=sampling.n,
        tenant=tenant,
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


def _check_max_tokens(max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest("sampling.max_tokens", f"{max_tokens} is below 1")


def _check_values(sampling: CompleteSampling) -> None:
    _check_range("temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    # Comparisons are written so that NaN fails them.
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest("sampling.top_p", f"{sampling.top_p} is not within (0, 1]")
    if sampling.top_k is not None and sampling.top_k < 0:
        raise InvalidRequest("sampling.top_k", f"{sampling.top_k} is below 0, which keeps all tokens")
    _check_max_tokens(sampling.max_tokens)
    if sampling.min_tokens < 0:
        raise InvalidRequest("sampling.min_tokens", f"{sampling.min_tokens} is below 0")
    if sampling.seed is not None and not 0 <= sampling.seed <= MAX_SEED:
        raise InvalidRequest("sampling.seed", f"{sampling.seed} is not within [0, 2^64)")
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("repetition_penalty", sampling.repetition_penalty, 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
    _check_range("presence_penalty", sampling.presence_penalty, -MAX_COUNT_PENALTY, MAX_COUNT_PENALTY)
    _check_range("frequency_penalty", sampling.frequency_penalty, -MAX_COUNT_PENALTY, MAX_COUNT_PENALTY)
    _check_range("logprobs", sampling.logprobs or 0, 0, MAX_LOGPROBS)
    _check_range("prompt_logprobs", sampling.prompt_logprobs or 0, 0, MAX_LOGPROBS)
    _check_range("n", sampling.n, 1, MAX_SAMPLES)


def _check_lists(sampling: SamplingParams) -> None:
    _check_length("stop", len(sampling.stop), MAX_STOP_STRINGS, "strings")
    for stop in sampling.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                "sampling.stop", f"a string of {len(stop)} characters; 1 to {MAX_STOP_CHARS} are accepted"
            )
    _check_length("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS, "token ids")
    _check_length("logit_bias", len(sampling.logit_bias), MAX_BIASED_TOKENS, "token ids")
    for bias in sampling.logit_bias.values():
        _check_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
    _check_length("bad_words", len(sampling.bad_words), MAX_BAD_WORDS, "sequences")
    for word in sampling.bad_words:
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                "sampling.bad_words", f"a sequence of {len(word)} tokens; 1 to {MAX_BAD_WORD_TOKENS} are accepted"
            )


def _check_range(field: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails it.
    if not low <= value <= high:
        raise InvalidRequest(f"sampling.{field}", f"{value} is not within [{low:g}, {high:g}]")


def _check_length(field: str, length: int, most: int, what: str) -> None:
    if length > most:
        raise InvalidRequest(f"sampling.{field}", f"{length} {what}; at most {most} are accepted")


def check_token_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises InvalidRequest."""
    outside = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if outside is not None:
        raise InvalidRequest(field, f"token id {outside} is outside the vocabulary of {vocab_size}")
