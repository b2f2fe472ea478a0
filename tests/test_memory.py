"""Accounting of the pool: pages, residency, eviction."""

from random import Random

import pytest

from lorasrv.memory.eviction import Candidate, choose_victims
from lorasrv.memory.pages import Owner, OwnerKind, PagePool
from lorasrv.memory.residency import Residency, ResidentAdapter

SEQUENCE = Owner(OwnerKind.SEQUENCE, "s")
ADAPTER = Owner(OwnerKind.ADAPTER, "a")


def test_a_retiring_page_is_not_handed_out_before_its_step_completed() -> None:
    pool = PagePool(4)
    pages = pool.alloc(4, SEQUENCE)
    pool.retire(pages[:2], SEQUENCE, 7)
    pool.retire(pages[2:], SEQUENCE, 8)
    pool.reclaim(6)
    assert pool.num_free == 0 and pool.stats().retiring == 4
    pool.reclaim(7)
    assert set(pool.alloc(2, ADAPTER)) == set(pages[:2])
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
    retiring: list[tuple[int, set[int]]] = []
    for step in range(2000):
        if random.random() < 0.6 and (count := random.randint(0, pool.num_free)):
            held[step] = pool.alloc(count, Owner(OwnerKind.SEQUENCE, str(step)))
        elif held:
            key = random.choice(list(held))
            retiring.append((step, set(held[key])))
            pool.retire(held.pop(key), Owner(OwnerKind.SEQUENCE, str(key)), step)
        completed = step - random.randint(0, 5)
        pool.reclaim(completed)
        retiring = [(last, pages) for last, pages in retiring if last > completed]
        pool.check()
        used = [page for pages in held.values() for page in pages]
        assert len(used) == len(set(used)) == pool.stats().sequences
    assert held and pool.num_retiring >= sum(len(pages) for last, pages in retiring if last > step)


def test_residency_orders_idle_adapters_by_last_use() -> None:
    residency = Residency()
    for number in range(3):
        residency.add(ResidentAdapter(digest=f"a{number}", pages=(number,), directory=number, max_rank=8))
    residency.pin("a0")
    residency.pin("a0")
    residency.unpin("a0")
    assert [adapter.digest for adapter in residency.idle()] == ["a1", "a2"]
    residency.unpin("a0")
    assert [adapter.digest for adapter in residency.idle()] == ["a1", "a2", "a0"]
    assert residency.remove("a1").pages == (1,)
    residency.pin("a2")
    with pytest.raises(AssertionError, match="in use"):
        residency.remove("a2")
    with pytest.raises(AssertionError, match="not pinned"):
        residency.unpin("a0")
    residency.check()


@pytest.mark.parametrize(
    ("num_pages", "expected"), [(0, []), (1, ["a"]), (3, ["a", "b"]), (7, ["a", "b", "c"]), (8, None)]
)
def test_victims_go_in_order_and_are_no_more_than_needed(num_pages: int, expected: list[str] | None) -> None:
    candidates = [Candidate("a", 2), Candidate("b", 1), Candidate("c", 4)]
    victims = choose_victims(candidates, num_pages)
    assert (None if victims is None else [victim.digest for victim in victims]) == expected
