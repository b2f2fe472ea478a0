"""The prefix cache: full KV blocks in the pool, found again by everything that produced them. Integers and keys only.

A block's key is a digest over its tokens, the keys of all blocks before it, the weights that computed it (the base or
an adapter version, with its scale) and a salt of its tenant: never a name. So a hit is a hit of the same weights, of
the same tenant, behind the same tokens. (Keys chained by block: vLLM, SOSP 2023.)
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

_KEY_BYTES = 32


class BlockKeys:
    """The keys of one sequence's full blocks, computed as far as they are asked for. Owned by the engine's thread."""

    def __init__(self, *, weights: str, salt: str, block_tokens: int) -> None:
        """`weights` names what computes the KV; `salt` keeps tenants apart."""
        root = f"{len(salt)}:{salt}{weights}".encode()
        self._chain = [blake2b(root, digest_size=_KEY_BYTES).digest()]
        self._block_tokens = block_tokens

    def first(self, count: int, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the first `count` blocks of `token_ids`, which may only ever have grown since the last call."""
        while len(self._chain) <= count:
            end = len(self._chain) * self._block_tokens
            tokens = array("q", token_ids[end - self._block_tokens : end]).tobytes()
            self._chain.append(blake2b(self._chain[-1] + tokens, digest_size=_KEY_BYTES).digest())
        return self._chain[1 : count + 1]


class PrefixCache:
    """Cached blocks by key; idle ones, that no running sequence pins, in least-recently-used order.

    Owned by the engine's thread. `now` is any number that never falls.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._pins: dict[int, int] = {}
        self._idle: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: object) -> bool:
        return page in self._keys

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest cached prefix."""
        pages: list[int] = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: bytes, page: int) -> bool:
        """Cache a block that a running sequence has filled, and pin it for it. False if its content is cached already:
        then the page stays the sequence's own."""
        if key in self._pages:
            return False
        self._pages[key] = page
        self._keys[page] = key
        self._pins[page] = 1
        return True

    def pin(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._pins[page] += 1
            self._idle.pop(page, None)

    def unpin(self, pages: Sequence[int], now: int) -> None:
        """Give back a sequence's cached blocks, in the sequence's order: its last block will be the first to go, since
        a block is of no use without those before it."""
        for page in reversed(pages):
            assert self._pins[page] > 0, f"page {page} is not pinned"
            self._pins[page] -= 1
            if not self._pins[page]:
                self._idle[page] = now

    def remove(self, page: int) -> None:
        """Forget an idle block; its page is the caller's to retire."""
        del self._idle[page], self._pins[page]
        del self._pages[self._keys.pop(page)]

    def pins(self, page: int) -> int:
        return self._pins[page]

    def idle(self) -> Iterator[tuple[int, int]]:
        """(page, when it became idle), least recently used first."""
        return iter(self._idle.items())

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert {page: key for key, page in self._pages.items()} == self._keys, "keys and pages differ"
        assert self._pins.keys() == self._keys.keys(), "pins and pages differ"
        assert set(self._idle) == {page for page, pins in self._pins.items() if not pins}, "idle set is stale"
        stamps = list(self._idle.values())
        assert stamps == sorted(stamps), "idle blocks are out of order"
