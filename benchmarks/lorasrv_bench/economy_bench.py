"""The arms of the memory economy's benchmark on one engine: sent, checked, and set side by side."""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lorasrv.config import DType
from lorasrv.model.families import read_architecture
from lorasrv.types import BASE_ID
from lorasrv_bench.asks import Ask, make_asks
from lorasrv_bench.backends import Server
from lorasrv_bench.checks import TOLERANCES, Scorer, both, check_calls, check_scores, sampled
from lorasrv_bench.clients import Clients
from lorasrv_bench.economy_arms import among_all, distinct_adapters, even_arrivals, gaps_in_storm, in_turn, storm_on
from lorasrv_bench.in_process import InProcess
from lorasrv_bench.load import Call, Sent
from lorasrv_bench.scoring import GrpcScorer
from lorasrv_bench.summary import client_figures, summarize, ttft
from lorasrv_bench.workloads import Arrival, parse_workload

FEW = 5
SCORED = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of all three; `ranks` are the adapters', in turn, and divide `resident`."""

    model: Path
    dtype: DType
    dummy_weights: bool
    adapters: int
    ranks: tuple[int, ...]
    resident: int
    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    storm: int
    hot: int
    hot_rate: float
    storm_s: float
    tenants: int
    greedy: float
    tenant_rate: float
    tenant_s: float
    rounds: int
    seed: int


class Way(Protocol):
    """How requests reach the engine."""

    scorer: Scorer

    async def send(self, asks: Sequence[Ask], concurrency: int | None) -> list[Sent]: ...


class ThroughGrpc:
    def __init__(self, server: Server, clients: Clients) -> None:
        self._scorer = GrpcScorer(server)
        self.scorer: Scorer = self._scorer
        self._server = server
        self._clients = clients

    async def send(self, asks: Sequence[Ask], concurrency: int | None) -> list[Sent]:
        sent, _ = await self._clients.send(self._server, asks, concurrency)
        return sent

    async def close(self) -> None:
        await self._scorer.close()


class Within:
    def __init__(self, process: InProcess) -> None:
        self.scorer: Scorer = process
        self._process = process

    async def send(self, asks: Sequence[Ask], concurrency: int | None) -> list[Sent]:
        return [self._process.send(asks, concurrency)]


