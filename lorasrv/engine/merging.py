"""Deltas that nobody has taken yet, put together: what a lagging reader gets is fewer and longer, never more."""

from lorasrv.types import Failure, FinishReason, PositionLogprobs, TokenDelta


class MergingDelta:
    """The deltas of one sample as one. Owned by one thread."""

    def __init__(self, first: TokenDelta) -> None:
        self._first = first
        self._is_merged = False
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._queue_position: int | None = None
        self._finish: FinishReason | None = None
        self._failure: Failure | None = None

    def add(self, delta: TokenDelta) -> None:
        if not self._is_merged:
            self._is_merged = True
            self._extend(self._first)
        self._extend(delta)

    def delta(self) -> TokenDelta:
        if not self._is_merged:
            return self._first
        return TokenDelta(
            request_id=self._first.request_id,
            sample=self._first.sample,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=tuple(self._prompt_logprobs),
            queue_position=self._queue_position,
            finish=self._finish,
            failure=self._failure,
        )

    def _extend(self, delta: TokenDelta) -> None:
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)
        self._prompt_logprobs.extend(delta.prompt_logprobs)
        self._queue_position = delta.queue_position
        # Behind the end of sample 0 there may come a failure, which is the whole request's.
        self._finish = self._finish or delta.finish
        self._failure = delta.failure
