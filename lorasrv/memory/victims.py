"""What one plan takes away: a pure choice of the first that may go."""

from collections import deque
from collections.abc import Callable, Iterable

from lorasrv.memory.eviction import Candidate, IdleAdapter, Name

# So many adapters that somebody waits for are passed over in looking for victims that nobody does.
_SPARED = 32


class Victims:
    """What may go, in the order in which it should, each looked at once in a plan: what the plan relies on is not free
    again before it is carried out."""

    def __init__(self, candidates: Iterable[Candidate], waits_for: Callable[[str], bool]) -> None:
        self._candidates = iter(candidates)
        self._waits_for = waits_for
        self._put_back: deque[Candidate] = deque()
        # Adapters that somebody in the queue asks for: they would have to come back at once.
        self._asked_for: deque[Candidate] = deque()

    def choose(self, num_pages: int, kept: set[Name]) -> list[Candidate] | None:
        """Candidates, none of them `kept`, that free `num_pages` and are not given again; None if all do not."""
        chosen: list[Candidate] = []
        while num_pages > 0:
            candidate = self._next(kept)
            if candidate is None:
                self.put_back(chosen)
                return None
            chosen.append(candidate)
            num_pages -= candidate.num_pages
        return chosen

    def put_back(self, candidates: list[Candidate]) -> None:
        """They may be chosen again."""
        self._put_back.extendleft(reversed(candidates))

    def _next(self, kept: set[Name]) -> Candidate | None:
        while self._put_back:
            if name_of(candidate := self._put_back.popleft()) not in kept:
                return candidate
        while len(self._asked_for) < _SPARED and (candidate := next(self._candidates, None)) is not None:
            if name_of(candidate) in kept:
                continue
            if isinstance(candidate, IdleAdapter) and self._waits_for(candidate.digest):
                self._asked_for.append(candidate)
            else:
                return candidate
        while self._asked_for:
            if name_of(candidate := self._asked_for.popleft()) not in kept:
                return candidate
        return None


def name_of(candidate: Candidate) -> Name:
    """A candidate's digest or page."""
    return candidate[0]
