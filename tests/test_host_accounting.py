"""The host cache's accounting, over a reader without threads that does what the test says, when it says."""

import random
from dataclasses import dataclass, field

import pytest

from lorasrv_adapters.errors import ImageTooLarge
from lorasrv_adapters.host_cache import HostCache, HostState


@dataclass
class Reader:
    """Images are names. It holds the cache to the order of calls, and to what memory there is."""

    memory_bytes: int
    sizes: dict[str, int]
    num_slots: int = 2
    measuring: list[str] = field(default_factory=list[str])
    waiting: list[str] = field(default_factory=list[str])
    building: list[str] = field(default_factory=list[str])
    held: list[str] = field(default_factory=list[str])
    begun: list[str] = field(default_factory=list[str])

    @property
    def is_free(self) -> bool:
        return len(self.measuring) + len(self.waiting) + len(self.building) < self.num_slots

    def measure(self, digest: str) -> None:
        assert self.is_free
        self.measuring.append(digest)
        self.begun.append(digest)

    def build(self, digest: str) -> str | None:
        self.waiting.remove(digest)
        self.building.append(digest)
        assert sum(self.sizes[each] for each in (*self.building, *self.held)) <= self.memory_bytes
        return None

    def abandon(self, digest: str) -> None:
        self.waiting.remove(digest)

    def free(self, image: str) -> None:
        self.held.remove(image)

    def end_measure(self, cache: HostCache[str], digest: str) -> None:
        self.measuring.remove(digest)
        self.waiting.append(digest)
        cache.measured(digest, self.sizes[digest])

    def end_build(self, cache: HostCache[str], digest: str) -> None:
        self.building.remove(digest)
        self.held.append(digest)
        cache.finished(digest, digest)

    def fail(self, cache: HostCache[str], digest: str) -> None:
        (self.measuring if digest in self.measuring else self.building).remove(digest)
        cache.finished(digest, OSError(digest))

    def run(self, cache: HostCache[str], digest: str) -> None:
        """All of a read, for which there is room."""
        self.end_measure(cache, digest)
        cache.poll()
        self.end_build(cache, digest)
        cache.check()


def make(budget_bytes: int, num_slots: int = 2, **sizes: int) -> tuple[HostCache[str], Reader]:
    reader = Reader(budget_bytes, sizes, num_slots)
    return HostCache(budget_bytes, reader), reader


def test_queued_reads_begin_in_order_of_preference() -> None:
    cache, reader = make(9, 1, **dict.fromkeys("abcde", 1))
    for digest in "abcde":
        cache.request(digest)
    cache.prefer(["d", "a", "z", "c"])
    assert cache.snapshot().queued == ("d", "c", "b", "e")
    for digest in "adcbe":
        reader.run(cache, digest)
        cache.poll()
    assert reader.begun == list("adcbe")


def test_a_cancelled_read_that_has_not_begun_is_dropped() -> None:
    cache, reader = make(9, 1, **dict.fromkeys("abc", 1))
    for digest in "abc":
        cache.request(digest)
        cache.cancel(digest)
    cache.request("c")
    cache.poll()
    cache.check()
    assert cache.snapshot().states == {"a": HostState.READING, "c": HostState.READING}
    reader.end_measure(cache, "a")
    cache.poll()
    cache.check()
    assert cache.snapshot().states == {"c": HostState.READING}
    assert reader.begun == ["a", "c"] and not reader.waiting


def test_a_cancelled_build_is_let_finish_and_a_pinned_one_is_not_cancelled() -> None:
    cache, reader = make(2, a=1, b=1)
    for digest in "ab":
        cache.request(digest)
    reader.end_measure(cache, "a")
    cache.poll()
    cache.cancel("a")
    cache.pin("b")
    cache.cancel("b")
    reader.end_measure(cache, "b")
    cache.poll()
    for digest in "ab":
        reader.end_build(cache, digest)
    cache.check()
    assert cache.get("a") and cache.get("b")


def test_no_image_is_built_before_there_is_room_for_it() -> None:
    cache, reader = make(3, a=2, b=2)
    for digest in "ab":
        cache.request(digest)
        cache.pin(digest)
    for digest in "ab":
        reader.end_measure(cache, digest)
    cache.poll()
    assert (reader.building, reader.waiting, cache.snapshot().used_bytes) == (["a"], ["b"], 2)
    reader.end_build(cache, "a")
    cache.poll()
    cache.check()
    assert not reader.building
    cache.unpin("a")
    cache.poll()
    cache.check()
    assert (reader.building, reader.held) == (["b"], [])


def test_an_image_over_the_budget_is_given_up_once_it_is_measured() -> None:
    cache, reader = make(3, a=4)
    cache.request("a")
    reader.end_measure(cache, "a")
    assert isinstance(cache.failure("a"), ImageTooLarge)
    assert not reader.waiting
    cache.check()


def test_a_build_that_fails_gives_its_room_back() -> None:
    cache, reader = make(3, a=3)
    cache.request("a")
    reader.end_measure(cache, "a")
    cache.poll()
    reader.fail(cache, "a")
    cache.check()
    assert (cache.state("a"), cache.snapshot().used_bytes) == (HostState.FAILED, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_every_invariant(seed: int) -> None:
    """All operations in any order; the reader asserts that nothing is held beyond the budget, and holds what the cache
    says that it does."""
    rng = random.Random(seed)
    digests = "abcdefghijkl"
    cache, reader = make(10, rng.randint(1, 4), **{digest: rng.randint(1, 11) for digest in digests})
    pins: list[str] = []

    def step(operation: str, digest: str) -> None:
        state = cache.state(digest)
        match operation:
            case "pin" if state in (HostState.READING, HostState.READY):
                cache.pin(digest)
                pins.append(digest)
            case "unpin" if pins:
                cache.unpin(pins.pop(rng.randrange(len(pins))))
            case "prefer":
                cache.prefer(rng.sample(digests, 5))
            case "measure" if reader.measuring:
                reader.end_measure(cache, rng.choice(reader.measuring))
            case "build" if reader.building:
                reader.end_build(cache, rng.choice(reader.building))
            case "fail" if reader.measuring or reader.building:
                reader.fail(cache, rng.choice([*reader.measuring, *reader.building]))
            case "forget" if digest not in pins:
                cache.forget_failure(digest)
            case "request" | "cancel" | "discard" | "get":
                getattr(cache, operation)(digest)
            case "poll":
                cache.poll()
            case _:
                return

    operations = ["request"] * 3 + ["poll"] * 3 + ["measure", "build"] * 2
    operations += ["cancel", "discard", "get", "pin", "unpin", "prefer", "fail", "forget"]
    for _ in range(3000):
        ready = {digest for digest in digests if cache.state(digest) is HostState.READY}
        reading = {digest for digest in digests if cache.state(digest) is HostState.READING}
        operation = rng.choice(operations)
        step(operation, rng.choice(digests))
        now = {digest for digest in digests if cache.state(digest) is HostState.READY}
        assert operation == "poll" or ready <= now, "an image went outside poll"
        assert ready & set(pins) <= now, "a pinned image went"
        assert now == set(reader.held)
        ended = {digest for digest in reading if cache.state(digest) in (HostState.READY, HostState.FAILED)}
        assert set(cache.take_ended()) == ended
        cache.check()
    cache.close()
    assert not reader.held
