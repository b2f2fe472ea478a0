"""Where queued requests stand, told now and then: what it costs does not depend on how many steps there are."""

from collections.abc import Sequence as Seq

from lorasrv.sched.sequence import Sequence
from lorasrv.types import TokenDelta

INTERVAL_S = 1.0


class Positions:
    """Owned by the engine's thread. Times are in seconds, on the engine's clock."""

    def __init__(self, now_s: float) -> None:
        self._next_s = now_s + INTERVAL_S

    def tell(self, waiting: Seq[Sequence], now_s: float) -> tuple[TokenDelta, ...]:
        """At most once in INTERVAL_S: the place in the queue of each request that has not begun and has moved."""
        if not waiting or now_s < self._next_s:
            return ()
        self._next_s = now_s + INTERVAL_S
        moved = [
            (position, sequence)
            for position, sequence in enumerate(waiting)
            if sequence.told_position != position and not sequence.has_output and sequence.sample == 0
        ]
        for position, sequence in moved:
            sequence.told_position = position
        return tuple(
            TokenDelta(request_id=sequence.request_id, queue_position=position) for position, sequence in moved
        )
