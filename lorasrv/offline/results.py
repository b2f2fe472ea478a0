"""What the offline face gives back."""

from dataclasses import dataclass

from lorasrv.errors import InvalidRequest, LorasrvError
from lorasrv.types import FinishReason, PositionLogprobs

_SHOWN_CHARS = 60


@dataclass(frozen=True, kw_only=True, repr=False)
class Sample:
    """One output of a prompt. `stop` is the stop string or stop token id that ended it; `logprobs` has one for each
    token, or is None where the sampling did not ask.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    stop: str | int | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None

    def __repr__(self) -> str:
        return f"Sample({shortened(self.text)}, {self.finish}, {len(self.token_ids)} tokens)"


@dataclass(frozen=True, kw_only=True, repr=False)
class Generation:
    """What became of one prompt. `version_digest` None is the base model; `seed` repeats it.

    `samples` has the `n` that the sampling asked for. Where that is one, its fields can be had here: `text`,
    `token_ids`, `finish`, `stop` and `logprobs`. `prompt_logprobs` has one for each prompt token but the first, or is
    None where the sampling did not ask.

    A request that failed while it ran has its `error` and no samples; asking for its `text` raises that.
    """

    samples: tuple[Sample, ...]
    prompt_tokens: int
    version_digest: str | None
    seed: int
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    error: LorasrvError | None = None

    @property
    def text(self) -> str:
        return self._only.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self._only.token_ids

    @property
    def finish(self) -> FinishReason:
        return self._only.finish

    @property
    def stop(self) -> str | int | None:
        return self._only.stop

    @property
    def logprobs(self) -> tuple[PositionLogprobs, ...] | None:
        return self._only.logprobs

    @property
    def _only(self) -> Sample:
        if self.error is not None:
            raise self.error
        if len(self.samples) != 1:
            raise InvalidRequest("samples", f"there are {len(self.samples)}; take one of `samples`")
        return self.samples[0]

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Generation({type(self.error).__name__}: {self.error})"
        if len(self.samples) != 1:
            return f"Generation({len(self.samples)} samples)"
        return f"Generation{str(self.samples[0]).removeprefix('Sample')}"


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a stream's next step gave to sample number `index`: whole characters, and the tokens they came from or will
    come from. The last one of a sample has `finish`, and `stop`, the stop string or token id that ended it.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None


def shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…")
