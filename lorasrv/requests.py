"""What a front end hands to the front desk, and what it gets back: plain frozen values, no protobuf."""

from dataclasses import dataclass, field

from lorasrv.types import FinishReason, PositionLogprobs, Priority, SamplingParams


@dataclass(frozen=True, kw_only=True)
class AdapterRef:
    """An adapter as a caller names it; `scale` None means 1."""

    name: str
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """`role` is what the model's chat template knows: system, user, assistant, as a rule."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation whose next message is asked for."""

    messages: tuple[ChatMessage, ...]

    def with_system(self, prompt: str | None) -> "Chat":
        """The same behind a system message, unless it begins with one or there is none to add."""
        if prompt is None or (self.messages and self.messages[0].role == "system"):
            return self
        return Chat(messages=(ChatMessage(role="system", content=prompt), *self.messages))


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call, unchecked. `prompt` is text, token ids, a chat, or None when the caller set none of them.

    With `echo` the prompt comes back with Started. What `sampling` leaves unset, and the system prompt of a chat, are
    the adapter version's own, unless `ignore_version_defaults`. `deadline_s` is when the caller stops waiting, on
    `time.monotonic`; `weight` is the tenant's share beside others'.
    """

    tenant: str
    adapters: tuple[AdapterRef, ...]
    prompt: str | tuple[int, ...] | Chat | None
    ignore_version_defaults: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generation_id: str | None = None
    echo: bool = False
    priority: Priority = Priority.NORMAL
    session_key: str | None = None
    deadline_s: float | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as text and as tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A prompt's tokens; `offsets` say where each stands in `text`, in characters."""

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Started:
    """The generation was admitted. `version_digest` None is the base model; `prompt` is there with echo."""

    generation_id: str
    version_digest: str | None
    prompt_tokens: int
    seed: int
    prompt: Prompt | None = None


@dataclass(frozen=True, kw_only=True)
class Queued:
    """So many stand before it. Told between Started and the first Delta, if it waits for long."""

    position: int


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


Event = Started | Queued | Delta | Finished
