"""Metrics for Prometheus: what calls came to and how long tokens took, counted here; the engine's state, asked for.

No label has more values than this file, the proto files and the gRPC codes name: neither tenants nor adapters.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lorasrv.engine.client import Engine
from lorasrv.errors import ConfigurationError, EngineUnavailable
from lorasrv.requests import Delta, Event, Finished
from lorasrv.types import EngineStatus, Tier
from lorasrv.v1 import adapter_pb2, generation_pb2, server_pb2

STATUS_TIMEOUT_S = 2.0

_PACKAGE_PREFIX = "/lorasrv.v1."
_METHODS = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in (generation_pb2, adapter_pb2, server_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
_DEADLINE_SLACK_S = 0.01
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_NEXT_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_GENERATION_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)

Context = grpc.aio.ServicerContext[Any, Any]


class Metrics:
    """One registry of its own. Counting belongs to the event loop; scrapes may come from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "lorasrv_calls",
            "Calls that have ended, by method and gRPC code.",
            ["method", "code"],
            registry=self.registry,
        )
        self._first_token = Histogram(
            "lorasrv_time_to_first_token_seconds",
            "From the receipt of a call to the first token of each of its samples.",
            buckets=_FIRST_TOKEN_S,
            registry=self.registry,
        )
        self._next_token = Histogram(
            "lorasrv_inter_token_latency_seconds",
            "Time between two deltas of a sample, by the tokens that the second brings. A slow reader's are longer.",
            buckets=_NEXT_TOKEN_S,
            registry=self.registry,
        )
        self._generation = Histogram(
            "lorasrv_generation_duration_seconds",
            "From the receipt of a call to the end of each of its samples that have finished.",
            buckets=_GENERATION_S,
            registry=self.registry,
        )
        self.engine_state = EngineCollector(engine)
        self.registry.register(self.engine_state)

    async def observed(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The same events, timed as they pass."""
        received_s = time.monotonic()
        told_s: dict[int, float] = {}
        async with aclosing(events):
            async for event in events:
                match event:
                    case Delta() if event.token_ids:
                        now_s, before_s = time.monotonic(), told_s.get(event.index)
                        told_s[event.index] = now_s
                        if before_s is None:
                            self._first_token.observe(now_s - received_s)
                        else:
                            self._next_token.observe((now_s - before_s) / len(event.token_ids))
                    case Finished():
                        self._generation.observe(event.total_s)
                    case _:
                        pass
                yield event


class CallCounter(grpc.aio.ServerInterceptor):
    """Counts our calls by how they ended; to stand before all other interceptors."""

    def __init__(self, metrics: Metrics) -> None:
        self._calls = metrics.calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(_PACKAGE_PREFIX):
            return handler
        # What is refused before it is looked up may have any name.
        name = method.removeprefix(_PACKAGE_PREFIX) if method in _METHODS else "other"
        kind = "_".join(
            "stream" if flag else "unary" for flag in (handler.request_streaming, handler.response_streaming)
        )
        return handler._replace(**{kind: self._counted(getattr(handler, kind), name)})

    def _counted(self, behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            code = grpc.StatusCode.OK
            try:
                return await behaviour(request, context)
            except asyncio.CancelledError:
                code = _why_cancelled(context)
                raise
            except BaseException:
                code = _code_of(context)
                raise
            finally:
                self._calls.labels(method, code.name).inc()

        return call


def _why_cancelled(context: Context) -> grpc.StatusCode:
    left_s = context.time_remaining()
    passed = left_s is not None and left_s < _DEADLINE_SLACK_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if passed else grpc.StatusCode.CANCELLED


def _code_of(context: Context) -> grpc.StatusCode:
    """What a call that failed was answered with; one whose caller had gone was not."""
    found: Any = context.code()
    named = next((code for code in grpc.StatusCode if found in (code, code.value[0])), None)
    return named if named not in (None, grpc.StatusCode.OK) else grpc.StatusCode.CANCELLED


class EngineCollector(Collector):
    """The engine's status as metrics, asked for by each scrape. While there is none, only that is told."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Scrapes ask in this loop, which is the engine's, from other threads; before, they get nothing."""
        self._loop = loop

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        status = self._status()
        yield GaugeMetricFamily(
            "lorasrv_engine_ready", "1 while the engine answers, else 0.", 0 if status is None else 1
        )
        if status is not None:
            yield from _families(status)

    def _status(self) -> EngineStatus | None:
        if self._loop is None or self._loop.is_closed():
            return None
        asked = asyncio.run_coroutine_threadsafe(self._engine.status(), self._loop)
        try:
            return asked.result(STATUS_TIMEOUT_S)
        except (EngineUnavailable, TimeoutError):
            asked.cancel()
            return None


def _families(status: EngineStatus) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
    yield GaugeMetricFamily("lorasrv_running_sequences", "Sequences that hold pages.", status.running)
    yield GaugeMetricFamily("lorasrv_waiting_sequences", "Sequences in the queue.", status.waiting)
    yield GaugeMetricFamily("lorasrv_adapter_pins", "References of running requests on adapters.", status.pins)
    yield _by_label("lorasrv_pool_pages", "Pages of the device pool.", "owner", _owners(status))
    yield _by_label("lorasrv_adapters", "Adapter versions above the disk, or that failed.", "tier", _tiers(status))
    counters = status.counters
    prompt_tokens = CounterMetricFamily(
        "lorasrv_prompt_tokens", "Prompt tokens, computed or found in the prefix cache.", labels=["source"]
    )
    prompt_tokens.add_metric(["computed"], counters.prompt_tokens)
    prompt_tokens.add_metric(["cached"], counters.cached_prompt_tokens)
    yield prompt_tokens
    for name, text, value in (
        ("generated_tokens", "Tokens drawn.", counters.completion_tokens),
        ("finished_requests", "Requests that the engine has finished.", counters.finished_requests),
        ("engine_steps", "Steps of the engine.", counters.steps),
        ("adapter_loads", "Adapters copied to the device.", counters.adapter_loads),
        ("adapter_evictions", "Adapters taken off the device.", counters.adapter_evictions),
        ("preemptions", "Running sequences put back into the queue.", counters.preemptions),
    ):
        yield CounterMetricFamily(f"lorasrv_{name}", text, value)


def _owners(status: EngineStatus) -> dict[str, int]:
    pool = status.pool
    return {"free": pool.free, "sequences": pool.sequences, "prefix": pool.prefix, "adapters": pool.adapters}


def _tiers(status: EngineStatus) -> dict[str, int]:
    counts = {tier.value: 0 for tier in Tier if tier is not Tier.DISK}
    for adapter in status.adapters:
        counts[adapter.tier.value] += 1
    return counts


def _by_label(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


class MetricsEndpoint:
    """http://ADDRESS/metrics, in threads of its own, from construction to `close`."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Raises ConfigurationError when the address cannot be had. Called in the event loop of the engine."""
        metrics.engine_state.attach(asyncio.get_running_loop())
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise ConfigurationError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from None
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Blocks until a scrape that runs has its answer; not to be called in the event loop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
