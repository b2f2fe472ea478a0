"""The serving benchmark: a workload sent to a server, measured at the client, with its output checked.

A run: adapters are made and pushed, what has to be resident is warmed, the workload is sent, the output is checked, the
adapters are removed. A run whose output is wrong has no figures.
"""

import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorasrv.client import AsyncClient, Client
from lorasrv.errors import ConfigurationError
from lorasrv.types import BASE_ID
from lorasrv_bench.asks import Ask, make_asks
from lorasrv_bench.backends import Server
from lorasrv_bench.checks import (
    COMPARED,
    TOLERANCES,
    Verdict,
    both,
    check_calls,
    check_differ,
    check_repeats,
    check_scores,
    sampled,
)
from lorasrv_bench.clients import Clients
from lorasrv_bench.demo_asks import demo_asks, demo_folders
from lorasrv_bench.fresh_adapters import pushed, write_adapters
from lorasrv_bench.load import Call, CallFailed, Sent
from lorasrv_bench.scoring import GrpcScorer
from lorasrv_bench.summary import Slo, client_figures, server_figures, summarize
from lorasrv_bench.watch import Look, watched, with_cold, with_first_use
from lorasrv_bench.workloads import Workload

# Answers `told(n)` for n more that are done of a phase.
Phase = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@contextmanager
def silent(name: str, total: int) -> Iterator[Callable[[], None]]:
    """A phase that nobody looks at."""
    yield lambda: None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a workload is run.

    Without a `concurrency` the loop is open. The first `warm_up` requests are sent once before, to the base. `resident`
    are the adapters that are brought to the device before: those that the workload says, or all, or none.
    """

    server: Server
    workload: Workload
    concurrency: int | None = None
    warm_up: int = 8
    resident: Literal["workload", "all", "none"] = "workload"
    slo: Slo | None = None


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A server that knows the adapters: what is sent, what its names mean (as far as that is known), its vocabulary.

    `info` is what a server of ours says of itself, else None. `exact`: it gives the same answer whatever else it does.
    """

    asks: tuple[Ask, ...]
    versions: Mapping[str, str]
    base_name: str
    exact: bool
    info: Any = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has brought; `start_s` is the word go, on the clock of the looks."""

    calls: tuple[Call, ...]
    looks: tuple[Look, ...]
    start_s: float
    summary: dict[str, Any]

    @property
    def is_right(self) -> bool:
        return not self.summary["checks"]["wrong"]


@contextmanager
def grpc_ready(
    server: Server, workload: Workload, source: Path, kind: Literal["fresh", "demo"], salt: int, phase: Phase = silent
) -> Iterator[Ready]:
    """Our server with the workload's adapters under names of their own, which are gone in the end.

    Another `salt` makes other weights and prompts, of the same sizes: a server may still hold those of runs before.
    `source` is the base's folder, of which only the shapes are read (for "fresh"), or that of the samples (for "demo").
    Raises ConfigurationError for requests that do not fit the server's context, ClientError, OSError.
    """
    run = f"bench-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server.url, api_key=key)) for key in server.api_keys]
        info = clients[0].info()
        asked_by = {a.adapter: a.tenant for a in workload.arrivals if a.adapter is not None}
        if kind == "demo":
            paths = demo_folders(source)
            names = [f"{run}-{path.name}" for path in paths]
            folders, tenants = dict(zip(names, paths, strict=True)), dict.fromkeys(names, 0)
            asks = demo_asks(workload.arrivals, names, workload.seed + salt)
        else:
            _check_room(workload, info.base_model.context_tokens)
            names = [f"{run}-{number:05d}" for number in range(workload.num_adapters)]
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorasrv-bench-")))
            ranks = {number: workload.rank(number) for number in asked_by}
            with phase("make adapters", len(ranks)) as advance:
                made = write_adapters(folder, source, ranks, seeds=(workload.seed, salt), advance=advance)
            folders = {names[number]: path for number, path in made.items()}
            tenants = {names[number]: tenant for number, tenant in asked_by.items()}
            asks = make_asks(workload.arrivals, names, (workload.seed, salt), info.base_model.vocab_size)
        with phase("push adapters", len(folders)) as advance:
            versions = stack.enter_context(pushed(clients, folders, tenants, advance))
        yield Ready(
            asks=tuple(asks),
            versions={**versions, BASE_ID: ""},
            base_name=BASE_ID,
            exact=info.deterministic,
            info=info,
        )


def openai_ready(
    workload: Workload, base_name: str, adapter_names: str, vocab_size: int, salt: int, *, exact: bool
) -> Ready:
    """A server that has the adapters already, adapter number 7 by the name `adapter_names.format(7)`."""
    names = [adapter_names.format(number) for number in range(workload.num_adapters)]
    asks = make_asks(workload.arrivals, names, (workload.seed, salt), vocab_size)
    asks = [replace(ask, name=base_name) if ask.adapter is None else ask for ask in asks]
    return Ready(asks=tuple(asks), versions={}, base_name=base_name, exact=exact)


async def run(setup: Setup, ready: Ready, clients: Clients, phase: Phase = silent) -> Outcome:
    """One run, measured and checked. Raises CallFailed where a client process dies, and ClientError."""
    warm_up = [_for_warming(ask, ready.base_name) for ask in ready.asks[: setup.warm_up]]
    if warm_up:
        with phase("warm up", len(warm_up)) as advance:
            await clients.send(setup.server, warm_up, len(warm_up), lambda _: advance())
    async with _watching(setup, ready, phase) as looks:
        with phase("requests", len(ready.asks)) as advance:
            sent, start_s = await clients.send(setup.server, ready.asks, setup.concurrency, lambda _: advance())
    calls = [call for each in sent for call in each.calls]
    calls = with_cold(calls, looks, start_s) if looks else with_first_use(calls)
    calls.sort(key=lambda call: call.index)
    with phase("check the output", 1):
        verdict = await _verdict(setup, ready, calls)
    return Outcome(
        calls=tuple(calls),
        looks=tuple(looks),
        start_s=start_s,
        summary=_summary(setup, ready, calls, sent, looks, verdict),
    )


def _for_warming(ask: Ask, base_name: str) -> Ask:
    """The same to the base, the prompt backwards: what a server keeps of it serves nothing that is measured."""
    return replace(ask, name=base_name, prompt=ask.prompt[::-1], answer=None, exact_tokens=False)


def _check_room(workload: Workload, context_tokens: int) -> None:
    for arrival in workload.arrivals:
        if arrival.prompt_tokens + arrival.output_tokens > context_tokens:
            raise ConfigurationError(
                f"a request of {arrival.prompt_tokens} + {arrival.output_tokens} tokens is over the server's context "
                f"of {context_tokens}: give the workload shorter in_range and out_range"
            )


@asynccontextmanager
async def _watching(setup: Setup, ready: Ready, phase: Phase) -> AsyncIterator[list[Look]]:
    """Adapters warmed as the setup says; the server's looks from then on, none where it gives none."""
    if ready.info is None:
        yield []
        return
    wanted = range(setup.workload.num_adapters) if setup.resident == "all" else setup.workload.resident
    named = {ask.adapter: ask for ask in ready.asks if ask.adapter is not None}
    warmed = [named[adapter] for adapter in wanted if adapter in named and setup.resident != "none"]
    async with AsyncClient(setup.server.url, api_key=setup.server.api_keys[0]) as client:
        with phase("warm adapters", len(warmed)) if warmed else nullcontext(lambda: None) as advance:
            for ask in warmed:
                await _warm(setup.server, ask)
                advance()
        async with watched(client) as looks:
            yield looks


