"""An engine in this process as something to send load to: what `load.send` does for a server, step by step."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lorasrv.types import BASE_ID, AdapterUse, EngineRequest, PositionLogprobs
from lorasrv_bench.asks import Ask
from lorasrv_bench.load import Call, CallFailed, Sent
from lorasrv_bench.scoring import BEST, gaps_of


class Core(Protocol):
    """What is asked of an EngineCore."""

    def add(self, request: EngineRequest) -> None: ...

    def step(self) -> Sequence[Any]:
        """The TokenDeltas of a step."""
        ...

    def has_work(self) -> bool: ...


class InProcess:
    """Requests to a core, whose steps are made here; `versions` are the digests that names mean."""

    def __init__(self, core: Core, versions: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._versions = versions
        self._clock = clock
        self._num_sent = 0

    def send(self, asks: Sequence[Ask], concurrency: int | None) -> Sent:
        """Send all requests and make steps until they have ended: in an open loop by their times, or so many at a time.

        In an open loop a request counts from its time, whatever was left of the step that was under way then.
        """
        used_s, start_s = time.process_time(), self._clock()
        waiting, open_calls, calls = deque(asks), dict[str, _Open](), list[Call]()
        while waiting or open_calls:
            now_s = self._clock() - start_s
            while waiting and (waiting[0].at_s <= now_s if concurrency is None else len(open_calls) < concurrency):
                ask = waiting.popleft()
                request = self._request(ask)
                open_calls[request.request_id] = _Open(ask, now_s if concurrency else None)
                self._core.add(request)
            if not open_calls:
                time.sleep(max(0.0, waiting[0].at_s - now_s))
                continue
            deltas = self._core.step()
            now_s = self._clock() - start_s
            for delta in deltas:
                if open_calls[delta.request_id].take(delta, now_s):
                    calls.append(open_calls.pop(delta.request_id).call(now_s, self._versions))
        wall_s = self._clock() - start_s
        calls.sort(key=lambda call: call.index)
        return Sent(calls=tuple(calls), lags_s=(), cpu_s=time.process_time() - used_s, wall_s=wall_s)

    async def gaps(self, ask: Ask, token_ids: Sequence[int]) -> list[float]:
        """As `checks.Scorer` says."""
        alone = replace(ask, prompt=(*ask.tokens, *token_ids[:-1]), max_tokens=1)
        self._core.add(self._request(alone, logprobs=BEST, prompt_logprobs=1))
        before: list[PositionLogprobs] = []
        behind: list[PositionLogprobs] = []
        while self._core.has_work():
            for delta in self._core.step():
                if delta.failure is not None:
                    raise CallFailed(delta.failure.message)
                before += delta.prompt_logprobs
                behind += delta.logprobs
        return gaps_of(len(ask.prompt), before, behind[0], token_ids)

    def _request(self, ask: Ask, **values: Any) -> EngineRequest:
        self._num_sent += 1
        digest = None if ask.name == BASE_ID else self._versions[ask.name]
        return EngineRequest(
            request_id=f"bench-{self._num_sent}",
            token_ids=ask.tokens,
            adapter=None if digest is None else AdapterUse(digest=digest),
            max_tokens=ask.max_tokens,
            seed=0,
            temperature=0.0,
            ignore_eos=True,
            **values,
        )


class _Open:
    """A request under way, and what has come of it."""

    def __init__(self, ask: Ask, sent_s: float | None) -> None:
        self._ask = ask
        self._planned_s = ask.at_s if sent_s is None else None
        self._sent_s = ask.at_s if sent_s is None else sent_s
        self._times: list[float] = []
        self._counts: list[int] = []
        self._tokens: list[int] = []
        self._error: str | None = None

    def take(self, delta: Any, now_s: float) -> bool:
        """Keep a delta; whether it is the last one."""
        if delta.token_ids:
            self._times.append(now_s)
            self._counts.append(len(delta.token_ids))
            self._tokens += delta.token_ids
        if delta.failure is not None:
            self._error = delta.failure.message
        return delta.finish is not None or delta.failure is not None

    def call(self, now_s: float, versions: Mapping[str, str]) -> Call:
        prompt_tokens = len(self._ask.prompt)
        return Call(
            index=self._ask.index,
            adapter=self._ask.adapter,
            tenant=self._ask.tenant,
            planned_s=self._planned_s,
            sent_s=self._sent_s,
            ended_s=now_s,
            piece_s=tuple(self._times),
            piece_tokens=tuple(self._counts),
            asked_prompt_tokens=prompt_tokens,
            asked_output_tokens=self._ask.max_tokens,
            prompt_tokens=prompt_tokens,
            token_ids=tuple(self._tokens),
            text="",
            version=versions.get(self._ask.name, ""),
            error=self._error,
        )
