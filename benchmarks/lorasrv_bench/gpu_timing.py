"""How long a call takes: on a GPU as part of a replayed graph, timed by events; elsewhere by the host's clock.

A list of calls is one round. They do the same work on different data, together beyond the cache, so that none finds
what the one before left there; a call's time is its round's, divided.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
MIN_ROUNDS, MAX_ROUNDS = 5, 100


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    spread: float  # third quartile less first, over the median

    @staticmethod
    def of(seconds: Sequence[float], num_calls: int = 1) -> "Timing":
        median = statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median, median, median)
        return Timing(
            median_s=median / num_calls,
            spread=(quartiles[2] - quartiles[0]) / median if median else 0.0,
        )


class Round:
    """Calls made ready to be timed: run once, which compiles what they need, then captured where there is a GPU."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls = tuple(calls)
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph = capture(self._run)

    def time(self, limit_s: float) -> Timing:
        """At least MIN_ROUNDS rounds, more while the time allows, up to MAX_ROUNDS."""
        seconds: list[float] = []
        end_s = time.monotonic() + limit_s
        self._one()
        while len(seconds) < MIN_ROUNDS or (len(seconds) < MAX_ROUNDS and time.monotonic() < end_s):
            seconds.append(self._one())
        return Timing.of(seconds, len(self._calls))

    def _one(self) -> float:
        run = self._run if self._graph is None else self._graph.replay
        return elapsed_s(run, self._device)

    def _run(self) -> None:
        for call in self._calls:
            call()


def capture(run: Call) -> torch.cuda.CUDAGraph:
    """`run` as a graph, after a run outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def elapsed_s(run: Call, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def free_memory(device: torch.device) -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
