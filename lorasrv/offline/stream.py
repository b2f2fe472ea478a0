"""One request's output as it comes."""

from collections.abc import Iterator
from types import TracebackType
from typing import Self

from lorasrv.errors import InvalidRequest
from lorasrv.offline.driver import Driver
from lorasrv.offline.results import Delta, Generation, shortened
from lorasrv.offline.runs import Run


class Stream(Iterator[Delta]):
    """The deltas of one prompt. Whoever asks for the next one makes the steps it takes, which serve all other streams
    and calls too: any number of streams can be open, and what one is given while nobody reads it waits for it.

    It keeps the adapter version it began with. Closed, dropped or left by its `with` before its end, it gives back what
    it holds.
    """

    def __init__(self, driver: Driver, run: Run) -> None:
        """Starts the request; raises QueueFull."""
        assert run.deltas is not None
        self._driver = driver
        self._run = run
        self._deltas = run.deltas
        driver.start(run)

    def __next__(self) -> Delta:
        """Raises the error of a request that failed, after what it gave before."""
        while not self._deltas and not self._run.ended:
            self._driver.wait_for(self._run)
        if self._deltas:
            return self._deltas.popleft()
        if self._run.error is not None:
            raise self._run.error
        raise StopIteration

    def result(self) -> Generation:
        """All of it, deltas that were given out included; waits for the end. Raises InvalidRequest when it was closed
        before it."""
        while not self._run.ended:
            self._driver.wait_for(self._run)
            self._deltas.clear()
        if not self._run.complete:
            raise InvalidRequest("", "the stream was closed before its end")
        return self._run.result()

    def close(self) -> None:
        self._driver.end((self._run,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._run.ended:
            self._driver.abandon(self._run)

    def __repr__(self) -> str:
        state = "running" if not self._run.ended else "ended" if self._run.complete else "closed"
        return f"Stream({shortened(self._run.text)}, {state})"
