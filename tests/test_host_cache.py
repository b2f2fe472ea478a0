"""The host cache: coalesced loads, a hard byte budget, pins, failures that do not poison."""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from lorasrv.engine.image_readers import ThreadReader
from lorasrv_adapters.errors import ImageTooLarge
from lorasrv_adapters.host_cache import HostCache, HostState

WAIT_S = 10.0


@dataclass
class Loader:
    """Images are byte strings; `gate` closed holds every load back."""

    sizes: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def load(self, digest: str) -> bytes:
        self.calls.append(digest)
        assert self.gate.wait(WAIT_S)
        if digest in self.broken:
            raise OSError(f"cannot read {digest}")
        return digest.encode() * self.sizes.get(digest, 1)

    def wait_ended(self, num_loads: int = 1) -> None:
        for _ in range(num_loads):
            assert self.ended.acquire(timeout=WAIT_S)


class Cache(HostCache[bytes]):
    """A cache over a reader with threads: `poll` first hears what that has read."""

    def __init__(self, budget_bytes: int, loader: Loader) -> None:
        self.reader = ThreadReader(loader.load, len, on_load_end=loader.ended.release)
        super().__init__(budget_bytes, self.reader)

    def poll(self) -> None:
        self.reader.deliver(self)
        super().poll()

    def check(self) -> None:
        self.reader.check()
        super().check()

    def close(self) -> None:
        self.reader.close()
        super().close()


Make = Callable[[int], Cache]


@pytest.fixture
def loader() -> Loader:
    loader = Loader()
    loader.gate.set()
    return loader


@pytest.fixture
def make(loader: Loader) -> Iterator[Make]:
    made: list[Cache] = []

    def make(budget: int) -> Cache:
        made.append(Cache(budget, loader))
        return made[-1]

    yield make
    loader.gate.set()
    for cache in made:
        cache.close()


def read(cache: Cache, loader: Loader, digest: str) -> bytes | None:
    cache.request(digest)
    loader.wait_ended()
    cache.poll()
    cache.check()
    return cache.get(digest)


def test_request_does_not_block_and_coalesces(make: Make, loader: Loader) -> None:
    cache = make(10)
    loader.gate.clear()
    for _ in range(5):
        cache.request("a")
        cache.check()
    assert (cache.state("a"), cache.get("a")) == (HostState.READING, None)
    loader.gate.set()
    loader.wait_ended()
    cache.poll()
    assert (cache.state("a"), cache.get("a"), loader.calls) == (HostState.READY, b"a", ["a"])
    cache.request("a")
    cache.check()
    assert loader.calls == ["a"]


def test_evicts_the_least_recently_got(make: Make, loader: Loader) -> None:
    cache = make(3)
    for digest in "abc":
        assert read(cache, loader, digest)
    assert cache.get("a")
    assert read(cache, loader, "d")
    assert [cache.state(digest) for digest in "abcd"] == [
        HostState.READY,
        HostState.ABSENT,
        HostState.READY,
        HostState.READY,
    ]
    assert cache.snapshot().used_bytes == 3


def test_images_nobody_has_got_yet_go_last(make: Make, loader: Loader) -> None:
    cache = make(2)
    cache.request("a")
    loader.wait_ended()
    cache.poll()
    cache.check()
    assert read(cache, loader, "b") == b"b"
    assert read(cache, loader, "c") == b"c"
    assert (cache.state("a"), cache.state("b")) == (HostState.READY, HostState.ABSENT)


def test_pinned_images_stay_and_newcomers_wait(make: Make, loader: Loader) -> None:
    cache = make(1)
    assert read(cache, loader, "a")
    cache.pin("a")
    for digest in "bcd":
        cache.request(digest)
    loader.wait_ended(2)
    cache.poll()
    cache.check()
    assert cache.get("a") == b"a"
    assert cache.state("b") is HostState.READING
    assert "d" not in loader.calls
    cache.unpin("a")
    cache.poll()
    cache.check()
    loader.wait_ended()
    cache.poll()
    cache.check()
    assert cache.state("a") is HostState.ABSENT
    assert cache.state("d") is HostState.READY


def test_nothing_comes_or_goes_but_in_poll(make: Make, loader: Loader) -> None:
    cache = make(1)
    assert read(cache, loader, "a")
    cache.request("b")
    loader.wait_ended()
    assert (cache.get("a"), cache.state("b")) == (b"a", HostState.READING)
    cache.pin("b")
    cache.unpin("b")
    cache.request("c")
    cache.check()
    assert cache.get("a") == b"a"
    cache.poll()
    assert (cache.get("a"), cache.get("b")) == (None, b"b")


def test_a_pin_may_come_before_the_image(make: Make, loader: Loader) -> None:
    cache = make(1)
    loader.gate.clear()
    cache.request("a")
    cache.pin("a")
    loader.gate.set()
    loader.wait_ended()
    cache.poll()
    cache.request("b")
    loader.wait_ended()
    cache.poll()
    assert (cache.state("a"), cache.state("b")) == (HostState.READY, HostState.READING)
    assert cache.snapshot().pinned_bytes == 1
    with pytest.raises(AssertionError, match="pin of z"):
        cache.pin("z")


def test_a_failure_stays_until_forgotten_and_poisons_nothing(make: Make, loader: Loader) -> None:
    cache = make(2)
    loader.broken.add("a")
    assert read(cache, loader, "a") is None
    assert read(cache, loader, "b") == b"b"
    cache.request("a")
    assert cache.state("a") is HostState.FAILED
    assert isinstance(cache.failure("a"), OSError)
    assert loader.calls == ["a", "b"]
    loader.broken.clear()
    cache.forget_failure("a")
    assert cache.state("a") is HostState.ABSENT
    assert read(cache, loader, "a") == b"a"
    assert cache.failure("a") is None


