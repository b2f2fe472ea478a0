"""The pool of builders, over builders without processes and a clock that the test winds."""

import os
from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest

from lorasrv.engine.builder_messages import Build, Built, Failed, Measure, Measured, Message, Started
from lorasrv.engine.builder_pool import BuilderPool
from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.arena import HostArena
from lorasrv.memory.packing import PackedAdapter
from lorasrv_adapters.errors import CorruptBlob
from lorasrv_adapters.host_cache import HostCache, HostState

TIMEOUT_S = 30.0
PAGE_BYTES = 128


@dataclass(eq=False)
class FakeBuilder:
    """Answers when the test says so. After `kill` it is gone only once `dies` says so: until then it may write."""

    sent: deque[Measure | Build] = field(default_factory=deque[Measure | Build])
    answers: list[Message] = field(default_factory=lambda: [Started(pid=1)])
    lost: bool = False
    killed: bool = False
    gone: bool = False
    dies_at_once: bool = True

    def fileno(self) -> int:
        return 0

    def send(self, message: Measure | Build) -> None:
        assert not self.killed, "a message to a builder that was killed"
        assert not self.sent, "a builder is given one thing at a time"
        self.sent.append(message)

    def receive(self) -> list[Message] | None:
        assert not self.killed
        answers, self.answers = self.answers, []
        return answers or (None if self.lost else [])

    def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.killed = True
        self.gone = self.dies_at_once

    def has_ended(self) -> bool:
        return self.gone

    def wait(self, timeout_s: float) -> None:
        self.gone = True

    def answer(self, sizes: dict[str, int]) -> None:
        message = self.sent.popleft()
        if isinstance(message, Measure):
            size = sizes[message.digest]
            built = size <= len(message.places)
            self.answers.append(Measured(digest=message.digest, num_pages=size, num_tiles=0, max_rank=1, built=built))
        else:
            assert len(message.places) == sizes[message.digest]
            self.answers.append(Built(digest=message.digest))

    def fail(self, *, corrupt: bool = False) -> None:
        digest = self.sent.popleft().digest
        self.answers.append(Failed(digest=digest, corrupt=corrupt, message="bad"))

    def die(self) -> None:
        self.sent.clear()
        self.answers.clear()
        self.lost = self.gone = True


@dataclass
class Rig:
    """`sizes` are in pages."""

    num_pages: int
    sizes: dict[str, int]
    num_builders: int = 2
    num_ahead: int = 0
    now: float = 0.0
    spawned: list[FakeBuilder] = field(default_factory=list[FakeBuilder])
    cannot_spawn: bool = False

    def __post_init__(self) -> None:
        self.arena = HostArena(self.num_pages + self.num_ahead, PAGE_BYTES)
        self.pool = BuilderPool(
            self.arena,
            1,
            self.spawn,
            num_builders=self.num_builders,
            num_ahead=self.num_ahead,
            read_timeout_s=TIMEOUT_S,
            clock=lambda: self.now,
        )
        self.cache: HostCache[PackedAdapter] = HostCache(self.num_pages * PAGE_BYTES, self.pool)

    def spawn(self) -> FakeBuilder:
        if self.cannot_spawn:
            raise OSError("no more processes")
        self.spawned.append(FakeBuilder())
        return self.spawned[-1]

    @property
    def alive(self) -> list[FakeBuilder]:
        return [builder for builder in self.spawned if not builder.killed and not builder.lost]

    def builder_of(self, digest: str) -> FakeBuilder:
        (found,) = [each for each in self.alive if each.sent and each.sent[0].digest == digest]
        return found

    def poll(self) -> None:
        self.pool.deliver(self.cache)
        self.cache.poll()
        self.check()

    def check(self) -> None:
        self.cache.check()
        self.pool.check()
        held = sum(len(image.places) for each in self.sizes if (image := self.cache.get(each)) is not None)
        assert held <= self.num_pages

    def read(self, digest: str) -> PackedAdapter:
        self.cache.request(digest)
        for _ in range(2):
            self.poll()
            self.builder_of(digest).answer(self.sizes)
        self.poll()
        image = self.cache.get(digest)
        assert image is not None
        return image

    def close(self) -> None:
        self.cache.close()
        self.pool.close()
        assert self.arena.num_free == self.num_pages + self.num_ahead
        assert not self.alive


