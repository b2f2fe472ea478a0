"""How likely something is to be used again, learned from what became of things that were used as often. Numbers only.

The likelihood is the expected number of uses to come, one after t requests counting 2^(-t / HORIZON): what is used
after that is gone by then. It is learned for each class of how often a thing was used, 0, 1, 2-3, 4-7 … times again:

    likelihood(class) = sum over uses of the class that were followed by another one, after t requests and then of a
                        class c', of 2^(-t / HORIZON) * (1 + likelihood(c'))   /   number of uses of the class

Plain counts say that a conversation's blocks, each used at every turn, are worth the more the longer it has gone on; in
fact it may end at any turn. And they say that a prompt is worth one use after its first, which most prompts never see.
(Likelihoods by class of past use: LHD, NSDI 2018.)
"""

from dataclasses import dataclass
from math import frexp

HORIZON = 1024
_NUM_CLASSES = 24
# At first it is as if so many uses of every class had been seen, and things used k times again would be k times more;
# one that was used once, with an even chance.
_ASSUMED_USES = 64.0
# What was seen counts half after so many further uses of its class.
_USES_KEPT = 0.5 ** (1 / 2048)


class RequestClock:
    """Requests so far: time passes where things are used."""

    def __init__(self) -> None:
        self.now = 0


@dataclass(slots=True)
class Uses:
    """Of one thing. `again` counts those after the first, each worth half after `HORIZON` requests, as of `at`."""

    again: float
    at: int


class Likelihood:
    """Of things of one kind. Owned by the engine's thread."""

    def __init__(self, clock: RequestClock) -> None:
        self._clock = clock
        self._uses = [_ASSUMED_USES] * _NUM_CLASSES
        self._followed = [_ASSUMED_USES * 2.0 ** (place - 1) for place in range(_NUM_CLASSES)]

    def first(self) -> Uses:
        """Something new is used."""
        return Uses(0.0, self.firsts(1))

    def firsts(self, count: int) -> int:
        """So many new things are used now. Returns the time, for their `Uses`."""
        for _ in range(count):
            self._count(0)
        return self._clock.now

    def again(self, uses: Uses) -> None:
        """It is used again."""
        before, now = _class(uses), self._clock.now
        left = 0.5 ** ((now - uses.at) / HORIZON)
        uses.again, uses.at = uses.again * left + 1, now
        self._count(_class(uses))
        self._followed[before] += left * (1 + self.of(uses))

    def of(self, uses: Uses) -> float:
        """As of its last use."""
        place = _class(uses)
        return self._followed[place] / self._uses[place]

    def _count(self, place: int) -> None:
        self._uses[place] = self._uses[place] * _USES_KEPT + 1
        self._followed[place] *= _USES_KEPT


def _class(uses: Uses) -> int:
    """0 for what was not used again; else one more than the binary logarithm of how often."""
    return min(frexp(uses.again)[1], _NUM_CLASSES - 1)
