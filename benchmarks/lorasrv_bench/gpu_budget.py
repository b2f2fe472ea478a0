"""Who may take how long: a section gets its share of the time that is left, so what one leaves over the others have."""

import time
from collections.abc import Callable, Mapping

Clock = Callable[[], float]


def allowances(shares: Mapping[str, float], left_s: float) -> dict[str, float]:
    """Seconds of each section if every one takes just its share."""
    total = sum(shares.values())
    return {name: left_s * share / total for name, share in shares.items()}


class Deadline:
    """A time on a clock. `remains(estimate_s)` is asked before a case begins: one that does not fit is not begun."""

    def __init__(self, limit_s: float, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._end_s = clock() + limit_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - self._clock())

    def remains(self, estimate_s: float = 0.0) -> bool:
        return self.left_s > estimate_s


class Budget:
    """Time for sections in a fixed order."""

    def __init__(self, shares: Mapping[str, float], limit_s: float, clock: Clock = time.monotonic) -> None:
        self._shares = dict(shares)
        self._deadline = Deadline(limit_s, clock)

    def take(self, name: str) -> float:
        """Seconds for this section, those before it being over. Raises KeyError for one that had its turn."""
        if name not in self._shares:
            raise KeyError(name)
        while next(iter(self._shares)) != name:
            del self._shares[next(iter(self._shares))]
        own = allowances(self._shares, self._deadline.left_s)[name]
        del self._shares[name]
        return own