@pytest.fixture
def rig() -> Rig:
    return Rig(8, {"a": 3, "b": 3, "c": 2, "d": 8, "e": 1})


def test_an_image_lies_in_pages_of_its_own(rig: Rig) -> None:
    a, b = rig.read("a"), rig.read("b")
    assert len({*a.places, *b.places}) == 6 and a.nbytes == 3 * PAGE_BYTES
    assert rig.arena.used == {*a.places, *b.places}
    rig.cache.discard("a")
    rig.poll()
    assert rig.arena.used == set(b.places)
    rig.close()


def test_with_room_to_build_ahead_a_read_is_one_question() -> None:
    rig = Rig(8, {"a": 3, "b": 2, "c": 5, "d": 4, "e": 4}, num_ahead=4)
    rig.read("a")
    rig.cache.request("b")
    rig.poll()
    rig.builder_of("b").answer(rig.sizes)
    rig.poll()
    b = rig.cache.get("b")
    assert b is not None and len(b.places) == 2 and len(rig.arena.used) == 5, "what was too much is free again"
    # Larger than any before: two questions, and no page is kept meanwhile.
    rig.cache.request("c")
    rig.poll()
    rig.builder_of("c").answer(rig.sizes)
    rig.poll()
    assert [len(message.places) for message in rig.builder_of("c").sent] == [5]
    rig.builder_of("c").answer(rig.sizes)
    rig.poll()
    assert rig.cache.get("c") and len(rig.arena.used) <= 8
    # The largest would take more than is left for that.
    rig.cache.request("d")
    rig.poll()
    assert rig.builder_of("d").sent[0].places == ()
    rig.close()


def test_what_is_built_ahead_takes_no_page_that_the_cache_counts_on() -> None:
    rig = Rig(8, {"a": 4, "b": 4, "c": 4, "d": 4}, num_ahead=4)
    for digest in "ab":
        rig.read(digest) if digest == "a" else rig.cache.request(digest)
    rig.poll()
    rig.builder_of("b").answer(rig.sizes)
    rig.poll()
    for digest in "ab":
        rig.cache.pin(digest)
    rig.cache.request("c")
    rig.poll()
    rig.builder_of("c").answer(rig.sizes)
    for _ in range(3):
        rig.poll()
    assert rig.cache.state("c") is HostState.READING, "built, but there is no room for it"
    assert rig.arena.num_free == 0
    rig.cache.cancel("c")
    rig.poll()
    assert rig.cache.state("c") is HostState.ABSENT and rig.arena.num_free == 4
    rig.cache.request("c")
    rig.poll()
    rig.builder_of("c").answer(rig.sizes)
    rig.cache.unpin("a")
    rig.poll()
    assert rig.cache.get("c") and rig.cache.get("a") is None
    rig.close()


def test_a_hanging_read_delays_nobody_else(rig: Rig) -> None:
    """Both builders hang; others take over, and after the time-out each attempt has failed, by name."""
    for digest in "ab":
        rig.cache.request(digest)
    rig.poll()
    rig.cache.request("c")
    rig.poll()
    assert len(rig.alive) == 2 and rig.cache.snapshot().queued == ("c",)
    rig.now = 2.0
    rig.poll()
    assert rig.pool.reading == {"a": True, "b": True}
    assert rig.cache.snapshot().queued == ("c",), "who hears of it may want others"
    rig.read("c")
    rig.read("e")
    assert len(rig.alive) == 3
    rig.now = TIMEOUT_S + 1.0
    rig.poll()
    for digest in "ab":
        failure = rig.cache.failure(digest)
        assert isinstance(failure, AdapterLoadFailed) and "longer than 30 s" in str(failure)
    assert len(rig.spawned) - len(rig.alive) == 2, "the two that hung are killed, and no other"
    rig.cache.forget_failure("a")
    rig.read("a")
    rig.close()


def test_slow_reads_bring_a_bounded_number_of_builders(rig: Rig) -> None:
    rig.sizes |= {f"s{index}": 1 for index in range(20)}
    for index in range(20):
        rig.cache.request(f"s{index}")
    for _ in range(20):
        rig.now += 1.1
        rig.poll()
    assert len(rig.alive) == 2 + 6
    for builder in rig.alive:
        builder.answer(rig.sizes)
        rig.poll()
    for _ in range(100):
        for builder in rig.alive:
            if builder.sent:
                builder.answer(rig.sizes)
        rig.poll()
    assert len(rig.alive) == 2, "they go when nothing is slow any more"
    rig.close()


