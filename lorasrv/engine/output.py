"""The output of one sample of a running request: the engine's token deltas in, text and tokens for its caller out."""

from dataclasses import dataclass

from lorasrv.engine.text import TextStream
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.types import EngineRequest, FinishReason, PositionLogprobs, TokenDelta


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a delta gave. With `finish` it is the last one; the engine's sample is to be cancelled if still running.

    `stop` is the stop string or the stop token id that ended the output.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None


class OutputStream:
    """Owned by one thread. `num_tokens` counts the tokens that are the caller's."""

    def __init__(self, vocabulary: Vocabulary, request: EngineRequest, stop: tuple[str, ...]) -> None:
        self._text = TextStream(vocabulary, request.token_ids, stop, request.min_tokens)
        self.num_tokens = 0

    def take(self, delta: TokenDelta) -> Piece:
        # A token that ends the sequence counts, but is not text.
        ended = delta.finish in (FinishReason.EOS, FinishReason.STOP)
        piece = self._text.push(delta.token_ids[:-1] if ended else delta.token_ids)
        # Tokens that were generated behind a stop string in the same delta are not the caller's.
        num_kept = len(delta.token_ids) if piece.stop is None else self._text.num_tokens - self.num_tokens
        kept, logprobs = delta.token_ids[:num_kept], delta.logprobs[:num_kept]
        self.num_tokens += num_kept
        if piece.stop is None and delta.finish is None:
            return Piece(text=piece.text, token_ids=kept, logprobs=logprobs)
        tail = self._text.finish()
        text, finish, stop = piece.text + tail.text, delta.finish, tail.stop
        # What was held back may turn out to hold a stop string.
        if stop is not None:
            return Piece(text=text, token_ids=kept, logprobs=logprobs, finish=FinishReason.STOP, stop=stop)
        return Piece(
            text=text,
            token_ids=kept,
            logprobs=logprobs,
            finish=finish,
            stop=delta.token_ids[-1] if finish is FinishReason.STOP else None,
        )