async def _warm(server: Server, ask: Ask) -> None:
    async with AsyncClient(server.url, api_key=server.api_keys[ask.tenant % len(server.api_keys)]) as client:
        await client.warm(ask.name, "device")


async def _verdict(setup: Setup, ready: Ready, calls: Sequence[Call]) -> Verdict:
    asks = {ask.index: ask for ask in ready.asks}
    verdict = check_calls(calls, asks, ready.versions)
    if verdict.wrong:
        return verdict
    sample = sampled(calls, setup.workload.seed)
    backend = setup.server.connect()
    try:
        verdict = both(verdict, await check_repeats(backend, sample, asks, exact=ready.exact))
        if not any(ask.answer for ask in ready.asks):
            first = ready.asks[0]
            models = list(dict.fromkeys([ready.base_name, *(a.name for a in ready.asks if a.tenant == first.tenant)]))
            prompts = [ask.prompt for ask in ready.asks[:COMPARED] if not isinstance(ask.prompt, str)]
            verdict = both(verdict, await check_differ(backend, models[: COMPARED + 1], prompts, first.tenant))
            if ready.info is not None:
                verdict = both(verdict, await _scored(setup, ready, sample, asks))
    except CallFailed as failed:
        verdict = both(verdict, Verdict(wrong=(f"a check could not be made: {failed}",), done=()))
    finally:
        await backend.close()
    return verdict


async def _scored(setup: Setup, ready: Ready, sample: Sequence[Call], asks: Mapping[int, Ask]) -> Verdict:
    assert ready.info is not None

    def other_than(ask: Ask) -> str | None:
        if ask.adapter is not None:
            return ready.base_name
        return next((each.name for each in ready.asks if each.adapter is not None and each.tenant == ask.tenant), None)

    scorer = GrpcScorer(setup.server)
    try:
        return await check_scores(scorer, sample, asks, other_than, TOLERANCES[ready.info.base_model.dtype])
    finally:
        await scorer.close()


def _summary(
    setup: Setup, ready: Ready, calls: Sequence[Call], sent: Sequence[Sent], looks: Sequence[Look], verdict: Verdict
) -> dict[str, Any]:
    summary: dict[str, Any] = {"checks": {"wrong": list(verdict.wrong), "done": list(verdict.done)}}
    if verdict.wrong:
        return summary
    summary |= summarize(calls, setup.slo)
    summary["client"] = client_figures(sent)
    if looks:
        asked = sum(ask.adapter is not None for ask in ready.asks)
        summary["server"] = server_figures(looks[0].counters, looks[-1].counters, asked)
    return summary
