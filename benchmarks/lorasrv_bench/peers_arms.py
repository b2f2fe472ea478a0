"""Those who answer: the peers of this process, ours in process and through gRPC, and servers by URL."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorasrv.client import Client
from lorasrv.config import DType, SchedulerConfig
from lorasrv.demo.local_server import LocalServer
from lorasrv.llm import LLM
from lorasrv_bench.asks import Ask
from lorasrv_bench.backends import Server
from lorasrv_bench.bench_model import tokens_of_text
from lorasrv_bench.clients import Clients
from lorasrv_bench.fresh_adapters import pushed
from lorasrv_bench.offline import generate
from lorasrv_bench.peers_transformers import Answer, Models, Settings, answered
from lorasrv_bench.summary import client_figures

POOL_MIB = 512


@dataclass(frozen=True, kw_only=True)
class Material:
    """What all are given: a base and adapters on disk, named by number."""

    model: Path
    adapters: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Answers in the requests' order, and how long they took; `bound` says why the client may be what was measured."""

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    bound: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class Arm(Protocol):
    """Answers requests, so many at a time as it was made for."""

    def answer(self, asks: Sequence[Ask]) -> Answered: ...


class PeerArm:
    def __init__(self, kind: Answer, models: Models, settings: Settings) -> None:
        self._kind = kind
        self._models = models
        self._settings = settings

    def answer(self, asks: Sequence[Ask]) -> Answered:
        return timed(lambda: answered(self._kind, self._models, self._settings, asks))


class InProcessArm:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def answer(self, asks: Sequence[Ask]) -> Answered:
        return timed(lambda: [output.token_ids for output in generate(self._llm, asks)])


class ServedArm:
    """A server, ours or another: a closed loop of one client process."""

    def __init__(self, server: Server, clients: Clients, concurrency: int) -> None:
        self._server = server
        self._clients = clients
        self._concurrency = concurrency

    def answer(self, asks: Sequence[Ask]) -> Answered:
        sent, _ = asyncio.run(self._clients.send(self._server, asks, self._concurrency))
        calls = sorted((call for each in sent for call in each.calls), key=lambda call: call.index)
        failed = [call.error for call in calls if call.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(calls)} requests failed: {failed[0]}")
        return Answered(
            tokens=tuple(call.token_ids or tokens_of_text(call.text) or () for call in calls),
            seconds=max(call.ended_s for call in calls) - min(call.sent_s for call in calls),
            bound=tuple(client_figures(sent)["bound"]),
        )


def timed(answer: Callable[[], Sequence[Sequence[int]]]) -> Answered:
    begun_s = time.perf_counter()
    found = answer()
    return Answered(tokens=tuple(map(tuple, found)), seconds=time.perf_counter() - begun_s)


@contextmanager
def ours(
    material: Material, dtype: DType, concurrency: int, clients: Clients, folder: Path
) -> Iterator[dict[str, Arm]]:
    """Ours, in process and through gRPC, with all adapters registered."""
    options = ("--dtype", dtype, "--max-running", str(concurrency), "--pool-mib", str(POOL_MIB))
    with ExitStack() as stack:
        llm = stack.enter_context(
            LLM(
                material.model,
                dtype=dtype,
                pool_bytes=POOL_MIB << 20,
                scheduler=SchedulerConfig(max_running=concurrency, max_step_tokens=max(512, concurrency)),
            )
        )
        for name, path in material.adapters.items():
            llm.add_adapter(name, path)
        server = stack.enter_context(LocalServer(material.model, folder / dtype, folder / f"{dtype}.log", options))
        client = stack.enter_context(Client(server.url))
        stack.enter_context(pushed([client], material.adapters, dict.fromkeys(material.adapters, 0)))
        served = ServedArm(Server(api="grpc", url=server.url), clients, concurrency)
        yield {"ours, through gRPC": served, "ours, in process": InProcessArm(llm)}


def by_url(url: str, clients: Clients, concurrency: int, lora_ids: Mapping[str, int] | None) -> Arm:
    """Another server that was started on the same material, whose names it knows: adapters as models, or by number."""
    return ServedArm(Server(api="openai", url=url, lora_ids=lora_ids), clients, concurrency)