@dataclass(frozen=True, kw_only=True)
class Registered:
    """Adapters that a data directory holds: their names, by number, and what these mean."""

    data_dir: Path
    names: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison, measured."""

    calls: tuple[Call, ...]
    wrong: tuple[str, ...]
    client_bound: tuple[str, ...]


class Bench:
    """The arms of one way, on one engine."""

    def __init__(self, setup: Setup, registered: Registered, way: Way) -> None:
        self._setup = setup
        self._registered = registered
        self._way = way
        self._vocab_size = read_architecture(setup.model).vocab_size
        self._num_arms = 0

    async def arm(self, arrivals: Sequence[Arrival], concurrency: int | None, *, scored: bool = True) -> Arm:
        """Send and check; a sample is `scored` too, for which answers of a token say too little.

        Prompts are the arm's own: the prefix cache would know those of an arm before.
        """
        self._num_arms += 1
        seeds = (self._setup.seed, self._num_arms)
        asks = make_asks(arrivals, self._registered.names, seeds, self._vocab_size)
        sent = await self._way.send(asks, concurrency)
        calls = tuple(sorted((call for each in sent for call in each.calls), key=lambda call: call.index))
        by_index = {ask.index: ask for ask in asks}
        verdict = check_calls(calls, by_index, {**self._registered.versions, BASE_ID: ""})
        failed = [f"request {call.index} failed: {call.error}" for call in calls if call.error is not None]
        if scored and not verdict.wrong and not failed:
            sample = sampled(calls, self._setup.seed, SCORED)
            tolerance = TOLERANCES[self._setup.dtype]
            scores = await check_scores(self._way.scorer, sample, by_index, lambda ask: BASE_ID, tolerance)
            verdict = both(verdict, scores)
        return Arm(calls=calls, wrong=(*verdict.wrong, *failed), client_bound=tuple(client_figures(sent)["bound"]))

    async def fill(self, adapters: Sequence[int]) -> Arm:
        """Have these adapters brought to the device, by a request for each."""
        return await self.arm(even_arrivals(adapters, 2, 1), self._setup.concurrency, scored=False)

    async def thousands(self) -> dict[str, Any]:
        setup, rounds = self._setup, list[dict[str, float]]()
        # What is done once belongs to no arm: the builders' start, and that the operating system finds the host
        # cache's memory and has the new files written.
        os.sync()
        arms = [await self.fill(range(setup.adapters))]
        for number in range(setup.rounds):
            asked = {
                "all": among_all(setup.requests, setup.adapters, len(setup.ranks), (setup.seed, number)),
                "resident": in_turn(setup.requests, setup.resident),
                "few": in_turn(setup.requests, FEW),
            }
            found: dict[str, float] = {}
            for name, adapters in asked.items():
                if name != "all":
                    arms.append(await self.fill(sorted(set(adapters))))
                arrivals = even_arrivals(adapters, setup.prompt_tokens, setup.output_tokens)
                arm = await self.arm(arrivals, setup.concurrency)
                arms.append(arm)
                if not arm.wrong:
                    found[name] = summarize(arm.calls, None)["requests_per_s"]
                    found[f"{name}_distinct"] = distinct_adapters(arm.calls)
            rounds.append(found)
        return _told(arms, rounds, {"to_resident": ("all", "resident"), "to_few": ("all", "few")})

    async def storm(self) -> dict[str, Any]:
        setup, rounds = self._setup, list[dict[str, float]]()
        size = f"{setup.prompt_tokens}..{setup.prompt_tokens + 1}", f"{setup.output_tokens}..{setup.output_tokens + 1}"
        workload = parse_workload(
            f"cold_storm:n={setup.storm},hot={setup.hot},rate={setup.hot_rate},duration={setup.storm_s},"
            f"at={setup.storm_s / 4},in_range={size[0]},out_range={size[1]},storm_in={size[0]},storm_out={size[1]}",
            setup.seed,
        )
        arms = [await self.fill(range(setup.hot))]
        for number in range(setup.rounds):
            first = setup.hot + number * setup.storm
            arrivals = storm_on(workload, first)
            found: dict[str, float] = {}
            for name in ("cold", "resident"):
                if name == "resident":
                    arms.append(await self.fill(range(first, first + setup.storm)))
                arm = await self.arm(arrivals, None)
                arms.append(arm)
                if not arm.wrong:
                    gaps = gaps_in_storm(arm.calls, setup.hot)
                    found[name] = float(np.percentile(gaps, 99))
                    found[f"{name}_p50"] = float(np.percentile(gaps, 50))
            rounds.append(found)
        return _told(arms, rounds, {"to_resident": ("cold", "resident")})

    async def tenants(self) -> dict[str, Any]:
        setup, rounds = self._setup, list[dict[str, float]]()
        workload = parse_workload(
            f"tenants:k={setup.tenants},greedy={setup.greedy},rate={setup.tenant_rate},duration={setup.tenant_s},"
            f"in_range=2..{setup.prompt_tokens + 1},out_range=2..{setup.output_tokens + 1}",
            setup.seed,
        )
        modest = [arrival for arrival in workload.arrivals if arrival.tenant]
        arms = [await self.arm([arrival_of(tenant) for tenant in range(setup.tenants)], 1, scored=False)]
        for _ in range(setup.rounds):
            found: dict[str, float] = {}
            for name, arrivals in (("with", workload.arrivals), ("without", modest)):
                arm = await self.arm(arrivals, None)
                arms.append(arm)
                if not arm.wrong:
                    waits = [ttft(call) for call in arm.calls if call.tenant]
                    found[name] = float(np.percentile(waits, 99))
            rounds.append(found)
        return _told(arms, rounds, {"to_without": ("with", "without")})


def arrival_of(tenant: int) -> Arrival:
    """A request that has the tenant's adapter brought to the device."""
    return Arrival(at_s=0.0, adapter=tenant, tenant=tenant, prompt_tokens=2, output_tokens=1)


def _told(
    arms: Sequence[Arm], rounds: Sequence[dict[str, float]], ratios: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """The rounds' figures and the medians of their ratios; only what is wrong, where anything is."""
    wrong = [each for arm in arms for each in arm.wrong]
    if wrong:
        return {"wrong": wrong}
    told: dict[str, Any] = {"wrong": [], "rounds": list(rounds)}
    told |= {name: statistics.median(found[a] / found[b] for found in rounds) for name, (a, b) in ratios.items()}
    return told | {"client_bound": sorted({each for arm in arms for each in arm.client_bound})}
