"""Drives the engine's core from whatever thread waits for a result; there is no thread of its own."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from lorasrv.engine.loop import Core
from lorasrv.errors import EngineUnavailable
from lorasrv.offline.interrupts import interrupts_deferred
from lorasrv.offline.runs import Run
from lorasrv.offline.versions import Version, Versions
from lorasrv.types import EngineStatus, TokenDelta


class OfflineCore(Core, Protocol):
    def discard(self, digest: str) -> None:
        """Nobody will ask for this version again, until it is published again: its pages and its image in host memory
        go now, or when the last request that uses it has ended.
        """
        ...

    def check(self) -> None: ...


class Driver:
    """One thread at a time is inside, the others wait; a step that one makes serves the requests of all.

    Ctrl-C is held back while state changes: it ends a call between two steps. An exception of the core is fatal, as its
    state is not known any more: that call and all that follow raise.
    """

    def __init__(self, core: OfflineCore, versions: Versions, max_open: int) -> None:
        """`max_open` bounds the samples that `advance` hands to the core at once."""
        self._core = core
        self._versions = versions
        self._max_open = max_open
        self._lock = threading.Lock()
        self._runs: dict[str, Run] = {}
        self._num_samples = 0
        self._abandoned: deque[Run] = deque()
        self._out_of_service: str | None = None
        self._closed = False

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[dict[str, Version]]:
        """What these names mean now, kept until the block is left. Raises InvalidRequest for an unknown name."""
        held: dict[str, Version] = {}
        try:
            with self._inside():
                found = {name: self._versions.meant_by(name) for name in names}
                for version in found.values():
                    self._versions.retain(version.digest)
                held |= found
            yield held
        finally:
            with self._inside(in_service=False):
                for version in held.values():
                    self._release(version.digest)

    def start(self, run: Run) -> None:
        """Hand a request to the core, for which its version is held; raises QueueFull."""
        with self._inside():
            self._start(run)

    def advance(self, waiting: deque[Run]) -> list[Run]:
        """Start what there is room for, which leaves `waiting` and is returned; then make a step."""
        with self._inside():
            started: list[Run] = []
            while waiting and (not self._runs or self._num_samples + waiting[0].request.n <= self._max_open):
                self._start(waiting[0])
                started.append(waiting.popleft())
            self._step()
            return started

    def wait_for(self, run: Run) -> None:
        """Make a step, unless this request has ended or has something to give by now."""
        with self._inside():
            if not (run.deltas or run.ended):
                self._step()

    def end(self, runs: Iterable[Run]) -> None:
        """Take back those of these requests that have not ended, and what they hold."""
        with self._inside(in_service=False):
            for run in runs:
                self._end(run)

    def abandon(self, run: Run) -> None:
        """`end`, carried out by the next call: for the garbage collector, which may run in the middle of one."""
        self._abandoned.append(run)

    def publish(self, name: str, version: Version) -> None:
        """Let a name mean this version from now on."""
        with self._inside():
            before = self._versions.name(name, version)
            if before is not None:
                self._release(before)

    def unpublish(self, name: str) -> None:
        """Raises InvalidRequest for an unknown name."""
        with self._inside():
            self._release(self._versions.unname(name))

    def status(self) -> EngineStatus:
        with self._inside():
            return self._core.status()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        with self._inside():
            self._core.check()
            self._versions.check()
            assert self._num_samples == sum(run.request.n for run in self._runs.values())
            assert self._core.has_work() == bool(self._runs), "the core and the driver know different requests"

    def close(self) -> None:
        with self._inside(in_service=False):
            if not self._closed:
                self._closed = True
                self._out_of_service = self._out_of_service or "it was closed"
                self._core.close()

    @contextmanager
    def _inside(self, *, in_service: bool = True) -> Iterator[None]:
        """Raises EngineUnavailable when out of service, unless `in_service` says that it does not matter."""
        with self._lock, interrupts_deferred():
            if self._out_of_service is None:
                while self._abandoned:
                    self._end(self._abandoned.popleft())
                self._settle()
            elif in_service:
                raise EngineUnavailable(f"this LLM is out of service: {self._out_of_service}")
            yield
            self._settle()

    # The rest is called inside.

    def _start(self, run: Run) -> None:
        self._core.add(run.request)
        self._runs[run.request.request_id] = run
        self._num_samples += run.request.n
        if run.request.adapter is not None:
            self._versions.retain(run.request.adapter.digest)

    def _step(self) -> None:
        if self._core.has_work():
            with self._fatal():
                for delta in self._core.step():
                    self._take(delta)

    def _settle(self) -> None:
        """Let the core come to rest: what is in flight when the last request has ended is nobody's."""
        with self._fatal():
            while self._out_of_service is None and not self._runs and self._core.has_work():
                self._core.step()

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._out_of_service = f"its engine failed with {type(error).__name__}: {error}"
            raise

    def _take(self, delta: TokenDelta) -> None:
        run = self._runs.get(delta.request_id)
        if run is None or delta.queue_position is not None:
            return  # it was taken back while it was computed, or it waits
        if run.take(delta):
            self._core.cancel(delta.request_id, delta.sample)
        if run.ended:
            self._end(run)

    def _end(self, run: Run) -> None:
        run.ended = True
        if self._runs.pop(run.request.request_id, None) is None:
            return
        self._num_samples -= run.request.n
        if self._out_of_service is None:
            self._core.cancel(run.request.request_id)
        if run.request.adapter is not None:
            self._release(run.request.adapter.digest)

    def _release(self, digest: str) -> None:
        if self._versions.release(digest) and self._out_of_service is None:
            self._core.discard(digest)
