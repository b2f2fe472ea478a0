"""Who waits for an adapter to be in memory before a request asks for it."""

from collections.abc import Mapping

from lorasrv.engine.ledger import Ledger
from lorasrv.engine.messages import failure_of
from lorasrv.errors import DeadlineExceeded, LorasrvError, QueueFull, ResourceExhausted
from lorasrv.types import Tier, Warm, Warmed

MAX_WARMS = 256


class Warms:
    """In order of arrival. They hold neither pages nor pins: what they wait for, the scheduler has brought to where
    nothing else is in need. Owned by the engine's thread.
    """

    def __init__(self, ledger: Ledger, num_pages: int) -> None:
        """`num_pages` are the pool's."""
        self._ledger = ledger
        self._num_pages = num_pages
        self._waiting: dict[int, Warm] = {}
        self._ended: list[Warmed] = []

    @property
    def waiting(self) -> tuple[Warm, ...]:
        return tuple(self._waiting.values())

    def add(self, warm: Warm) -> None:
        if len(self._waiting) == MAX_WARMS:
            error = QueueFull(f"{MAX_WARMS} calls wait for adapters to be warm, which is the limit")
            self._ended.append(Warmed(warm_id=warm.warm_id, failure=failure_of(error)))
            return
        self._ledger.keep(warm.digest)
        self._waiting[warm.warm_id] = warm

    def cancel(self, warm_id: int) -> None:
        self._waiting.pop(warm_id, None)

    def end_hopeless(self, failures: Mapping[str, LorasrvError], now_s: float) -> None:
        """Those that are past their deadline, whose read has failed, and which the pool can never hold beside the page
        that the smallest request needs; at a step's start."""
        for warm in self.waiting:
            num_pages = self._ledger.num_pages(warm.digest)
            if warm.deadline_s <= now_s:
                self._fail(warm, DeadlineExceeded("the call's deadline has passed"))
            elif warm.digest in failures:
                self._fail(warm, failures[warm.digest])
            elif warm.tier is Tier.DEVICE and num_pages is not None and num_pages >= self._num_pages:
                message = f"the adapter needs {num_pages} pages, and a request one; the pool has {self._num_pages}"
                self._fail(warm, ResourceExhausted(message))

    def end_arrived(self) -> None:
        """Those whose adapter is where it was wanted, now that a step has taken the pages that it needs."""
        for warm in self.waiting:
            on_device = self._ledger.is_loaded(warm.digest)
            if on_device or (warm.tier is Tier.HOST and self._ledger.num_pages(warm.digest) is not None):
                del self._waiting[warm.warm_id]
                self._ended.append(Warmed(warm_id=warm.warm_id, tier=Tier.DEVICE if on_device else Tier.HOST))

    def take_ended(self) -> tuple[Warmed, ...]:
        ended, self._ended = tuple(self._ended), []
        return ended

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert len(self._waiting) <= MAX_WARMS, "too many warms wait"
        assert not self._waiting.keys() & {ended.warm_id for ended in self._ended}, "a warm has ended and waits"

    def _fail(self, warm: Warm, error: LorasrvError) -> None:
        del self._waiting[warm.warm_id]
        self._ended.append(Warmed(warm_id=warm.warm_id, failure=failure_of(error)))
