"""The prefix cache: full KV blocks in the pool, found again by everything that produced them. Integers and keys only.

A block's key is a digest over its tokens, the keys of all blocks before it, the weights that computed it (the base or
an adapter version, with its scale) and a salt of its tenant: never a name. So a hit is a hit of the same weights, of
the same tenant, behind the same tokens. (Keys chained by block: vLLM, SOSP 2023.)
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from struct import pack

from lorasrv.memory.eviction import EvictionOrder, IdleBlock
from lorasrv.memory.likelihood import Likelihood, Uses


class BlockKeys:
    """The keys of one sequence's full blocks, computed as far as they are asked for. Owned by the engine's thread."""

    def __init__(self, *, weights: str, salt: str, block_tokens: int) -> None:
        """`weights` names what computes the KV; `salt` keeps tenants apart."""
        root = f"{len(salt)}:{salt}{weights}".encode()
        self._chain = [sha256(root).digest()]
        self._block_tokens = block_tokens
        self._packed = f"{block_tokens}q"

    def first(self, count: int, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the first `count` blocks of `token_ids`, which may only ever have grown since the last call."""
        return self.between(0, count, token_ids)

    def between(self, start: int, end: int, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the blocks `[start, end)`."""
        chain, block_tokens = self._chain, self._block_tokens
        for first in range((len(chain) - 1) * block_tokens, end * block_tokens, block_tokens):
            tokens = pack(self._packed, *token_ids[first : first + block_tokens])
            chain.append(sha256(chain[-1] + tokens).digest())
        return chain[start + 1 : end + 1]


@dataclass(slots=True)
class _Block(Uses):
    """A cached block and its uses; `parent` is the page of the one before it. `priority` is at least that of each idle
    block behind it, and its own when it is idle."""

    key: bytes
    parent: int | None
    pins: int = 1
    priority: float = 0.0


class PrefixCache:
    """Cached blocks by key. Those that no running sequence pins are in the eviction order, none before one behind it.

    Who pins a block pins all blocks before it. Owned by the engine's thread.
    """

    def __init__(self, order: EvictionOrder, likelihood: Likelihood) -> None:
        self._order = order
        self._likelihood = likelihood
        self._pages: dict[bytes, int] = {}
        self._blocks: dict[int, _Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, page: object) -> bool:
        return page in self._blocks

    def split(self, pages: Iterable[int]) -> tuple[list[int], list[int]]:
        """Those of the pages that hold cached blocks, and the others."""
        cached: list[int] = []
        others: list[int] = []
        for page in pages:
            (cached if page in self._blocks else others).append(page)
        return cached, others

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest cached prefix."""
        pages: list[int] = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, keys: Iterable[bytes], pages: Iterable[int], parent: int | None) -> list[int]:
        """Cache blocks in a row that a running sequence has filled, behind the cached block `parent`, and pin them for
        it. Where a content is cached already that block is pinned. Returns the pages that the sequence is to read."""
        found: list[int] = []
        for key, page in zip(keys, pages, strict=True):
            cached = self._pages.setdefault(key, page)
            if cached == page:
                self._blocks[page] = _Block(0.0, self._likelihood.firsts(1), key, parent)
            else:
                self.pin((cached,))
            found.append(cached)
            parent = cached
        return found

    def pin(self, pages: Sequence[int], *, again: bool = True) -> None:
        """For a running sequence; `again` says that this tells of further uses."""
        for page in pages:
            block = self._blocks[page]
            if not block.pins:
                self._order.discard(page)
            block.pins += 1
            if again:
                self._likelihood.again(block)

    def unpin(self, pages: Sequence[int], cost_s: float) -> None:
        """Give back all the cached blocks of a sequence, first to last. `cost_s` is what computing one costs."""
        order = self._order
        again, own = -1.0, 0.0
        worth, priority = 0.0, order.priority(0.0)
        idle: list[int] = []
        for page in reversed(pages):
            block = self._blocks[page]
            assert block.pins > 0, f"page {page} is not pinned"
            block.pins -= 1
            if block.again != again:
                again, own = block.again, order.worth(self._likelihood.of(block), cost_s, 1)
            if own > worth or priority < block.priority:
                order.add_blocks(idle, worth)
                idle = []
                worth = max(worth, own, order.worth_of(block.priority))
                priority = order.priority(worth)
            block.priority = priority
            if not block.pins:
                idle.append(page)
        order.add_blocks(idle, worth)

    def remove(self, *pages: int) -> None:
        """Forget idle blocks, last ones first, behind which there are none; their pages are the caller's to retire."""
        for page in pages:
            block = self._blocks.pop(page)
            assert not block.pins, f"page {page} is in use"
            self._order.discard(page)
            del self._pages[block.key]

    def idle_from(self, pages: Iterable[int]) -> list[int]:
        """Those of the blocks that are idle and all that is cached behind them, last ones first. Looks at all."""
        found = {page for page in pages if not self._blocks[page].pins}
        if not found:
            return []
        for page, block in self._blocks.items():  # each stands behind its parent
            if block.parent in found:
                found.add(page)
        return [page for page in reversed(self._blocks) if page in found]

    def pins(self, page: int) -> int:
        return self._blocks[page].pins

    @property
    def num_idle(self) -> int:
        return sum(not block.pins for block in self._blocks.values())

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert {page: key for key, page in self._pages.items()} == {p: b.key for p, b in self._blocks.items()}
        ways: Counter[int] = Counter()
        for page, block in self._blocks.items():
            assert (page in self._order) == (not block.pins), f"page {page} is idle or not, and in the order or not"
            if block.parent is not None:
                parent = self._blocks[block.parent]
                ways[block.parent] += block.pins
                assert block.pins or parent.priority >= block.priority, f"page {block.parent} goes before {page}"
        assert all(block.pins >= ways[page] for page, block in self._blocks.items()), "a block is pinned alone"
        place = {each.page: index for index, each in enumerate(self._order) if isinstance(each, IdleBlock)}
        for page, index in place.items():
            parent = self._blocks[page].parent
            assert parent is None or place.get(parent, index) >= index, f"page {parent} goes before {page}"
