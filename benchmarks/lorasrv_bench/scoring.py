"""How likely an answer's tokens are, by a server's own log-probabilities of the answer as part of a prompt."""

from collections.abc import Sequence
from typing import Any

from lorasrv.client import AsyncClient, ClientError
from lorasrv.types import PositionLogprobs
from lorasrv_bench.asks import Ask
from lorasrv_bench.backends import Server
from lorasrv_bench.load import CallFailed

BEST = 5


def gaps_of(
    prompt_tokens: int, before: Sequence[PositionLogprobs], last: PositionLogprobs, token_ids: Sequence[int]
) -> list[float]:
    """For each token of the answer, the best log-probability in its place less its own.

    `before` are the places of prompt and answer from the second token on, all but the answer's last one; `last` is what
    came behind them, with its BEST likeliest: where the answer's last token is not among those, it is as far off as the
    last of them, at least.
    """
    places = before[prompt_tokens - 1 :]
    assert len(places) == len(token_ids) - 1, (len(places), len(token_ids))
    named = {**dict(last.top), last.token_id: last.logprob}
    last_gap = max(named.values()) - named.get(token_ids[-1], min(named.values()))
    return [*(place.top[0][1] - place.logprob for place in places), last_gap]


class GrpcScorer:
    """Ours."""

    def __init__(self, server: Server) -> None:
        self._clients = [AsyncClient(server.url, api_key=key) for key in server.api_keys]

    async def gaps(self, ask: Ask, token_ids: Sequence[int]) -> list[float]:
        try:
            answer = await self._clients[ask.tenant % len(self._clients)].generate(
                (*ask.tokens, *token_ids[:-1]),
                adapter=ask.name,
                temperature=0.0,
                max_tokens=1,
                ignore_eos=True,
                ignore_version_defaults=True,
                logprobs=BEST,
                prompt_logprobs=1,
            )
        except ClientError as error:
            raise CallFailed(f"{error.code.name}: {error.message}") from None
        before = [_place(position) for position in answer.prompt_logprobs]
        return gaps_of(len(ask.prompt), before, _place(answer.logprobs[0]), token_ids)

    async def close(self) -> None:
        for client in self._clients:
            await client.__aexit__(None, None, None)


def _place(position: Any) -> PositionLogprobs:
    return PositionLogprobs(
        token_id=position.token.token_id,
        logprob=position.token.logprob,
        top=tuple((each.token_id, each.logprob) for each in position.top),
    )