def test_pages_of_a_killed_builder_are_not_given_away_before_it_is_gone(rig: Rig) -> None:
    rig.cache.request("d")
    rig.poll()
    rig.builder_of("d").answer(rig.sizes)
    rig.poll()
    hung = rig.builder_of("d")
    hung.dies_at_once = False
    rig.now = TIMEOUT_S + 1.0
    rig.poll()
    assert rig.cache.state("d") is HostState.FAILED
    assert rig.arena.num_free == 0
    rig.cache.request("a")
    rig.poll()
    rig.builder_of("a").answer(rig.sizes)
    rig.poll()
    assert not any(builder.sent for builder in rig.alive), "there are no pages to build in"
    hung.gone = True
    rig.poll()
    rig.builder_of("a").answer(rig.sizes)
    rig.poll()
    assert rig.cache.get("a")
    rig.close()


def test_a_read_that_not_even_a_kill_ends_is_not_begun_again() -> None:
    """Else each attempt would leave one more process; others' reads go on."""
    rig = Rig(4, {"a": 2, "b": 1})
    rig.cache.request("a")
    rig.poll()
    stuck = rig.builder_of("a")
    stuck.dies_at_once = False
    rig.now = TIMEOUT_S + 1.0
    rig.poll()
    for attempt in range(3):
        rig.cache.forget_failure("a")
        rig.now += 2.0
        rig.cache.request("a")
        rig.poll()
        assert "still hangs" in str(rig.cache.failure("a")), attempt
    rig.read("b")
    assert len(rig.spawned) - len(rig.alive) == 1
    stuck.gone = True
    rig.poll()
    rig.cache.forget_failure("a")
    rig.read("a")
    rig.close()


def test_there_is_an_end_to_builders_that_not_even_a_kill_ends() -> None:
    rig = Rig(4, {f"a{index}": 1 for index in range(100)})
    for digest in rig.sizes:
        rig.cache.request(digest)
    for _ in range(100):
        rig.poll()
        for builder in rig.spawned:
            builder.dies_at_once = False
        rig.now += 11.0
    assert 32 < len(rig.spawned) <= 32 + 2 * 8
    for builder in rig.spawned:
        builder.gone = builder.killed
    rig.poll()
    assert sum(len(builder.sent) for builder in rig.alive) == 2, "reads go on"
    rig.close()


def test_what_a_killed_builder_may_still_write_to_counts_as_built_ahead() -> None:
    rig = Rig(8, {"a": 4, "b": 4, "c": 4, "d": 4}, num_ahead=4)
    rig.read("a")
    rig.cache.request("b")
    rig.poll()
    hung = rig.builder_of("b")
    assert len(hung.sent[0].places) == 4
    hung.dies_at_once = False
    rig.now = TIMEOUT_S + 1.0
    rig.poll()
    for digest in "acd":
        rig.read(digest) if digest != "a" else rig.cache.pin(digest)
    assert rig.cache.get("a") and rig.cache.get("d"), "all of the cache's own pages are there"
    hung.gone = True
    rig.poll()
    rig.close()


@pytest.mark.parametrize("num_answers", [0, 1])
def test_a_builder_that_dies_is_replaced_once_for_its_read(rig: Rig, num_answers: int) -> None:
    """While it measures or builds; the neighbour's builder goes on."""
    for digest in "ae":
        rig.cache.request(digest)
    rig.poll()
    for _ in range(num_answers):
        rig.builder_of("a").answer(rig.sizes)
        rig.poll()
    rig.builder_of("a").die()
    rig.poll()
    rig.builder_of("a").die()
    rig.poll()
    failure = rig.cache.failure("a")
    assert isinstance(failure, AdapterLoadFailed) and "died" in str(failure)
    for _ in range(2):
        rig.builder_of("e").answer(rig.sizes)
        rig.poll()
    assert rig.cache.get("e")
    rig.cache.forget_failure("a")
    rig.cache.request("a")
    rig.poll()
    rig.builder_of("a").die()
    rig.poll()
    for _ in range(2):
        rig.builder_of("a").answer(rig.sizes)
        rig.poll()
    assert rig.cache.get("a"), "the second try counts"
    rig.close()


