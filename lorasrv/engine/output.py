"""The output of one running request: the engine's token deltas in, text and tokens for its caller out."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from lorasrv.engine.text import TextStream
from lorasrv.types import EngineRequest, FinishReason, TokenDelta


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a delta gave. With `finish` it is the last one; the engine's request is to be cancelled if still running."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    stop: str | None = None


class OutputStream:
    """Owned by one thread. `num_tokens` counts the tokens that are the caller's."""

    def __init__(self, tokenizer: Tokenizer, request: EngineRequest, stop: tuple[str, ...]) -> None:
        self._text = TextStream(tokenizer, request.token_ids, stop)
        self.num_tokens = 0

    def take(self, delta: TokenDelta) -> Piece:
        # An end-of-sequence token counts, but is not text.
        visible = delta.token_ids[:-1] if delta.finish is FinishReason.EOS else delta.token_ids
        piece = self._text.push(visible)
        finish = FinishReason.STOP if piece.stop is not None else delta.finish
        # Tokens that were generated behind a stop string in the same delta are not the caller's.
        kept = delta.token_ids if piece.stop is None else delta.token_ids[: self._text.num_tokens - self.num_tokens]
        self.num_tokens += len(kept)
        if finish is None:
            return Piece(text=piece.text, token_ids=kept)
        tail = self._text.finish()
        # What was held back may turn out to hold a stop string.
        finish = finish if tail.stop is None else FinishReason.STOP
        return Piece(text=piece.text + tail.text, token_ids=kept, finish=finish, stop=tail.stop)
