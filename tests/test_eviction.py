"""The order in which idle adapters and blocks go, against brute force; what things cost, as measured; the economy of
both on a fake device."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_rig import BLOCK_TOKENS, PAGE_BYTES, make_core, make_request, run_all, tokens_of
from fakes import FakeRunner, expected_tokens
from lorasrv.engine.core import EngineCore
from lorasrv.engine.costs import Costs, Traffic
from lorasrv.memory.eviction import Candidate, EvictionOrder, GreedyDual, IdleAdapter, Name, Policy, round_up
from lorasrv.memory.likelihood import HORIZON, Likelihood, RequestClock
from lorasrv.memory.prefix import PrefixCache
from lorasrv_bench.policies import LeastFrequentlyUsed, LeastRecentlyUsed


def name_of(candidate: Candidate) -> Name:
    return candidate.digest if isinstance(candidate, IdleAdapter) else candidate.page


@dataclass
class BruteForce:
    """Every idle thing with its priority, in a list that is sorted when asked."""

    inflates: bool
    inflation: float = 0.0
    count: int = 0
    idle: dict[Name, tuple[float, int]] = field(default_factory=dict[Name, tuple[float, int]])

    def add(self, name: Name, worth: float) -> None:
        self.count += 1
        self.idle[name] = (self.inflation + worth, self.count)

    def evict(self, name: Name) -> None:
        priority, _ = self.idle.pop(name)
        if self.inflates:
            self.inflation = max(self.inflation, priority)

    def order(self) -> list[Name]:
        return sorted(self.idle, key=lambda name: self.idle[name])


@pytest.mark.parametrize("policy", [GreedyDual(), LeastRecentlyUsed(), LeastFrequentlyUsed()])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_brute_force(policy: Policy, seed: int) -> None:
    random, order, brute = Random(seed), EvictionOrder(policy), BruteForce(inflates=policy.inflates)
    for step in range(1500):
        name: Name = random.choice((random.randrange(40), f"a{random.randrange(20)}"))
        num_pages = 1 if isinstance(name, int) else 1 + len(name)
        if name not in order:
            likelihood, cost_s = random.choice((0.0, 1e-9, random.random(), 40.0)), 10 ** random.uniform(-6, 0)
            worth = order.worth(likelihood, cost_s, num_pages)
            exact = policy.worth(likelihood, cost_s, num_pages)
            assert exact <= worth <= 1.5 * exact
            order.add(name, num_pages, worth)
            brute.add(name, worth)
        elif random.random() < 0.5:
            order.discard(name)
            del brute.idle[name]
        else:
            victims = [name_of(each) for each in islice(order, random.randint(1, 4))]
            assert victims == brute.order()[: len(victims)]
            for victim in victims:
                order.evict(victim)
                brute.evict(victim)
        order.check()
        if step % 10 == 0:
            assert [name_of(each) for each in order] == brute.order()
        assert len(order) == len(brute.idle)


@given(st.floats(1e-12, 1e12))
def test_worths_are_rounded_up_a_little(worth: float) -> None:
    rounded = round_up(worth)
    assert worth <= rounded < 1.5 * worth and round_up(rounded) == rounded


def test_worth_is_the_time_that_a_page_saves() -> None:
    assert GreedyDual().worth(likelihood=2.0, cost_s=3.0, num_pages=4) == 1.5


def test_what_nobody_uses_grows_old() -> None:
    """A thing that was used much and is used no more goes once what is used little has gone over for long enough."""
    order = EvictionOrder(GreedyDual())
    order.add("old", 1, order.worth(100.0, 1.0, 1))
    gone = 0
    for page in range(200):
        order.add(page, 1, order.worth(1.0, 1.0, 1))
        first = next(iter(order))
        order.evict(name_of(first))
        gone = page
        if first == IdleAdapter("old", 1):
            break
    assert 90 < gone < 140


class Chains:
    """Random sequences that share prefixes, as the ledger holds them, in a cache of their own."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.clock = RequestClock()
        self.order = EvictionOrder(GreedyDual())
        self.cache = PrefixCache(self.order, Likelihood(self.clock))
        self.running: list[list[int]] = []
        self.free = list(range(400))
        self.ends: Counter[str] = Counter()

    def begin(self) -> None:
        random = self.random
        path = [random.randrange(3) for _ in range(random.randint(1, 6))]
        keys = [bytes(path[: place + 1]) for place in range(len(path))]
        pages = self.cache.match(keys)
        self.cache.pin(pages, again=random.random() < 0.8)
        self.clock.now += 1
        for key in keys[len(pages) :]:
            pages += self.cache.insert([key], [self.free.pop()], pages[-1] if pages else None)
        self.running.append(pages)
        self.ends["begun"] += 1

    def collide(self) -> None:
        """Two sequences compute the same block at once: the second reads the first one's."""
        if self.running:
            pages = self.random.choice(self.running)
            key = self.cache._blocks[pages[0]].key
            assert self.cache.insert([key], [999], None) == pages[:1]
            self.running.append([pages[0]])
            self.ends["collided"] += 1

    def end(self) -> None:
        if self.running:
            pages = self.running.pop(self.random.randrange(len(self.running)))
            self.cache.unpin(pages, self.random.choice((1e-3, 2e-3)))
            self.ends["ended"] += 1

    def evict(self) -> None:
        for victim in list(islice(self.order, self.random.randint(1, 5))):
            page = name_of(victim)
            assert isinstance(page, int)
            self.order.evict(page)
            self.cache.remove(page)
            self.free.append(page)
            self.ends["evicted"] += 1

    def forget(self) -> None:
        if self.running:
            for page in self.cache.idle_from(self.running[0]):
                self.cache.remove(page)
                self.free.append(page)


