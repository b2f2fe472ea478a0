"""How likely something is to be used again, from how often it was. Numbers only.

The likelihood is in expected uses: those that it has seen again and again, each worth half after `HALF_LIFE` further
requests of whatever kind, and on top the share of things of its kind that were used a second time at all. So a prompt
that nobody has repeated is worth little where prompts are not repeated, and more where they are.
"""

from dataclasses import dataclass

HALF_LIFE = 4096.0
# What is assumed of a kind at first, as if seen in so many things.
_ASSUMED_REUSE = 0.5
_ASSUMED_THINGS = 256.0


class RequestClock:
    """Requests so far: time passes where things are used."""

    def __init__(self) -> None:
        self.now = 0


@dataclass(slots=True)
class Uses:
    """Of one thing: those after the first, each decayed, as of request number `at`."""

    again: float
    at: int


class Likelihood:
    """Of things of one kind. Owned by the engine's thread."""

    def __init__(self, clock: RequestClock, half_life: float = HALF_LIFE) -> None:
        self._clock = clock
        self._half_life = half_life
        self._things = _ASSUMED_THINGS
        self._reused = _ASSUMED_REUSE * _ASSUMED_THINGS
        self._keep = 0.5 ** (1 / half_life)

    def first(self) -> Uses:
        """Something new."""
        self._things = self._things * self._keep + 1
        self._reused *= self._keep
        return Uses(again=0.0, at=self._clock.now)

    def again(self, uses: Uses) -> None:
        """It is used again."""
        if uses.again:
            uses.again = self._decayed(uses) + 1
        else:
            uses.again = 1.0
            self._reused += 1
        uses.at = self._clock.now

    def of(self, uses: Uses) -> float:
        return self.assumed + (self._decayed(uses) if uses.again else 0.0)

    @property
    def assumed(self) -> float:
        """Of what was used once."""
        return min(1.0, self._reused / self._things)

    def _decayed(self, uses: Uses) -> float:
        return uses.again * 0.5 ** ((self._clock.now - uses.at) / self._half_life)
