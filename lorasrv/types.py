"""Frozen values that cross threads and processes. Standard library only."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, Self

BASE_ID = "base"
DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16


class FinishReason(StrEnum):
    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


class Priority(IntEnum):
    """Classes of the queue; the lower one goes first."""

    NORMAL = 0
    BATCH = 1


class Tier(StrEnum):
    """Where an adapter's weights are, highest tier they have reached.

    QUEUED are to be read to the host, READING are; COPYING have left the host for the device.
    """

    DISK = "disk"
    QUEUED = "queued"
    READING = "reading"
    HOST = "host"
    COPYING = "copying"
    DEVICE = "device"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, and when drawing ends. The wire's SamplingParams says what each field means.

    None, or an empty list or map, is unset: then the adapter version's default holds if it has one, else the system's,
    which `CompleteSampling` states. `temperature` 0 is greedy; `top_k` 0 keeps all tokens; `logprobs` 0 gives those of
    the drawn tokens alone; `n` samples are drawn of one prompt.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        # A string is a sequence of strings too, and other engines take one.
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))

    def given(self) -> dict[str, Any]:
        """The fields that are set."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if value is not None and not (isinstance(value, Sized) and len(value) == 0)
        }

    def over(self, defaults: "SamplingParams") -> "SamplingParams":
        """The same, with `defaults` for what is unset."""
        return replace(defaults, **self.given())


@dataclass(frozen=True, kw_only=True)
class CompleteSampling(SamplingParams):
    """With the system's defaults for what is unset. What may still be None is up to the request: `max_tokens` to its
    prompt, a `seed` is drawn, `top_k` keeps all, `logprobs` are not sent.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1

    @classmethod
    def of(cls, sampling: SamplingParams) -> Self:
        return cls(**sampling.given())


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """What a request does to its logits before tokens are drawn; see `engine.sampling`."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AdapterUse:
    """One adapter version as a request uses it; `scale` multiplies the adapter's own."""

    digest: str
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """A validated, tokenized request. `adapter` None is the base model; `rules` None leaves the logits as they are.

    `n` samples of one prompt are drawn, each with its own numbers. Only requests of one `tenant` share cached prefixes;
    tenants get service by their `weight`. At `deadline_s`, on `time.monotonic`, which is one clock for all processes of
    a machine, the request is over. `session_key` tells a router of replicas which requests belong together.
    """

    request_id: str
    token_ids: tuple[int, ...]
    adapter: AdapterUse | None
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    rules: LogitRules | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    tenant: str = ""
    weight: float = 1.0
    priority: Priority = Priority.NORMAL
    session_key: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Warm:
    """An adapter version that is wanted in memory before a request asks for it: in `tier`, HOST or DEVICE, or above.

    At `deadline_s`, on `time.monotonic`, it is over.
    """

    warm_id: int
    digest: str
    tier: Tier
    deadline_s: float


@dataclass(frozen=True, kw_only=True)
class PositionLogprobs:
    """The model's own log-probabilities at one position: of the token there, and of the likeliest, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error on its way through a process boundary: see `errors.error_from_reason`."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """What became of a `Warm`: the `tier` that the adapter was in when this was told, or why it is in none."""

    warm_id: int
    tier: Tier | None = None
    failure: Failure | None = None


class TokenDelta(NamedTuple):
    """What one step added to one sample of a request, number `sample` of its `n`.

    After `finish` nothing follows for that sample, after `failure` nothing for the request. `finish` STOP means that
    the last token is a stop token id. `logprobs`, when asked for, has one for each token; `prompt_logprobs` those of
    the prompt tokens, from the second on, that were computed in this step: sample 0 has them. `queue_position`, of a
    request that has not begun, is how many of its tenant stand before it; such a delta has nothing else.
    """

    request_id: str
    sample: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    queue_position: int | None = None
    finish: FinishReason | None = None
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What start-up found out."""

    device: str
    dtype: str
    vocab_size: int
    context_tokens: int
    block_tokens: int
    page_bytes: int
    num_pages: int


@dataclass(frozen=True, kw_only=True)
class AdapterResidency:
    """One adapter version above the disk tier, or whose last read failed: then there is a `failure`."""

    digest: str
    tier: Tier
    num_pages: int
    pins: int
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class EngineCounters:
    """Totals since the engine started. `prompt_tokens` were computed, `cached_prompt_tokens` found in the cache."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    finished_requests: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    preemptions: int = 0


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Pages by owner; the counts after `num_pages` add up to it. `prefix` are cached blocks, in use or idle."""

    num_pages: int
    free: int
    sequences: int
    prefix: int
    adapters: int


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    pool: PoolStats
    running: int
    waiting: int
    pins: int
    adapters: tuple[AdapterResidency, ...]
    counters: EngineCounters = field(default_factory=EngineCounters)
