"""The clocks that a replayed workload runs by."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since some moment; never falls."""

    def __call__(self) -> float: ...

    def sleep_until(self, at_s: float) -> None:
        """Return when the time is `at_s`, or at once if it has passed."""
        ...


class VirtualClock:
    """Stands still but for those who move it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep_until(self, at_s: float) -> None:
        if at_s > self.now_s:
            self.now_s = at_s


class WallClock:
    """Real seconds since it was made, for the comparison with an engine that really computes."""

    def __init__(self) -> None:
        self._origin_s = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._origin_s

    def sleep_until(self, at_s: float) -> None:
        time.sleep(max(0.0, at_s - self()))
