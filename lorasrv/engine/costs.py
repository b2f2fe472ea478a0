"""What work costs on the running engine, learned while it runs."""

from collections.abc import Iterator

# At every measurement those before it count that much less.
_KEPT = 0.95
# What is assumed at first counts like a measurement of that many.
_START_TOKENS = 512
_START_BYTES = 64 << 20


class Costs:
    """Owned by the engine's thread; all times are of its clock. Until measured they are what a small GPU gives.

    A step is taken to last `step_s`, and `prefill_s_per_token` more for each token beyond one per sequence.
    """

    def __init__(self) -> None:
        self.step_s = 0.02
        self.copies = Traffic(1e-10)
        self.reads = Traffic(1e-9)
        self._prefill = _Rate(1e-4, _START_TOKENS)
        self._last_end_s = float("-inf")

    @property
    def prefill_s_per_token(self) -> float:
        return self._prefill.s_per_unit

    @property
    def copy_s_per_byte(self) -> float:
        """From host memory to the device."""
        return self.copies.s_per_byte

    @property
    def read_s_per_byte(self) -> float:
        """From disk to a page image in host memory."""
        return self.reads.s_per_byte

    def step_ended(self, num_chunks: int, num_tokens: int, began_s: float, ended_s: float) -> None:
        """A step of so many chunks and tokens has ended, which ran since it was submitted or the step before ended."""
        took_s = ended_s - max(began_s, self._last_end_s)
        self._last_end_s = ended_s
        num_more = num_tokens - num_chunks
        if num_more:
            self._prefill.measured(max(0.0, took_s - self.step_s), num_more)
        else:
            self.step_s = self.step_s * _KEPT + took_s * (1 - _KEPT)


class Traffic:
    """Transfers that run side by side: the time in which any is under way over the bytes that have arrived. So one that
    waits for others does not look slow."""

    def __init__(self, s_per_byte: float) -> None:
        self._rate = _Rate(s_per_byte, _START_BYTES)
        self._under_way: set[str] = set()
        self._busy_s = 0.0
        self._counted_to_s = 0.0

    @property
    def s_per_byte(self) -> float:
        return self._rate.s_per_unit

    def __contains__(self, name: str) -> bool:
        return name in self._under_way

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._under_way))

    def began(self, name: str, now_s: float) -> None:
        self._pass(now_s)
        self._under_way.add(name)

    def arrived(self, name: str, num_bytes: int, now_s: float) -> None:
        self._pass(now_s)
        self._under_way.remove(name)
        self._rate.measured(self._busy_s, num_bytes)
        self._busy_s = 0.0

    def given_up(self, name: str, now_s: float) -> None:
        """It has failed, or nobody waits for it any more."""
        self._pass(now_s)
        self._under_way.remove(name)
        if not self._under_way:
            self._busy_s = 0.0

    def _pass(self, now_s: float) -> None:
        if self._under_way:
            self._busy_s += now_s - self._counted_to_s
        self._counted_to_s = now_s


class _Rate:
    """Seconds over units, both of the last measurements."""

    def __init__(self, s_per_unit: float, num_units: float) -> None:
        self._seconds = s_per_unit * num_units
        self._units = float(num_units)

    @property
    def s_per_unit(self) -> float:
        return self._seconds / self._units

    def measured(self, seconds: float, num_units: float) -> None:
        self._seconds = self._seconds * _KEPT + seconds
        self._units = self._units * _KEPT + num_units
