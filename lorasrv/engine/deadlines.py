"""Which requests are past their deadline, without a look at all of them."""

import heapq


class Deadlines:
    """Times are `time.monotonic`'s, in seconds: one clock for all processes of a machine. Owned by one thread."""

    def __init__(self) -> None:
        self._by_id: dict[str, float] = {}
        # Ids that are gone stay here until they come up or outnumber the others.
        self._heap: list[tuple[float, str]] = []

    def add(self, request_id: str, deadline_s: float) -> None:
        self._by_id[request_id] = deadline_s
        heapq.heappush(self._heap, (deadline_s, request_id))

    def discard(self, request_id: str) -> None:
        """The request has ended; one without a deadline is no error."""
        self._by_id.pop(request_id, None)
        if len(self._heap) > 2 * len(self._by_id) + 64:
            self._heap = [(deadline_s, known) for known, deadline_s in self._by_id.items()]
            heapq.heapify(self._heap)

    def passed(self, now_s: float) -> list[str]:
        """The requests whose time is up, told once."""
        passed: list[str] = []
        while self._heap and self._heap[0][0] <= now_s:
            deadline_s, request_id = heapq.heappop(self._heap)
            if self._by_id.get(request_id) == deadline_s:
                del self._by_id[request_id]
                passed.append(request_id)
        return passed

    def check(self, running: set[str]) -> None:
        """Raise AssertionError on a broken invariant; `running` are the ids of all requests."""
        assert self._by_id.keys() <= running, "a deadline outlived its request"
        assert {(deadline_s, request_id) for request_id, deadline_s in self._by_id.items()} <= set(self._heap)
        assert len(self._heap) <= 2 * len(self._by_id) + 65, "deadlines of ended requests pile up"
