"""Where queued requests stand, told now and then: what it costs a step does not depend on how many there are."""

from collections import deque

from lorasrv.sched.queue import WaitingQueue
from lorasrv.sched.sequence import Sequence
from lorasrv.types import TokenDelta

INTERVAL_S = 1.0
_TOLD_A_STEP = 64


class Positions:
    """A request's place is among those of its own tenant: how long others' queues are is not its business,
    and says little about its turn. Owned by the engine's thread. Times are in seconds, on the engine's clock.
    """

    def __init__(self, now_s: float) -> None:
        self._next_s = now_s + INTERVAL_S
        self._to_tell: deque[tuple[int, Sequence]] = deque()

    def tell(self, waiting: WaitingQueue, now_s: float) -> tuple[TokenDelta, ...]:
        """Begun at most once in INTERVAL_S, a few a step: the places of requests that have not begun and have moved."""
        if not self._to_tell and now_s >= self._next_s:
            self._next_s = now_s + INTERVAL_S
            self._to_tell.extend(waiting.places())
        told: list[TokenDelta] = []
        for _ in range(min(_TOLD_A_STEP, len(self._to_tell))):
            position, sequence = self._to_tell.popleft()
            if not sequence.queued or sequence.told_position == position or sequence.has_output or sequence.sample:
                continue
            sequence.told_position = position
            told.append(TokenDelta(sequence.request_id, queue_position=position))
        return tuple(told)
