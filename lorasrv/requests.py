"""What a front end hands to the front desk, and what it gets back: plain frozen values, no protobuf."""

from dataclasses import dataclass, field

from lorasrv.types import FinishReason, PositionLogprobs, SamplingParams


@dataclass(frozen=True, kw_only=True)
class AdapterRef:
    """An adapter as a caller names it; `scale` None means 1."""

    name: str
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call, unchecked. `prompt` is text, token ids, or None when the caller set neither.

    With `echo` the prompt comes back with Started.
    """

    tenant: str
    adapters: tuple[AdapterRef, ...]
    prompt: str | tuple[int, ...] | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generation_id: str | None = None
    echo: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Started:
    """The generation was admitted. `version_digest` None is the base model; `prompt` is there with echo."""

    generation_id: str
    version_digest: str | None
    prompt_tokens: int
    seed: int
    prompt: Prompt | None = None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What followed in sample `index`: whole characters, and the tokens they came from or will come from.

    `logprobs`, when asked for, has one for each token; `prompt_logprobs` those that are computed by now: they come with
    sample 0.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of sample `index`. `stop` is the string or the token id that matched.

    Times count from the receipt of the call.
    """

    index: int = 0
    reason: FinishReason
    stop: str | int | None
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_s: float | None
    total_s: float


Event = Started | Delta | Finished
