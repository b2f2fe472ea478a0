"""Servers and engines without a model: tokens follow from the weights' name and what stands before."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lorasrv.types import EngineRequest, FinishReason, PositionLogprobs, TokenDelta
from lorasrv_bench.asks import Ask
from lorasrv_bench.load import CallFailed, End, Piece

VOCAB = 50


def next_token(name: str, before: Sequence[int]) -> int:
    """The likeliest token, which every other is 5 nats behind."""
    return zlib.crc32(f"{name}{list(before)}".encode()) % VOCAB


@dataclass(kw_only=True)
class FakeBackend:
    """A server without a wire, at a set pace.

    `weights` says which weights a name means to it, `told` what it tells of a token and its number.
    """

    ttft_s: float = 0.0
    step_s: float = 0.0
    tokens_per_piece: int = 1
    text_only: bool = False
    weights: Callable[[Ask], str] = lambda ask: ask.name
    told: Callable[[Ask, int, int], int | None] = lambda ask, number, token: token
    at_start: Callable[[Ask], None] = lambda ask: None
    end: Callable[[Ask, int], End] = lambda ask, tokens: End(
        prompt_tokens=len(ask.prompt), output_tokens=tokens, version=ask.name
    )
    num_open: int = 0
    most_open: int = 0
    seen: list[Ask] = field(default_factory=list)

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece | End, None]:
        self.seen.append(ask)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            self.at_start(ask)
            await asyncio.sleep(self.ttft_s)
            tokens = self._tokens(ask)
            for start in range(0, len(tokens), self.tokens_per_piece):
                if start:
                    await asyncio.sleep(self.step_s)
                piece = tuple(tokens[start : start + self.tokens_per_piece])
                text = "".join(chr(97 + token % 26) for token in piece)
                if self.text_only:
                    yield Piece(num_tokens=1, token_ids=(), text=text)
                else:
                    yield Piece(num_tokens=len(piece), token_ids=piece, text=text)
            yield self.end(ask, len(tokens))
        finally:
            self.num_open -= 1

    def _tokens(self, ask: Ask) -> list[int]:
        before = [ord(each) if isinstance(each, str) else each for each in ask.prompt]
        tokens: list[int] = []
        for number in range(ask.max_tokens):
            token = self.told(ask, number, next_token(self.weights(ask), before))
            if token is None:
                break
            before.append(token)
            tokens.append(token)
        return tokens

    async def gaps(self, ask: Ask, token_ids: Sequence[int]) -> list[float]:
        before = [each for each in ask.prompt if isinstance(each, int)]
        found: list[float] = []
        for token in token_ids:
            found.append(0.0 if token == next_token(self.weights(ask), before) else 5.0)
            before.append(token)
        return found

    async def close(self) -> None:
        pass


def refuse(ask: Ask) -> None:
    raise CallFailed("UNAVAILABLE: gone")


def ask(index: int = 0, **values: object) -> Ask:
    fields = {"at_s": 0.0, "name": "a", "adapter": 0, "tenant": 0, "prompt": (1, 2, index), "max_tokens": 4}
    return Ask(index=index, **(fields | values))


def greedy(request: EngineRequest, wrong_at: int | None = None) -> Iterator[TokenDelta]:
    """An engine's answer, with scores; its token number `wrong_at` is not the likeliest."""
    weights = "" if request.adapter is None else request.adapter.digest
    tokens = list(request.token_ids)
    scores = [score(token, next_token(weights, tokens[:place])) for place, token in enumerate(tokens) if place]
    for number in range(request.max_tokens):
        token = (next_token(weights, tokens) + (number == wrong_at)) % VOCAB
        tokens.append(token)
        yield TokenDelta(
            request_id=request.request_id,
            token_ids=(token,),
            logprobs=() if request.logprobs is None else (score(token, token),),
            prompt_logprobs=() if request.prompt_logprobs is None or number else tuple(scores),
            finish=FinishReason.LENGTH if number == request.max_tokens - 1 else None,
        )


def score(token: int, best: int) -> PositionLogprobs:
    return PositionLogprobs(token_id=token, logprob=-0.1 if token == best else -5.0, top=((best, -0.1),))
