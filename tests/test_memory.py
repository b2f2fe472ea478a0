"""Accounting of the pool: pages, residency, eviction."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasrv.memory.eviction import Candidate, EvictionOrder, GreedyDual, IdleAdapter, IdleBlock, Name
from lorasrv.memory.likelihood import Likelihood, RequestClock
from lorasrv.memory.pages import Owner, OwnerKind, PagePool
from lorasrv.memory.prefix import BlockKeys, PrefixCache
from lorasrv.memory.residency import Residency, ResidentAdapter
from lorasrv.memory.victims import Victims, name_of

SEQUENCE = Owner(OwnerKind.SEQUENCE, "s")
ADAPTER = Owner(OwnerKind.ADAPTER, "a")


def test_a_page_names_the_last_step_that_may_touch_it() -> None:
    pool = PagePool(4)
    pages = pool.alloc(4, SEQUENCE)
    assert pool.last_reader(pages) == 0
    pool.retire(pages[:2], SEQUENCE, 7)
    pool.retire(pages[2:], SEQUENCE, 8)
    again = pool.alloc(2, ADAPTER)
    assert set(again) == set(pages[2:]) and pool.last_reader(again) == 8
    assert pool.last_reader(pool.alloc(2, ADAPTER)) == 7
    assert pool.last_reader([]) == 0
    pool.check()


def test_pages_are_taken_back_from_their_owner_only() -> None:
    pool = PagePool(2)
    pages = pool.alloc(1, SEQUENCE)
    with pytest.raises(AssertionError, match="belongs to"):
        pool.retire(pages, ADAPTER, 0)
    with pytest.raises(AssertionError, match="free"):
        pool.alloc(2, ADAPTER)
    pool.check()


def test_pool_against_sets() -> None:
    random, pool = Random(0), PagePool(30)
    held: dict[int, list[int]] = {}
    last_readers: dict[int, int] = {}
    for step in range(2000):
        if random.random() < 0.6 and (count := random.randint(0, pool.num_free)):
            held[step] = pool.alloc(count, Owner(OwnerKind.SEQUENCE, str(step)))
            assert pool.last_reader(held[step]) == max(last_readers.get(page, 0) for page in held[step])
        elif held:
            key = random.choice(list(held))
            last_readers |= dict.fromkeys(held[key], step)
            pool.retire(held.pop(key), Owner(OwnerKind.SEQUENCE, str(key)), step)
        pool.check()
        used = [page for pages in held.values() for page in pages]
        assert len(used) == len(set(used)) == pool.stats().sequences
    assert held and last_readers


def make_residency() -> tuple[Residency, EvictionOrder]:
    order = EvictionOrder(GreedyDual())
    return Residency(order, Likelihood(RequestClock())), order


def add_loaded(residency: Residency, digest: str, pages: tuple[int, ...]) -> None:
    residency.add(ResidentAdapter(digest=digest, pages=pages, directory=pages[0], max_rank=8))
    residency.loaded(digest, 1.0)


def test_only_loaded_adapters_that_nobody_uses_may_go() -> None:
    residency, order = make_residency()
    for number in range(3):
        add_loaded(residency, f"a{number}", (number,))
    residency.pin("a0")
    residency.pin("a0")
    residency.unpin("a0", 1.0)
    assert list(order) == [IdleAdapter("a1", 1), IdleAdapter("a2", 1)]
    residency.unpin("a0", 1.0)
    assert list(order) == [IdleAdapter("a1", 1), IdleAdapter("a2", 1), IdleAdapter("a0", 1)]
    assert residency.remove("a1").pages == (1,)
    residency.pin("a2")
    with pytest.raises(AssertionError, match="in use"):
        residency.remove("a2")
    with pytest.raises(AssertionError, match="not pinned"):
        residency.unpin("a0", 1.0)
    residency.check()
    residency.add(ResidentAdapter(digest="a9", pages=(9,), directory=9, max_rank=8))
    assert not residency.is_loaded("a9") and residency.is_loaded("a0")
    residency.pin("a9")
    residency.unpin("a9", 1.0)
    residency.check()
    assert "a9" not in order, "what is being written may not go"
    with pytest.raises(AssertionError, match="being loaded"):
        residency.remove("a9")
    residency.loaded("a9", 1.0)
    assert "a9" in order
    residency.check()


def test_what_is_used_most_stays_longest() -> None:
    residency, order = make_residency()
    for page, (digest, times) in enumerate((("often", 5), ("never", 0), ("once", 1), ("twice", 2))):
        add_loaded(residency, digest, (page,))
        for _ in range(times):
            residency.pin(digest)
            residency.unpin(digest, 1.0)
    assert [name_of(each) for each in order] == ["never", "once", "twice", "often"]
    for _ in range(3):
        residency.pin("once", again=False)
        residency.unpin("once", 1.0)
    assert [name_of(each) for each in order] == ["never", "once", "twice", "often"]
    residency.check()


def test_cached_blocks_go_from_the_end_of_a_sequence() -> None:
    order = EvictionOrder(GreedyDual())
    cache = PrefixCache(order, Likelihood(RequestClock()))
    keys = BlockKeys(weights="base", salt="", block_tokens=2).first(3, [1, 2, 3, 4, 5, 6])
    for page, key in enumerate(keys):
        assert cache.insert([key], [page], page - 1 if page else None) == [page]
    assert cache.insert(keys[:1], [9], None) == [0], "its content is cached already"
    cache.unpin([0, 1, 2], 1.0)
    cache.check()
    assert list(order) == [IdleBlock(2), IdleBlock(1)]
    cache.remove(2)
    assert cache.match(keys) == [0, 1]
    cache.unpin([0], 1.0)
    assert list(order) == [IdleBlock(1), IdleBlock(0)]
    cache.remove(1)
    cache.remove(0)
    assert cache.match(keys) == [] and not len(order)
    cache.check()


def test_what_is_cached_behind_forgotten_blocks_is_forgotten_too() -> None:
    order = EvictionOrder(GreedyDual())
    cache = PrefixCache(order, Likelihood(RequestClock()))
    parents = {0: None, 1: 0, 2: 1, 3: 1, 4: None, 5: 0}
    for page, parent in parents.items():
        cache.insert([bytes([page])], [page], parent)
    for chain in ([0, 1, 2], [4], [3], [5]):
        cache.unpin(chain, 1.0)
    assert cache.idle_from([1]) == [3, 2, 1]
    assert cache.idle_from([]) == []
    cache.pin([0, 5])
    assert cache.idle_from([0, 1]) == [3, 2, 1]


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "ab"]), st.sampled_from(["", "b", "base"]), st.lists(st.integers(0, 3)))
    ),
)
def test_keys_are_equal_when_all_that_made_the_block_is(cases: list[tuple[str, str, list[int]]]) -> None:
    made: dict[bytes, tuple[str, str, tuple[int, ...]]] = {}
    for salt, weights, tokens in cases:
        keys = BlockKeys(weights=weights, salt=salt, block_tokens=2)
        for count, key in enumerate(keys.first(len(tokens) // 2, tokens), start=1):
            content = (salt, weights, tuple(tokens[: 2 * count]))
            assert made.setdefault(key, content) == content
            assert BlockKeys(weights=weights, salt=salt, block_tokens=2).first(count, tokens)[-1] == key


@pytest.mark.parametrize(("num_pages", "expected"), [(0, []), (1, ["a"]), (3, ["a", 7]), (7, ["a", 7, "c"]), (8, None)])
def test_victims_go_in_order_and_are_no_more_than_needed(num_pages: int, expected: list[str | int] | None) -> None:
    candidates = [IdleAdapter("a", 2), IdleBlock(7), IdleAdapter("c", 4)]
    victims = Victims(candidates, lambda _: False).choose(num_pages, set())
    assert (None if victims is None else [name_of(victim) for victim in victims]) == expected


def test_victims_that_are_kept_or_waited_for_are_passed_over() -> None:
    candidates: list[Candidate] = [IdleAdapter("a", 2), IdleBlock(7), IdleAdapter("c", 4), IdleBlock(8), IdleBlock(9)]
    victims = Victims(candidates, lambda digest: digest == "a")

    def choose(num_pages: int, kept: set[Name]) -> list[Name] | None:
        chosen = victims.choose(num_pages, kept)
        return None if chosen is None else [name_of(victim) for victim in chosen]

    assert choose(1, {7}) == ["c"]  # a is waited for, 7 kept
    assert choose(5, {7}) is None
    chosen = victims.choose(1, {7})
    assert chosen == [IdleBlock(8)]
    victims.put_back(chosen)
    assert choose(2, {7}) == [8, 9]
    assert choose(1, {7, "a"}) is None
    assert Victims(candidates, lambda _: True).choose(9, set()) == [candidates[i] for i in (1, 3, 4, 0, 2)]