def test_larger_than_the_budget_fails_naming_both(make: Make, loader: Loader) -> None:
    cache = make(10)
    loader.sizes["a"] = 11
    assert read(cache, loader, "b")
    assert read(cache, loader, "a") is None
    failure = cache.failure("a")
    assert isinstance(failure, ImageTooLarge)
    assert "11" in str(failure)
    assert "10" in str(failure)
    assert cache.get("b") == b"b"


@pytest.mark.parametrize("seed", range(5))
def test_random_use_keeps_every_invariant(make: Make, loader: Loader, seed: int) -> None:
    rng = random.Random(seed)
    digests = "abcdefghij"
    loader.sizes.update({digest: rng.randint(1, 6) for digest in digests})
    loader.broken.update(rng.sample(digests, 2))
    cache = make(8)
    pinned: list[str] = []
    got: set[str] = set()
    for _ in range(400):
        digest = rng.choice(digests)
        cache.poll()
        cache.request(digest)
        if rng.random() < 0.2:
            cache.discard(rng.choice(digests))
            cache.check()
        if rng.random() < 0.3 and cache.state(digest) is HostState.READY:
            cache.pin(digest)
            pinned.append(digest)
        for held in pinned:
            assert cache.get(held) == held.encode() * loader.sizes[held]
        if pinned and rng.random() < 0.5:
            cache.unpin(pinned.pop(rng.randrange(len(pinned))))
        if cache.get(digest):
            got.add(digest)
        if cache.failure(digest):
            cache.forget_failure(digest)
        cache.check()
    for held in pinned:
        cache.unpin(held)
    for digest in digests:
        while cache.state(digest) not in (HostState.READY, HostState.FAILED):
            cache.request(digest)
            assert loader.ended.acquire(timeout=WAIT_S)
            cache.poll()
    cache.check()
    assert cache.snapshot().pinned_bytes == 0


def test_close_drops_everything(make: Make, loader: Loader) -> None:
    cache = make(3)
    loader.broken.add("b")
    for digest in "ab":
        assert read(cache, loader, digest) == (None if digest == "b" else b"a")
    cache.pin("a")
    cache.request("c")
    loader.wait_ended()
    cache.close()
    cache.poll()
    cache.check()
    assert (cache.snapshot().states, cache.snapshot().used_bytes) == ({}, 0)


def test_a_discarded_image_goes_with_the_next_poll_and_no_other(make: Make, loader: Loader) -> None:
    cache = make(10)
    for digest in "ab":
        assert read(cache, loader, digest)
    cache.discard("a")
    cache.discard("z")
    cache.check()
    assert cache.get("a") == b"a"
    cache.poll()
    cache.check()
    assert (cache.state("a"), cache.get("b")) == (HostState.ABSENT, b"b")
    assert cache.snapshot().used_bytes == 1
    assert read(cache, loader, "a") == b"a"
    cache.poll()
    assert cache.get("a") == b"a"


def test_a_discarded_image_stays_while_it_is_pinned(make: Make, loader: Loader) -> None:
    cache = make(10)
    assert read(cache, loader, "a")
    cache.pin("a")
    cache.discard("a")
    cache.poll()
    assert cache.get("a") == b"a"
    cache.unpin("a")
    assert cache.get("a") == b"a"
    cache.poll()
    cache.check()
    assert cache.snapshot().states == {}


def test_what_is_discarded_while_it_is_read_is_not_kept(make: Make, loader: Loader) -> None:
    """In a worker's hands, queued behind those, or failing: it goes, and evicts nothing on its way."""
    cache = make(3)
    assert read(cache, loader, "a")
    loader.gate.clear()
    loader.broken.add("c")
    loader.sizes["b"] = 3
    for digest in "bcde":
        cache.request(digest)
    for digest in "bcd":
        cache.discard(digest)
    cache.poll()
    cache.check()
    assert [cache.state(digest) for digest in "bcde"] == [
        HostState.READING,
        HostState.READING,
        HostState.ABSENT,
        HostState.READING,
    ]
    loader.gate.set()
    loader.wait_ended(2)
    cache.poll()
    cache.check()
    loader.wait_ended()
    cache.poll()
    cache.check()
    assert cache.snapshot().states == {"a": HostState.READY, "e": HostState.READY}
    assert "d" not in loader.calls


def test_what_waits_for_room_can_be_discarded(make: Make, loader: Loader) -> None:
    cache = make(1)
    assert read(cache, loader, "a")
    cache.pin("a")
    cache.request("b")
    loader.wait_ended()
    cache.poll()
    cache.discard("b")
    cache.poll()
    cache.check()
    assert cache.snapshot().states == {"a": HostState.READY}


def test_a_request_takes_a_discard_back(make: Make, loader: Loader) -> None:
    cache = make(2)
    assert read(cache, loader, "a")
    loader.gate.clear()
    cache.request("b")
    for digest in "ab":
        cache.discard(digest)
        cache.request(digest)
    loader.gate.set()
    loader.wait_ended()
    cache.poll()
    cache.check()
    assert (cache.get("a"), cache.get("b"), loader.calls) == (b"a", b"b", ["a", "b"])


def test_a_discarded_failure_is_forgotten(make: Make, loader: Loader) -> None:
    cache = make(1)
    loader.broken.update("ab")
    for digest in "ab":
        assert read(cache, loader, digest) is None
        cache.discard(digest)
    cache.forget_failure("b")
    cache.check()
    cache.poll()
    cache.check()
    assert cache.snapshot().states == {}
