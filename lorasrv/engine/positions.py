"""Where queued requests stand, told now and then: what it costs a step does not depend on how many there are."""

from itertools import islice

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
        self._is_telling = False
        self._told: Sequence | None = None

    def tell(self, waiting: WaitingQueue, now_s: float) -> tuple[TokenDelta, ...]:
        """Begun at most once in INTERVAL_S, a few a step: the places of requests that have not begun and have moved."""
        if not self._is_telling and now_s >= self._next_s:
            self._next_s = now_s + INTERVAL_S
            self._is_telling, self._told = True, None
        if not self._is_telling:
            return ()
        places = list(islice(waiting.places(behind=self._told), _TOLD_A_STEP))
        self._is_telling = len(places) == _TOLD_A_STEP
        told: list[TokenDelta] = []
        for position, sequence in places:
            self._told = sequence
            if sequence.told_position != position and not sequence.has_output and not sequence.sample:
                sequence.told_position = position
                told.append(TokenDelta(sequence.request_id, queue_position=position))
        return tuple(told)