def test_a_builder_that_dies_while_its_image_waits_for_room_is_replaced(rig: Rig) -> None:
    rig.read("a")
    rig.cache.pin("a")
    rig.cache.request("d")
    rig.poll()
    waiting = rig.builder_of("d")
    waiting.answer(rig.sizes)
    rig.poll()
    rig.now = 2 * TIMEOUT_S
    rig.poll()
    assert rig.cache.state("d") is HostState.READING, "what waits for room is not slow"
    waiting.die()
    rig.poll()
    rig.cache.unpin("a")
    rig.poll()
    rig.builder_of("d").answer(rig.sizes)
    rig.poll()
    assert rig.cache.get("d")
    rig.close()


def test_damage_and_refusal_are_told_apart(rig: Rig) -> None:
    for digest, corrupt in (("a", True), ("b", False)):
        rig.cache.request(digest)
        rig.poll()
        rig.builder_of(digest).fail(corrupt=corrupt)
        rig.poll()
        assert isinstance(rig.cache.failure(digest), CorruptBlob if corrupt else AdapterLoadFailed)
    rig.close()


def test_where_no_process_can_be_started_the_read_fails(rig: Rig) -> None:
    for digest in "ab":
        rig.cache.request(digest)
    rig.poll()
    rig.cannot_spawn = True
    rig.now = 2.0
    rig.cache.request("c")
    for _ in range(3):
        rig.poll()
    assert isinstance(rig.cache.failure("c"), OSError)
    rig.builder_of("a").die()
    rig.poll()
    assert isinstance(rig.cache.failure("a"), OSError)
    rig.close()


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_answers_and_deaths_loses_no_page(seed: int) -> None:
    random = Random(seed)
    digests = [f"a{index}" for index in range(12)]
    sizes = {digest: random.randint(1, 10) for digest in digests}
    rig = Rig(10, sizes, num_builders=random.randint(1, 3), num_ahead=random.choice((0, 5, 10, 30)))
    pinned: list[str] = []
    for _ in range(1500):
        match random.choice(
            ["request", "request", "answer", "answer", "answer", "fail", "die", "time", "pin", "unpin"]
        ):
            case "request":
                digest = random.choice(digests)
                rig.cache.forget_failure(digest) if digest not in pinned else None
                rig.cache.request(digest)
                if random.random() < 0.2:
                    random.choice([rig.cache.cancel, rig.cache.discard])(digest)
            case "answer" | "fail" | "die" as what:
                if busy := [builder for builder in rig.alive if builder.sent]:
                    builder = random.choice(busy)
                    builder.answer(rig.sizes) if what == "answer" else getattr(builder, what)()
            case "time":
                rig.now += random.choice([0.5, 0.5, 0.5, 10.0])
                for builder in rig.spawned:
                    builder.dies_at_once, builder.gone = random.random() < 0.5, builder.gone or builder.killed
            case "pin":
                digest = random.choice(digests)
                if rig.cache.state(digest) in (HostState.READY, HostState.READING):
                    rig.cache.pin(digest)
                    pinned.append(digest)
            case "unpin" if pinned:
                rig.cache.unpin(pinned.pop(random.randrange(len(pinned))))
            case _:
                pass
        rig.poll()
    rig.close()


def test_ten_thousand_loads_find_room_whenever_pages_suffice() -> None:
    """Images of any sizes come and go: nothing fragments, and nothing is lost."""
    random = Random(0)
    arena = HostArena(300, PAGE_BYTES)
    held: list[tuple[int, ...]] = []
    for _ in range(10_000):
        num_pages, num_free = random.randint(1, 60), arena.num_free
        places = arena.alloc(num_pages)
        assert (places is not None) == (num_pages <= num_free)
        if places is not None:
            held.append(places)
        while held and (places is None or random.random() < 0.5):
            arena.free(held.pop(random.randrange(len(held))))
            places = ()
        arena.check()
        assert arena.num_free + sum(map(len, held)) == 300
    arena.close()


def test_an_arena_takes_up_only_what_is_written() -> None:
    arena = HostArena(1 << 16, 4096)
    assert os.fstat(arena.descriptor).st_blocks == 0
    places = arena.alloc(3)
    assert places is not None
    arena.pages[list(places)] = 1
    assert 3 * 8 <= os.fstat(arena.descriptor).st_blocks <= 64 * 8
    arena.close()
