"""The engine's core over the real tiers: reads in worker threads, a host cache smaller than what is asked for."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import cast

import pytest

from fakes import EOS, VOCAB, FakeDevice, FakeRunner, FakeTiers, expected_tokens
from lorasrv.config import SchedulerConfig
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.engine.image_readers import ThreadReader
from lorasrv.engine.tiers import Tiers
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.memory.storage import PageStorage
from lorasrv.types import AdapterUse, EngineRequest, Tier, TokenDelta, Warm

BLOCK_TOKENS = 4
WAIT_S = 10.0


@dataclass(frozen=True)
class Image:
    """A packed adapter without weights."""

    digest: str
    num_pages: int
    nbytes: int = 1
    max_rank: int = 1


@dataclass
class Storage:
    """Writes images to a fake device."""

    device: FakeDevice
    beside_steps: bool = True
    loaded: dict[int, ResidentAdapter] = field(default_factory=dict[int, ResidentAdapter])

    def begin_adapter(self, image: Image, pages: list[int], *, wait_for_steps: bool) -> "Copy":
        assert len(pages) == image.num_pages
        self.loaded[pages[0]] = ResidentAdapter(
            digest=image.digest, pages=tuple(pages), directory=pages[0], max_rank=image.max_rank
        )
        return Copy(image.digest, pages)

    def advance(self, copy: "Copy", max_bytes: int) -> int:
        """A page is a byte."""
        slices = range(copy.num_issued, min(copy.num_issued + max_bytes, len(copy.pages)))
        for local in slices:
            self.device.write_adapter_page(copy.digest, local, copy.pages[local])
        copy.num_issued += len(slices)
        return len(slices)


@dataclass
class Copy:
    digest: str
    pages: list[int]
    num_issued: int = 0

    @property
    def directory(self) -> int:
        return self.pages[0]

    @property
    def issued(self) -> bool:
        return self.num_issued == len(self.pages)

    @property
    def ended(self) -> bool:
        return self.issued


def make_core(
    read: Callable[[str], Image], *, budget_bytes: int, num_pages: int, max_running: int = 8, copy_bytes: int = 2
) -> tuple[EngineCore, Tiers]:
    device = FakeDevice(block_tokens=BLOCK_TOKENS)
    storage = Storage(device)
    reader = ThreadReader(cast("Callable[[str], PackedAdapter]", read), lambda image: image.nbytes)
    tiers = Tiers(cast(PageStorage, storage), reader, budget_bytes, copy_bytes)
    limits = Limits(
        num_pages=num_pages,
        page_bytes=1 << 20,
        block_tokens=BLOCK_TOKENS,
        context_tokens=200,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
    )
    config = SchedulerConfig(max_step_tokens=32, max_running=max_running)
    runner = FakeRunner(device, cast(FakeTiers, storage))
    return EngineCore(config=config, limits=limits, runner=runner, tiers=tiers, clock=lambda: 0.0), tiers


def make_requests(num_requests: int, digests: Sequence[str], seed: int) -> dict[str, EngineRequest]:
    random = Random(seed)
    return {
        f"r{index}": EngineRequest(
            request_id=f"r{index}",
            token_ids=tuple(random.randrange(1, VOCAB) for _ in range(random.randint(1, 12))),
            adapter=AdapterUse(digest=digests[index % len(digests)]),
            max_tokens=random.randint(1, 8),
            seed=0,
        )
        for index in range(num_requests)
    }


def run_all(core: EngineCore, max_steps: int = 20_000) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    for _ in range(max_steps):
        if not core.has_work():
            return deltas
        deltas += core.step()
        core.check()
    raise AssertionError(f"work is left after {max_steps} steps")


def assert_right(deltas: Sequence[TokenDelta], requests: Mapping[str, EngineRequest]) -> None:
    tokens: dict[str, list[int]] = {request_id: [] for request_id in requests}
    for delta in deltas:
        assert delta.failure is None
        tokens[delta.request_id] += delta.token_ids
    for request_id, request in requests.items():
        assert request.adapter is not None
        assert tokens[request_id] == expected_tokens(request.token_ids, request.adapter.digest, request.max_tokens)


@pytest.mark.parametrize("budget_bytes", [1, 2, 3])
@pytest.mark.parametrize("num_pages", [8, 40])
@pytest.mark.parametrize("seed", range(4))
def test_a_host_cache_of_few_images_serves_many_adapters(budget_bytes: int, num_pages: int, seed: int) -> None:
    digests = [f"a{index}" for index in range(10)]
    core, _ = make_core(
        lambda digest: Image(digest, 1 + int(digest[1:]) % 3), budget_bytes=budget_bytes, num_pages=num_pages
    )
    requests = make_requests(30, digests, seed)
    for request in requests.values():
        core.add(request)
    assert_right(run_all(core), requests)
    core.close()


def test_a_read_that_ends_between_decision_and_load_takes_nothing_from_the_plan() -> None:
    """The planner was told that `a0` is in host memory; `a1`, which needs its place, arrives before it is loaded."""
    gate, ended = threading.Event(), threading.Event()

    def read(digest: str) -> Image:
        if digest == "a1":
            assert gate.wait(WAIT_S)
            ended.set()
        return Image(digest, 1)

    core, tiers = make_core(read, budget_bytes=1, num_pages=8)
    answer = tiers.num_pages

    def num_pages(digest: str) -> int | None:
        found = answer(digest)
        if digest == "a0" and found is not None and not gate.is_set():
            gate.set()
            assert ended.wait(WAIT_S)
            tiers.wait(WAIT_S)
        return found

    tiers.num_pages = num_pages  # type: ignore[method-assign]
    requests = make_requests(2, ["a0", "a1"], 0)
    for request in requests.values():
        core.add(request)
    assert_right(run_all(core), requests)
    core.close()


def test_adapters_that_must_wait_for_pages_are_read_once() -> None:
    """All pages are taken: what the queue wants is read until the host cache is full, and then no more."""
    reads: list[str] = []

    def read(digest: str) -> Image:
        reads.append(digest)
        return Image(digest, 2)

    core, tiers = make_core(read, budget_bytes=2, num_pages=8)
    core.add(EngineRequest(request_id="base", token_ids=(1,) * 20, adapter=None, max_tokens=12, seed=0))
    core.step()
    requests = make_requests(30, [f"a{index}" for index in range(10)], 0)
    for request in requests.values():
        core.add(request)
    for _ in range(100):
        # What steps do while nothing fits, without the one that runs coming to its end.
        tiers.want([f"a{index}" for index in range(10)])
        tiers.poll()
        tiers.wait(0.001)
        core.check()
    assert len(reads) == len(set(reads)) <= 4
    deltas = run_all(core)
    assert_right([delta for delta in deltas if delta.request_id in requests], requests)
    core.close()


def test_a_failure_that_nobody_waited_for_is_forgotten() -> None:
    """A request is cancelled while its adapter is read; the read fails; a later request reads again."""
    gate, num_reads = threading.Event(), 0

    def read(digest: str) -> Image:
        nonlocal num_reads
        assert gate.wait(WAIT_S)
        num_reads += 1
        if num_reads == 1:
            raise OSError("the disk is away")
        return Image(digest, 1)

    core, tiers = make_core(read, budget_bytes=1, num_pages=8)
    requests = make_requests(2, ["a0"], 0)
    core.add(requests["r0"])
    core.step()
    core.cancel("r0")
    assert not core.has_work()
    gate.set()
    tiers.wait(WAIT_S)
    core.add(requests["r1"])
    assert_right(run_all(core), {"r1": requests["r1"]})
    core.check()
    core.close()


def test_close_waits_for_reads_that_run_and_begins_no_more() -> None:
    gate, begun, reads = threading.Event(), threading.Semaphore(0), list[str]()

    def read(digest: str) -> Image:
        reads.append(digest)
        begun.release()
        assert gate.wait(WAIT_S)
        return Image(digest, 1)

    core, _ = make_core(read, budget_bytes=100, num_pages=8)
    for request in make_requests(8, [f"a{index}" for index in range(8)], 0).values():
        core.add(request)
    core.step()
    assert begun.acquire(timeout=WAIT_S) and begun.acquire(timeout=WAIT_S)
    threading.Timer(0.05, gate.set).start()
    core.close()
    assert len(reads) == 2


def test_a_discarded_adapter_leaves_the_host_when_nobody_wants_it() -> None:
    reads: list[str] = []

    def read(digest: str) -> Image:
        reads.append(digest)
        return Image(digest, 1)

    core, tiers = make_core(read, budget_bytes=4, num_pages=8)

    def read_all(digests: Sequence[str]) -> None:
        tiers.want(digests)
        while any(tiers.num_pages(digest) is None for digest in digests):
            tiers.wait(WAIT_S)
            tiers.poll()

    read_all(["a0", "a1"])
    tiers.discard("a0")
    tiers.poll()
    assert tiers.num_pages("a0") == 1, "it is wanted"
    tiers.want(["a1"])
    assert tiers.num_pages("a0") == 1, "images go in poll alone"
    tiers.poll()
    assert tiers.host_tiers() == {"a1": Tier.HOST}
    tiers.discard("a1")
    tiers.want([])
    read_all(["a1"])
    tiers.poll()
    assert tiers.host_tiers() == {"a1": Tier.HOST}, "it was wanted again"
    read_all(["a0", "a1"])
    assert reads.count("a0") == 2 and reads.count("a1") == 1
    core.check()
    core.close()


def test_an_image_that_no_host_cache_of_this_size_takes_is_refused_for_good() -> None:
    core, _ = make_core(lambda digest: Image(digest, 1, nbytes=9), budget_bytes=8, num_pages=8)
    (request,) = make_requests(1, ["a0"], 0).values()
    core.add(request)
    core.warm(Warm(warm_id=1, digest="a0", tier=Tier.HOST, deadline_s=1.0))
    (delta,) = [delta for delta in run_all(core) if delta.failure]
    (warmed,) = core.take_warmed()
    assert delta.failure is not None and delta.failure == warmed.failure
    assert delta.failure.reason == "RESOURCE_EXHAUSTED"
    assert "9 bytes of host memory; the host cache has 8" in delta.failure.message
    core.close()


@pytest.mark.parametrize("budget_bytes", [1, 2])
def test_warms_and_requests_pass_through_a_host_cache_of_few_images(budget_bytes: int) -> None:
    """Warms that wait for pages keep no image from the requests."""
    digests = [f"a{index}" for index in range(10)]
    core, tiers = make_core(lambda digest: Image(digest, 2), budget_bytes=budget_bytes, num_pages=8)
    requests = make_requests(20, digests[:5], 0)
    for index, digest in enumerate(digests):
        tier = Tier.HOST if index % 2 else Tier.DEVICE
        core.warm(Warm(warm_id=index, digest=digest, tier=tier, deadline_s=1.0))
    for request in requests.values():
        core.add(request)
    assert_right(run_all(core), requests)
    assert {warmed.warm_id: warmed.failure for warmed in core.take_warmed()} == dict.fromkeys(range(10))
    assert not tiers._wanted
    core.close()


def test_a_step_copies_no_more_than_its_bytes_the_oldest_adapter_first() -> None:
    """Two adapters of five pages arrive two pages a step, one behind the other, and run when they are whole."""
    core, tiers = make_core(lambda digest: Image(digest, 5), budget_bytes=2, num_pages=16, copy_bytes=2)
    tiers.want(["a0", "a1"])
    while any(tiers.num_pages(digest) is None for digest in ("a0", "a1")):
        tiers.wait(WAIT_S)
        tiers.poll()
    for first, digest in ((0, "a0"), (5, "a1")):
        tiers.load(digest, list(range(first, first + 5)), wait_for_steps=False)
    tiers.want([])
    issued: list[list[int]] = []
    loaded: list[str] = []
    while tiers._copies:
        issued.append([copy.num_issued for copy in tiers._copies.values()])
        tiers.wait(WAIT_S)
        loaded += tiers.poll().loaded
        assert tiers._host.snapshot().pinned_bytes == len(tiers._copies), "what is being copied stays"
    assert issued == [[2, 0], [4, 0], [1], [3]]
    assert loaded == ["a0", "a1"]
    core.check()
    core.close()


@pytest.mark.parametrize("copy_bytes", [7, 8])
def test_where_copies_are_made_at_once_the_last_load_that_fits_a_step_is_over(copy_bytes: int) -> None:
    """Of four adapters of four pages each the first is over in any case, the second if the step's bytes suffice for
    it; the others come with later polls, in order."""
    core, tiers = make_core(lambda digest: Image(digest, 4, 4), budget_bytes=16, num_pages=16, copy_bytes=copy_bytes)
    cast(Storage, tiers._storage).beside_steps = False
    digests = ["a0", "a1", "a2", "a3"]
    tiers.want(digests)
    while any(tiers.num_pages(digest) is None for digest in digests):
        tiers.wait(WAIT_S)
        tiers.poll()
    tiers.want([])
    over: list[bool] = []
    for number, digest in enumerate(digests):
        over.append(tiers.bytes_at_once() >= 4)
        tiers.load(digest, list(range(4 * number, 4 * number + 4)), wait_for_steps=False)
        assert (digest in tiers._copies) != over[-1], "what is over is told of by no poll"
    assert over == [True, copy_bytes == 8, False, False]
    assert [*tiers.poll().loaded, *tiers.poll().loaded] == digests[sum(over) :]
    assert not tiers._host.snapshot().pinned_bytes
    core.check()
    core.close()


def test_states_are_told_from_queued_to_failed() -> None:
    gate = threading.Event()

    def read(digest: str) -> Image:
        assert gate.wait(WAIT_S)
        if digest == "a0":
            raise OSError("the disk is away")
        return Image(digest, 3)

    core, _ = make_core(read, budget_bytes=4, num_pages=16, copy_bytes=1)

    def tier_of() -> dict[str, Tier]:
        return {adapter.digest: adapter.tier for adapter in core.status().adapters}

    requests = make_requests(4, ["a0", "a1", "a2", "a3"], 0)
    for request in requests.values():
        core.add(request)
    core.step()
    assert tier_of() == dict.fromkeys(("a0", "a1"), Tier.READING) | dict.fromkeys(("a2", "a3"), Tier.QUEUED)
    gate.set()
    seen: set[Tier] = set()
    while core.has_work():
        core.step()
        seen |= set(tier_of().values())
    assert {Tier.HOST, Tier.COPYING, Tier.DEVICE} <= seen
    (failed,) = [adapter for adapter in core.status().adapters if adapter.tier is Tier.FAILED]
    assert failed.digest == "a0" and failed.failure is not None
    assert (failed.failure.reason, failed.failure.message) == ("ADAPTER_LOAD_FAILED", "version a0 could not be read")
    core.discard("a0")
    assert "a0" not in tier_of()
    core.close()
