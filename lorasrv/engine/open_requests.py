"""The requests that have not ended, and where each of their samples stands.

    held back -> waiting <-> running, and from each of them -> ended

A request's further samples are held back until the first one has computed the prompt, which they share, or has ended.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from lorasrv.engine.deadlines import Deadlines
from lorasrv.engine.ledger import Ledger
from lorasrv.sched.fairness import Shares
from lorasrv.sched.queue import WaitingQueue
from lorasrv.sched.running import Running
from lorasrv.sched.sequence import Sequence


class OpenRequests(Mapping[str, list[Sequence]]):
    """A request's samples that have not ended, by its id. Owned by the engine's thread.

    `shares` counts them by tenant; `waiting` and `running` are queue and batch, which change here when a sample moves.
    """

    def __init__(self, *, ledger: Ledger, shares: Shares, waiting: WaitingQueue, running: Running) -> None:
        self.deadlines = Deadlines()
        self._ledger = ledger
        self._shares = shares
        self._waiting = waiting
        self._running = running
        self._samples: dict[str, list[Sequence]] = {}
        self._sequences: dict[str, Sequence] = {}
        # Samples that wait for the first one of their request to compute the prompt, by its sequence id.
        self._followers: dict[str, list[Sequence]] = {}

    def __getitem__(self, request_id: str) -> list[Sequence]:
        return self._samples[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def sequences(self) -> Collection[Sequence]:
        """The samples of all requests."""
        return self._sequences.values()

    @property
    def holds_back(self) -> bool:
        """Whether any sample waits for the first one of its request."""
        return bool(self._followers)

    def add(self, samples: list[Sequence]) -> None:
        """A new request."""
        first, *followers = samples
        self._samples[first.request_id] = samples
        for sequence in samples:
            self._sequences[sequence.sequence_id] = sequence
        self._queue(first)
        if followers:
            self._followers[first.sequence_id] = followers

    def preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._queue(sequence, again=True)

    def queue_followers(self, first: Sequence, sibling: Sequence | None) -> None:
        """The first sample has computed the prompt, and is the `sibling` to copy from, or it has ended."""
        for sequence in self._followers.pop(first.sequence_id, ()):
            sequence.sibling = sibling
            self._queue(sequence)

    def drop(self, sequence: Sequence, *, forget: bool = False) -> None:
        """End a sequence, wherever it is. With `forget` its blocks that nobody else uses leave the prefix cache."""
        del self._sequences[sequence.sequence_id]
        siblings = self._samples[sequence.request_id] = [
            each for each in self._samples[sequence.request_id] if each is not sequence
        ]
        if not siblings:
            del self._samples[sequence.request_id]
            self.deadlines.discard(sequence.request_id)
        if sequence.running:
            self._stop_running(sequence, forget=forget)
        elif sequence.queued:
            self._waiting.remove(sequence)
            if forget:
                self._ledger.forget(sequence)
        else:
            self._forget_follower(sequence)
        sequence.ended = True
        self._shares.close(sequence.share)
        self.queue_followers(sequence, None)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        held = [sequence for followers in self._followers.values() for sequence in followers]
        assert not any(sequence.block_table for sequence in (*self._waiting, *held)), "a waiting sequence holds pages"
        known = {id(sequence) for sequence in (*self._waiting, *self._running, *held)}
        assert {id(sequence) for sequence in self._sequences.values()} == known, "a sequence is lost"
        by_request = [sequence for samples in self._samples.values() for sequence in samples]
        assert {id(sequence) for sequence in by_request} == known, "a request's samples are lost"
        assert all(self._samples.values()), "a request without samples is kept"
        self.deadlines.check(set(self._samples))
        assert self._followers.keys() <= self._sequences.keys(), "samples wait for one that has ended"
        self._running.check()
        assert not any(sequence.running or sequence.ended for sequence in self._waiting), "a sequence waits and runs"
        open_by_share = Counter(sequence.share for sequence in self._sequences.values())
        assert all(share.num_open == count for share, count in open_by_share.items()), "an account is off"
        running_by_share = Counter(sequence.share for sequence in self._running)
        assert all(share.num_running == running_by_share[share] for share in open_by_share), "an account is off"

    def _queue(self, sequence: Sequence, *, again: bool = False) -> None:
        digest = sequence.digest
        self._waiting.add(sequence, away=digest is not None and not self._ledger.is_resident(digest), again=again)

    def _stop_running(self, sequence: Sequence, *, forget: bool = False) -> None:
        self._ledger.release(sequence, forget=forget)
        self._running.remove(sequence)

    def _forget_follower(self, sequence: Sequence) -> None:
        for first, followers in self._followers.items():
            if sequence in followers:
                self._followers[first] = [each for each in followers if each is not sequence]
