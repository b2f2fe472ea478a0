"""Who waits, in the order of service: class, then the tenant that has been served least, then arrival.

A sequence is `away` while its adapter is not on the device. So thousands that wait for cold adapters cost a decision
nothing: it looks at the first few of them, and at those that could run at once.
"""

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace, merge
from itertools import islice

from lorasrv.sched.fairness import Share, Shares
from lorasrv.sched.sequence import Sequence, order_of, take_out

# Of a tenant. As many builders are added for slow reads (`engine.builder_pool`), so one is left for others' at least.
MAX_SLOW_READS = 6


@dataclass(slots=True, eq=False)
class Line:
    """What waits of one class and tenant, by arrival."""

    share: Share
    here: list[Sequence] = field(default_factory=list["Sequence"])
    away: list[Sequence] = field(default_factory=list["Sequence"])

    def side(self, away: bool) -> list[Sequence]:
        return self.away if away else self.here

    def __len__(self) -> int:
        return len(self.here) + len(self.away)


class WaitingQueue:
    """Owned by the engine's thread; the scheduler only reads it."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._lines: dict[tuple[int, str], Line] = {}
        self._by_digest: dict[str, dict[Sequence, None]] = {}
        self._away: set[Sequence] = set()
        # The tenants that have waited for each read that is under way, and which of these are slow.
        self._reading: dict[str, set[str]] = {}
        self._slow: set[str] = set()

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __contains__(self, sequence: object) -> bool:
        return isinstance(sequence, Sequence) and sequence.queued

    def __iter__(self) -> Iterator[Sequence]:
        """All, in the order of service as it stands."""
        return iter(Turns(self._lines.items()))

    def places(self, behind: Sequence | None = None) -> Iterator[tuple[int, Sequence]]:
        """Every sequence, with how many of its own tenant go before it: class by class, tenant by tenant, by arrival.

        With `behind`, which need not be queued any more, only those that come after it.
        """
        before: Counter[str] = Counter()
        begin = (0, "") if behind is None else _key(behind)
        for key in sorted(self._lines):
            line, tenant = self._lines[key], key[1]
            here = away = 0
            if key == begin and behind is not None:
                here = bisect_right(line.here, behind.order, key=order_of)
                away = bisect_right(line.away, behind.order, key=order_of)
            if key >= begin:
                queued = merge(islice(line.here, here, None), islice(line.away, away, None), key=order_of)
                yield from enumerate(queued, before[tenant] + here + away)
            before[tenant] += len(line)

    @property
    def num_away(self) -> int:
        return len(self._away)

    def waits_for(self, digest: str) -> bool:
        """Whether a queued sequence uses this adapter."""
        return digest in self._by_digest

    def for_digest(self, digest: str) -> tuple[Sequence, ...]:
        return tuple(self._by_digest.get(digest, ()))

    def add(self, sequence: Sequence, *, away: bool, again: bool = False) -> None:
        """Queue it in its place; `again` when it ran before."""
        assert not sequence.queued, f"{sequence.sequence_id} is queued already"
        self._shares.enqueue(sequence.share, lift=not again)
        key = _key(sequence)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(sequence.share)
        sequence.queued = True
        insort(line.side(away), sequence, key=order_of)
        if away:
            self._away.add(sequence)
        if sequence.digest is not None:
            self._by_digest.setdefault(sequence.digest, {})[sequence] = None
            if sequence.digest in self._reading:
                self._reading[sequence.digest].add(sequence.share.tenant)

    def remove(self, sequence: Sequence) -> None:
        key = _key(sequence)
        line = self._lines[key]
        take_out(line.side(sequence in self._away), sequence)
        self._away.discard(sequence)
        if not line:
            del self._lines[key]
        sequence.queued = False
        self._shares.dequeue(sequence.share)
        if sequence.digest is not None:
            using = self._by_digest[sequence.digest]
            del using[sequence]
            if not using:
                del self._by_digest[sequence.digest]

    def move(self, digest: str, *, away: bool) -> None:
        """The adapter has got its pages on the device, or lost them."""
        for sequence in self._by_digest.get(digest, ()):
            if (sequence in self._away) != away:
                line = self._lines[_key(sequence)]
                take_out(line.side(not away), sequence)
                insort(line.side(away), sequence, key=order_of)
                (self._away.add if away else self._away.discard)(sequence)

    def note_reads(self, reading: Mapping[str, bool]) -> None:
        """The adapters whose reads are under way, and whether each is slow. These are the reads of all tenants whose
        sequences have waited for them since."""
        self._reading = {
            digest: self._reading[digest]
            if digest in self._reading
            else {sequence.share.tenant for sequence in self.for_digest(digest)}
            for digest in reading
        }
        self._slow = {digest for digest, is_slow in reading.items() if is_slow}

    @property
    def reads_for_warms(self) -> set[str]:
        """The adapters whose reads are under way and for which no sequence has waited."""
        return {digest for digest, tenants in self._reading.items() if not tenants}

    def turns(self, *, num_away: int | None = None) -> "Turns":
        """With about `num_away` of those whose adapter is away; None is all of them."""
        return Turns(self._lines.items(), num_away=num_away)

    def next_away(
        self,
        num_digests: int,
        num_sequences: int,
        is_read: Callable[[str], bool] = lambda digest: False,
    ) -> dict[str, None]:
        """The adapters that the next `num_sequences` of those that are away wait for, at most `num_digests`: in the
        order of service, if each is granted in its turn.

        A tenant with MAX_SLOW_READS slow reads has no others begun, of adapters that `is_read` does not find in host
        memory: what hangs is never charged for, so nothing else would keep it from hanging all that reads.
        """
        digests: dict[str, None] = {}
        granted: dict[Share, float] = {}
        num_slow = Counter(tenant for digest in self._slow for tenant in self._reading[digest])
        by_class: dict[int, list[tuple[Share, list[Sequence]]]] = {}
        for (priority, _), line in self._lines.items():
            away = line.away
            if num_slow[line.share.tenant] >= MAX_SLOW_READS:
                away = [each for each in away if (name := each.digest) in self._reading or (name and is_read(name))]
            if away:
                by_class.setdefault(priority, []).append((line.share, away))
        for priority in sorted(by_class):
            heap = [
                (share.served + granted.get(share, 0.0), away[0].order, share, away, 0)
                for share, away in by_class[priority]
            ]
            heapify(heap)
            while heap:
                if not num_sequences or len(digests) == num_digests:
                    return digests
                num_sequences -= 1
                _, _, share, away, place = heap[0]
                sequence = away[place]
                assert sequence.digest is not None, "without an adapter there is nothing to wait for"
                digests[sequence.digest] = None
                cost = granted[share] = granted.get(share, 0.0) + sequence.admission_cost
                place += 1
                if place == len(away):
                    heappop(heap)
                else:
                    heapreplace(heap, (share.served + cost, away[place].order, share, away, place))
        return digests

    def check(self, is_resident: "Iterable[str]") -> None:
        """Raise AssertionError on a broken invariant; `is_resident` are the digests that are on the device."""
        resident = set(is_resident)
        found = [sequence for line in self._lines.values() for sequence in (*line.here, *line.away)]
        assert len(found) == len(set(found)), "a sequence is queued twice"
        assert all(sequence.queued for sequence in found), "a queued sequence does not know it"
        away = {sequence for sequence in found if sequence.digest is not None and sequence.digest not in resident}
        assert away == self._away == {s for line in self._lines.values() for s in line.away}, "away is stale"
        assert {s for using in self._by_digest.values() for s in using} == {s for s in found if s.digest is not None}
        for key, line in self._lines.items():
            assert line and all(_key(sequence) == key for sequence in (*line.here, *line.away)), "a line is mixed"
            for side in (line.here, line.away):
                assert side == sorted(side, key=order_of), "a line is out of order"
        by_tenant: dict[str, int] = {}
        for sequence in found:
            by_tenant[sequence.share.tenant] = by_tenant.get(sequence.share.tenant, 0) + 1
            assert sequence.share.num_waiting, "a tenant's account misses what waits"
        assert all(line.share.num_waiting == by_tenant[line.share.tenant] for line in self._lines.values())
        self._shares.check()


class Turns:
    """A walk in the order of service, in which those that are granted on the way are charged for, in thought only.

    Grant the sequence that came last before asking for the next one.
    """

    def __init__(
        self,
        lines: Iterable[tuple[tuple[int, str], Line]],
        *,
        num_away: int | None = None,
    ) -> None:
        self._by_class: dict[int, list[Line]] = {}
        for (priority, _), line in lines:
            self._by_class.setdefault(priority, []).append(line)
        self._away_left = num_away
        self._granted: dict[Share, float] = {}
        self._has_turns = any(len(lines) > 1 for lines in self._by_class.values())

    def grant(self, sequence: Sequence) -> None:
        if not self._has_turns:
            return
        share = sequence.share
        self._granted[share] = self._granted.get(share, 0.0) + sequence.admission_cost

    def __iter__(self) -> Iterator[Sequence]:
        for priority in sorted(self._by_class):
            lines = self._by_class[priority]
            yield from self._in_line(lines[0]) if len(lines) == 1 else self._by_turns(lines)

    def _by_turns(self, lines: list[Line]) -> Iterator[Sequence]:
        """A line's next sequence is known when its last one has been charged for; nobody else changes its account."""
        granted = self._granted
        heap: list[tuple[float, tuple[int, int], Share, Sequence, Iterator[Sequence]]] = []
        for line in lines:
            share, walk = line.share, self._in_line(line)
            if (first := next(walk, None)) is not None:
                heap.append((share.served + granted.get(share, 0.0), first.order, share, first, walk))
        heapify(heap)
        while heap:
            _, _, share, sequence, walk = heap[0]
            yield sequence
            following = next(walk, None)
            if following is None:
                heappop(heap)
            else:
                served = share.served + granted.get(share, 0.0)
                heapreplace(heap, (served, following.order, share, following, walk))

    def _in_line(self, line: Line) -> Iterator[Sequence]:
        """By arrival."""
        return self._both_sides(line) if line.away and self._may_show_away() else iter(line.here)

    def _both_sides(self, line: Line) -> Iterator[Sequence]:
        here, away = line.here, line.away
        num_here = num_away = 0
        while True:
            first = here[num_here] if num_here < len(here) else None
            if num_away < len(away) and self._may_show_away():
                abroad = away[num_away]
                if first is None or abroad.order < first.order:
                    yield abroad
                    num_away += 1
                    if self._away_left is not None:
                        self._away_left -= 1
                    continue
            if first is None:
                return
            yield first
            num_here += 1

    def _may_show_away(self) -> bool:
        return self._away_left is None or self._away_left > 0


def _key(sequence: Sequence) -> tuple[int, str]:
    return sequence.order[0], sequence.share.tenant