@given(st.integers(0, 1 << 30))
@settings(max_examples=30)
def test_no_block_goes_before_one_behind_it(seed: int) -> None:
    chains = Chains(seed)
    for _ in range(150):
        act = chains.random.choice(
            (chains.begin, chains.begin, chains.collide, chains.end, chains.end, chains.evict, chains.forget)
        )
        act()
        chains.order.check()
        chains.cache.check()
    while chains.running:
        chains.end()
    while len(chains.order):
        chains.evict()
        chains.cache.check()
    assert len(chains.cache) == 0 and len(chains.free) == 400


def test_likelihood_learns_what_repetition_tells() -> None:
    """Of prompts that are never repeated each is worth next to nothing; what was used often is worth its rate."""
    clock = RequestClock()
    likelihood = Likelihood(clock)
    often = likelihood.first()
    for number in range(3000):
        clock.now += 1
        likelihood.first()
        if number % 50 == 0:
            likelihood.again(often)
    once = likelihood.first()
    assert likelihood.of(once) < 0.03
    # One use in 50 requests, discounted, is this in the long run.
    assert 0.5 < likelihood.of(often) / (HORIZON / 0.693 / 50) < 1.0


def test_likelihood_of_conversations_does_not_grow_with_their_length() -> None:
    clock, random = RequestClock(), Random(0)
    likelihood = Likelihood(clock)
    for _ in range(4000):
        uses = likelihood.first()
        while random.random() < 0.8:
            clock.now += 10
            likelihood.again(uses)
    young, old = likelihood.first(), likelihood.first()
    for _ in range(10):
        likelihood.again(old)
    assert 2.0 < likelihood.of(young) < 4.0, "four turns to come, the later ones discounted"
    assert likelihood.of(old) < 2 * likelihood.of(young)


def step_ended(costs: Costs, chunks: list[int], began_s: float, ended_s: float) -> None:
    costs.step_ended(len(chunks), sum(chunks), began_s, ended_s)


def test_costs_are_those_of_the_steps() -> None:
    costs, now = Costs(), 100.0
    for number in range(400):
        tokens = [1] * 8 if number % 3 else [1] * 7 + [257]
        took = 0.010 + (0.0512 if number % 3 == 0 else 0.0)
        # Submitted while the step before ran.
        step_ended(costs, tokens, now - 0.005, now + took)
        now += took
    assert costs.step_s == pytest.approx(0.010, rel=0.02)
    assert costs.prefill_s_per_token == pytest.approx(0.0002, rel=0.02)


def test_transfers_that_run_side_by_side_are_not_counted_twice() -> None:
    traffic = Traffic(1.0)
    for start in range(0, 4000, 10):
        for each in range(4):
            traffic.began(f"a{each}", start)
        assert "a0" in traffic and len(list(traffic)) == 4
        traffic.given_up("a0", start + 1)
        for each in range(1, 4):
            traffic.arrived(f"a{each}", 1 << 20, start + 2 * each)
    assert traffic.s_per_byte == pytest.approx(6 / (3 << 20), rel=0.01)
    assert not list(traffic)


def test_the_engine_measures_its_steps_copies_and_reads() -> None:
    """The fake device's clock, on which a step takes about one."""
    runners: list[FakeRunner] = []
    core, runner = make_core(
        {f"a{index}": 4 for index in range(12)},
        delays=Random(0),
        clock=lambda: runners[0].device.timeline.now if runners else 0.0,
        run_ahead=True,
    )
    runners.append(runner)
    for number in range(60):
        core.add(make_request(f"r{number}", (1,) * 20, f"a{number % 12}", 4))
        run_all(core)
    costs = core._ledger.costs
    assert 0.2 < costs.step_s < 5.0
    assert 0.1 < costs.copy_s_per_byte * 4 * PAGE_BYTES < 5.0
    assert 0.1 < costs.read_s_per_byte * 4 * PAGE_BYTES < 10.0
    assert 0.0 < costs.prefill_s_per_token < 0.1 and costs.prefill_s_per_token != Costs().prefill_s_per_token
    assert not list(costs.copies) and not list(costs.reads)


