"""Sends requests, in an open or a closed loop, and writes down what came when.

Times are of the event loop's clock, which processes of one machine share. A client that is too slow would make a server
look slow: so it measures how late it sends what was planned, and how long its own loop keeps a timer waiting.
"""

import asyncio
import resource
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lorasrv_bench.asks import Ask

TICK_S = 0.01


class CallFailed(Exception):
    """A request that the server did not answer to its end; says why."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A message of a stream; `token_ids` is empty where a server tells text only."""

    num_tokens: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class End:
    """What the server says at the end of a stream; None where it does not say."""

    prompt_tokens: int | None
    output_tokens: int | None
    version: str | None = None


class Backend(Protocol):
    """A server as seen from one process."""

    def stream(self, ask: Ask) -> AsyncGenerator[Piece | End, None]:
        """The pieces, then one End. Raises CallFailed."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request as it went; times in seconds since the word go. `piece_s` are those of messages with tokens.

    `planned_s` is None in a closed loop. `version` names the weights that answered, where a server tells; `cold` is
    filled in by whoever knows where they were.
    """

    index: int
    adapter: int | None
    tenant: int
    planned_s: float | None
    sent_s: float
    ended_s: float
    piece_s: tuple[float, ...]
    piece_tokens: tuple[int, ...]
    asked_prompt_tokens: int | None
    asked_output_tokens: int
    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    version: str | None = None
    error: str | None = None
    cold: bool = False

    @property
    def output_tokens(self) -> int:
        return sum(self.piece_tokens)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What one process has measured: `lags_s` is how much later than asked its timer rang, one for each TICK_S."""

    calls: tuple[Call, ...]
    lags_s: tuple[float, ...]
    cpu_s: float
    wall_s: float


async def send(
    asks: Sequence[Ask],
    backend: Backend,
    *,
    start_s: float,
    concurrency: int | None = None,
    advance: Callable[[Call], None] = lambda call: None,
) -> Sent:
    """Send all requests from `start_s` on, of the loop's clock; `advance` gets each as it ends.

    With a `concurrency` the loop is closed: so many are under way at a time, each the next of the list, and their times
    are not looked at. Without one it is open: each is sent at its time, whatever has become of those before.
    """
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start_s - loop.time())
    used_s, begun_s = _cpu_s(), loop.time()
    calls: list[Call] = []
    lags: list[float] = []

    async def one(ask: Ask, planned_s: float | None = None) -> None:
        call = await _call(ask, backend, planned_s, start_s)
        calls.append(call)
        advance(call)

    ticking = asyncio.create_task(_tick(lags))
    try:
        async with asyncio.TaskGroup() as group:
            if concurrency is None:
                for ask in asks:
                    await asyncio.sleep(max(0.0, start_s + ask.at_s - loop.time()))
                    group.create_task(one(ask, ask.at_s))
            else:
                waiting = iter(asks)
                for _ in range(min(concurrency, len(asks))):
                    group.create_task(_worker(waiting, one))
    finally:
        ticking.cancel()
    wall_s = loop.time() - begun_s
    return Sent(
        calls=tuple(sorted(calls, key=lambda call: call.index)),
        lags_s=tuple(lags),
        cpu_s=_cpu_s() - used_s,
        wall_s=wall_s,
    )


async def _worker(waiting: Iterator[Ask], one: Callable[[Ask], Awaitable[None]]) -> None:
    for ask in waiting:
        await one(ask)


async def _tick(lags: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        asked_s = loop.time() + TICK_S
        await asyncio.sleep(TICK_S)
        lags.append(loop.time() - asked_s)


async def _call(ask: Ask, backend: Backend, planned_s: float | None, start_s: float) -> Call:
    loop = asyncio.get_running_loop()
    sent_s = loop.time() - start_s
    times: list[float] = []
    pieces: list[Piece] = []
    end = End(prompt_tokens=None, output_tokens=None)
    error: str | None = None
    try:
        async for event in backend.stream(ask):
            if isinstance(event, Piece):
                pieces.append(event)
                times += [loop.time() - start_s] * (event.num_tokens > 0)
            else:
                end = event
    except CallFailed as failed:
        error = str(failed)
    asked_prompt = None if isinstance(ask.prompt, str) else len(ask.prompt)
    counts = [piece.num_tokens for piece in pieces if piece.num_tokens]
    if end.output_tokens is not None and counts and not pieces[-1].token_ids:
        # Told by text alone, a piece counts as one token; what the server counted more came with the last.
        counts[-1] += max(0, end.output_tokens - sum(counts))
    return Call(
        index=ask.index,
        adapter=ask.adapter,
        tenant=ask.tenant,
        planned_s=planned_s,
        sent_s=sent_s,
        ended_s=loop.time() - start_s,
        piece_s=tuple(times),
        piece_tokens=tuple(counts),
        asked_prompt_tokens=asked_prompt,
        asked_output_tokens=ask.max_tokens,
        prompt_tokens=end.prompt_tokens if end.prompt_tokens is not None else asked_prompt or 0,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        text="".join(piece.text for piece in pieces),
        version=end.version,
        error=error,
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
