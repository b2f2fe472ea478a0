"""Who runs, in the order of service, and who of them needs what from the next step: kept, not looked for."""

from bisect import insort
from collections.abc import Iterator

from lorasrv.sched.sequence import Sequence, order_of, take_out


class Running:
    """The sequences that have pages. Owned by the engine's thread; the scheduler only reads it.

    `decoding` are those that need one token computed, `prefilling` those that need several, both in order. The others
    wait for their adapter's weights, or for the token that is being drawn, their last.
    """

    def __init__(self) -> None:
        self._all: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._all)

    def __getitem__(self, place: int) -> Sequence:
        return self._all[place]

    def add(self, sequence: Sequence) -> None:
        insort(self._all, sequence, key=order_of)
        sequence.running = True
        sequence.share.num_running += 1

    def remove(self, sequence: Sequence) -> None:
        take_out(self._all, sequence)
        self._move(sequence, None)
        sequence.running = False
        sequence.share.num_running -= 1

    def sort_in(self, sequence: Sequence) -> None:
        """What this running sequence needs has changed otherwise than by a decode that is not its last."""
        self._move(sequence, self._lane(sequence))

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self._all == sorted(self._all, key=order_of), "the running ones are out of order"
        assert all(sequence.running for sequence in self._all), "a running sequence does not know it"
        for lane in (self.decoding, self.prefilling):
            expected = [sequence for sequence in self._all if self._lane(sequence) is lane]
            assert lane == expected and all(sequence.lane is lane for sequence in lane), "a sequence is in a wrong lane"

    def _lane(self, sequence: Sequence) -> list[Sequence] | None:
        num_remaining = 0 if sequence.held_up else sequence.num_remaining
        if not num_remaining:
            return None
        return self.decoding if num_remaining == 1 else self.prefilling

    def _move(self, sequence: Sequence, lane: list[Sequence] | None) -> None:
        if sequence.lane is lane:
            return
        if sequence.lane is not None:
            take_out(sequence.lane, sequence)
        if lane is not None:
            insort(lane, sequence, key=order_of)
        sequence.lane = lane
