"""What makes room: one order over idle adapters and idle cached blocks.

GreedyDual-Size-Frequency (Cherkasova, HP Labs, 1998): what goes first has the least

    priority = inflation + likelihood * seconds to bring it back / pages that it frees

where the inflation is the priority of the last one that went, so that what nobody uses grows old. A priority is set
when something becomes idle and stays: what was idle longer has less inflation in it.

The order is kept as in CAMP (Ghandeharizadeh et al., Middleware 2014). What something is worth, its priority without
the inflation, is rounded up to a few significant bits. As the inflation never falls, things of one worth stand in their
order already when each is put behind the others; so a queue for each worth does, and the first of all is one of the
queues' first. Putting in and taking out cost the same whatever the number of things, and nothing stale is left behind.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from heapq import merge
from math import ceil, frexp, ldexp
from typing import NamedTuple, Protocol

# A worth is rounded up to a multiple of 1/4 of the power of two above it: two queues for a factor of two.
_FRACTIONS = 4


class IdleAdapter(NamedTuple):
    """A resident adapter that may go, and the pages that frees."""

    digest: str
    num_pages: int


class IdleBlock(NamedTuple):
    """A cached block that may go."""

    page: int
    num_pages: int = 1


Candidate = IdleAdapter | IdleBlock
# Of an adapter its digest, of a block its page.
Name = str | int


class Policy(Protocol):
    """What something is worth per page, and whether what goes makes all that comes worth more."""

    @property
    def inflates(self) -> bool: ...

    def worth(self, likelihood: float, cost_s: float, num_pages: int) -> float:
        """At least 0. `likelihood` is in uses to come, `cost_s` what one costs once the thing is gone."""
        ...


class GreedyDual:
    """GreedyDual-Size-Frequency."""

    inflates = True

    def worth(self, likelihood: float, cost_s: float, num_pages: int) -> float:
        return likelihood * cost_s / num_pages


class EvictionOrder:
    """All that is idle, in the order in which it should go. Owned by the engine's thread."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._inflation = 0.0
        self._count = 0
        # By worth: priority, order of arrival (which decides between equals), name and pages.
        self._queues: dict[float, OrderedDict[Name, tuple[float, int, Name, int]]] = {}
        self._worth: dict[Name, float] = {}

    def __len__(self) -> int:
        return len(self._worth)

    def __contains__(self, name: object) -> bool:
        return name in self._worth

    def __iter__(self) -> Iterator[Candidate]:
        """The first k cost k steps, not the sorting of all; to be read before anything changes."""
        for _, _, name, num_pages in merge(*(queue.values() for queue in self._queues.values())):
            yield IdleBlock(name) if isinstance(name, int) else IdleAdapter(name, num_pages)

    def worth(self, likelihood: float, cost_s: float, num_pages: int) -> float:
        return round_up(self._policy.worth(likelihood, cost_s, num_pages))

    def worth_of(self, priority: float) -> float:
        """The least worth that gives at least this priority now."""
        worth = max(0.0, round_up(priority - self._inflation))
        while self._inflation + worth < priority:  # the difference was rounded
            worth = round_up(worth * (1 + 1 / _FRACTIONS))
        return worth

    def priority(self, worth: float) -> float:
        """Of what becomes idle now."""
        return self._inflation + worth

    def add(self, name: Name, num_pages: int, worth: float) -> None:
        """Something has become idle that is worth this, a number that `worth` or `worth_of` gave."""
        assert name not in self._worth, f"{name} is idle already"
        self._worth[name] = worth
        self._count += 1
        queue = self._queues.get(worth)
        if queue is None:
            queue = self._queues[worth] = OrderedDict()
        queue[name] = (self._inflation + worth, self._count, name, num_pages)

    def add_blocks(self, pages: Sequence[int], worth: float) -> None:
        """Cached blocks have become idle, in this order, that are worth the same."""
        if not pages:
            return
        assert self._worth.keys().isdisjoint(pages), f"one of {pages} is idle already"
        priority, first = self._inflation + worth, self._count + 1
        self._count += len(pages)
        queue = self._queues.setdefault(worth, OrderedDict())
        for count, page in enumerate(pages, first):
            queue[page] = (priority, count, page, 1)
        self._worth.update(dict.fromkeys(pages, worth))

    def discard(self, name: Name) -> None:
        """It is in use again, or gone, or never was idle."""
        worth = self._worth.pop(name, None)
        if worth is not None:
            queue = self._queues[worth]
            del queue[name]
            if not queue:
                del self._queues[worth]

    def evict(self, *names: Name) -> None:
        """They go to make room."""
        inflation = self._inflation
        for name in names:
            worth = self._worth.pop(name)
            queue = self._queues[worth]
            priority = queue.pop(name)[0]
            if priority > inflation:
                inflation = priority
            if not queue:
                del self._queues[worth]
        if self._policy.inflates:
            self._inflation = inflation

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        entries = [(worth, *entry) for worth, queue in self._queues.items() for entry in queue.values()]
        assert {name: worth for worth, _, _, name, _ in entries} == self._worth, "queues and worths differ"
        assert len(entries) == len(self._worth), "something is in two queues"
        assert all(self._queues.values()), "an empty queue is kept"
        assert all(priority <= self.priority(worth) for worth, priority, *_ in entries), "inflation has fallen"
        order = [candidate.digest if isinstance(candidate, IdleAdapter) else candidate.page for candidate in self]
        assert order == [name for *_, name, _ in sorted(entry[1:] for entry in entries)], "out of order"


def round_up(worth: float) -> float:
    mantissa, exponent = frexp(worth)
    return ldexp(ceil(mantissa * _FRACTIONS) / _FRACTIONS, exponent)