# Both tenants of the pool, on the fake device: a page is a block of four tokens, or a page of an adapter.


@dataclass
class Economy:
    """A core whose pool holds not nearly all that is asked for; requests come one after the other."""

    core: EngineCore
    random: Random
    count: int = 0

    def ask(self, prompt: tuple[int, ...], digest: str | None) -> None:
        self.count += 1
        request_id = f"r{self.count}"
        self.core.add(make_request(request_id, prompt, digest, 2))
        deltas = run_all(self.core)
        assert tokens_of(deltas[request_id]) == expected_tokens(prompt, digest, 2)

    def own(self, length: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(1, 40) for _ in range(length))


def make_economy(prefill_s_per_token: float, copy_s_per_page: float) -> Economy:
    """The costs are as measured on a device that takes so long."""
    core, _ = make_core({f"a{index}": 4 for index in range(12)}, num_pages=40, lookahead=1)
    costs = core._ledger.costs
    costs.step_s = 0.0
    for number in range(300):
        step_ended(costs, [101], number * 10.0, number * 10.0 + 100 * prefill_s_per_token)
        costs.copies.began("a", number * 10.0)
        costs.copies.arrived("a", PAGE_BYTES, number * 10.0 + copy_s_per_page)
    # From here on nothing is measured anew: the fake device takes no time.
    costs.step_ended = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    core._ledger.costs.copies._rate.measured = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    return Economy(core=core, random=Random(0))


def rounds(economy: Economy, num_rounds: int) -> Iterator[tuple[int, int]]:
    """Six adapters in turn with prompts of their own, and between them the base with one of four long prefixes in turn:
    24 pages and 32 pages. Yields how many pages of the pool each kind has."""
    prefixes = [tuple((place * 7 + index) % 40 + 1 for place in range(8 * BLOCK_TOKENS)) for index in range(4)]
    for number in range(num_rounds):
        economy.ask(economy.own(3), f"a{number % 6}")
        economy.ask((*prefixes[number % 4], *economy.own(2)), None)
        pool = economy.core.status().pool
        yield pool.adapters, pool.prefix


def test_memory_goes_to_whom_it_saves_more_and_comes_back() -> None:
    economy = make_economy(prefill_s_per_token=1e-5, copy_s_per_page=1e-2)
    for adapters, prefix in islice(rounds(economy, 60), 30, 60):
        assert adapters == 24 and prefix <= 16, "copies are dear: all adapters stay"
    core = economy.core
    # Now it is the prefill that is dear.
    costs = core._ledger.costs
    costs._prefill._seconds, costs._prefill._units = 0.1, 1.0
    costs.copies._rate._seconds, costs.copies._rate._units = 1e-6, float(PAGE_BYTES)
    before = core.status().counters.cached_prompt_tokens
    for adapters, prefix in islice(rounds(economy, 120), 90, 120):
        assert prefix >= 32 and adapters <= 8, "prefill is dear: all prefixes stay"
    assert core.status().counters.cached_prompt_tokens - before > 60 * 8 * BLOCK_TOKENS
    core.check()


def test_a_full_hit_still_computes_the_last_token() -> None:
    economy = make_economy(1e-3, 1e-3)
    prompt = economy.own(4 * BLOCK_TOKENS)
    for digest in (None, "a0"):
        economy.ask(prompt, digest)
        before = economy.core.status().counters
        economy.ask(prompt, digest)
        after = economy.core.status().counters
        assert after.cached_prompt_tokens - before.cached_prompt_tokens == 3 * BLOCK_TOKENS
        assert after.prompt_tokens - before.prompt_tokens == BLOCK_TOKENS


def test_sequences_that_compute_the_same_blocks_end_up_with_one_copy() -> None:
    core, _ = make_core({}, num_pages=40, max_step_tokens=64)
    prompt = tuple(range(1, 1 + 5 * BLOCK_TOKENS))
    for number in range(2):
        core.add(make_request(f"r{number}", (*prompt, number + 1), None, 8))
    begun = [delta.token_ids for delta in core.step()]
    core.check()
    first, second = core._running
    assert first.block_table[:5] == second.block_table[:5]
    deltas = run_all(core)
    for number in range(2):
        tokens = [*begun[number], *tokens_of(deltas[f"r{number}"])]
        assert tokens == expected_tokens((*prompt, number + 1), None, 8)
