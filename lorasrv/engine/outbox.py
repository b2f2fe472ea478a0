"""What the engine has to say: sent while its reader keeps up, merged while it does not."""

from collections import deque
from collections.abc import Callable

from lorasrv.engine.merging import MergingDelta
from lorasrv.engine.messages import FromEngine, Heartbeat, Step


class Outbox:
    """Between an engine that is never to wait for its reader and a channel that holds a few messages.

    So a Cancel is heard between any two steps, and a reader that stalls finds what it missed in one Step. What is held
    is at most what the running requests may produce. Owned by the engine's thread.
    """

    def __init__(self, try_send: Callable[[FromEngine], bool]) -> None:
        """`try_send` says whether there was room for the message; it does not block."""
        self._try_send = try_send
        self._deltas: dict[tuple[str, int], MergingDelta] = {}
        self._replies: deque[FromEngine] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._deltas and not self._replies

    def send(self, message: FromEngine) -> None:
        """Send it now, or as soon as `flush` finds room."""
        self.flush()
        if self.is_empty and self._try_send(message):
            return
        match message:
            case Step(deltas):
                for delta in deltas:
                    key = (delta.request_id, delta.sample)
                    if (waiting := self._deltas.get(key)) is not None:
                        waiting.add(delta)
                    else:
                        self._deltas[key] = MergingDelta(delta)
            case Heartbeat():
                return  # the messages that fill the channel are signs of life enough
            case _:
                self._replies.append(message)

    def flush(self) -> None:
        """Send what waits, as far as there is room: replies first, since what deltas there are can go in one message
        later, and more keep coming."""
        while self._replies and self._try_send(self._replies[0]):
            self._replies.popleft()
        if not self._replies and self._deltas and self._try_send(self._held_deltas()):
            self._deltas.clear()

    def _held_deltas(self) -> Step:
        return Step(tuple(waiting.delta() for waiting in self._deltas.values()))
