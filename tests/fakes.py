"""A device, tiers and a model of plain Python: they notice every page that is not what its reader takes it for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from lorasrv.engine.batch import ChunkInput
from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.types import Tier

VOCAB = 50
EOS = 0


def next_token(state: int) -> int:
    """The fake model's only layer."""
    return state % VOCAB


def fold(state: int, adapter: str | None, token_id: int) -> int:
    return crc32(f"{adapter}/{token_id}".encode(), state)


def expected_tokens(prompt: tuple[int, ...], adapter: str | None, max_tokens: int) -> list[int]:
    """What the fake model generates for a request served alone: the brute-force reference."""
    state = 0
    for token_id in prompt:
        state = fold(state, adapter, token_id)
    tokens: list[int] = []
    while len(tokens) < max_tokens and EOS not in tokens:
        tokens.append(next_token(state))
        state = fold(state, adapter, tokens[-1])
    return tokens


@dataclass
class FakeDevice:
    """Pages as dictionaries: adapter pages hold (digest, local page), KV pages hold a chain of states by slot."""

    block_tokens: int
    adapters: dict[int, tuple[str, int]] = field(default_factory=dict[int, tuple[str, int]])
    blocks: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict[tuple[int, int], tuple[int, int]])

    def write_adapter(self, digest: str, pages: list[int]) -> None:
        for local, page in enumerate(pages):
            self.adapters[page] = (digest, local)
            for slot in range(self.block_tokens):
                self.blocks.pop((page, slot), None)

    def write_kv(self, page: int, slot: int, previous: int, state: int) -> None:
        self.adapters.pop(page, None)
        self.blocks[page, slot] = (previous, state)

    def read_adapter(self, digest: str, pages: tuple[int, ...]) -> None:
        for local, page in enumerate(pages):
            assert self.adapters.get(page) == (digest, local), f"page {page} of {digest} was overwritten"


class FakeTiers:
    """Host tier whose reads end after a random number of polls; some fail."""

    def __init__(self, device: FakeDevice, sizes: Mapping[str, int], random: Random, failing: float = 0.0) -> None:
        self.device = device
        self.sizes = sizes
        self.random = random
        self.failing = failing
        self.loaded: dict[int, ResidentAdapter] = {}
        self._reading: dict[str, int] = {}
        self._host: set[str] = set()
        self._wanted: set[str] = set()

    def want(self, digests: Sequence[str]) -> None:
        self._wanted = set(digests)
        for digest in digests:
            if digest not in self._host:
                self._reading.setdefault(digest, self.random.randrange(4))

    def num_pages(self, digest: str) -> int | None:
        return self.sizes[digest] if digest in self._host else None

    def poll(self) -> Mapping[str, AdapterLoadFailed]:
        failures: dict[str, AdapterLoadFailed] = {}
        for digest in list(self._reading):
            self._reading[digest] -= 1
            if self._reading[digest] < 0:
                del self._reading[digest]
                if self.random.random() >= self.failing:
                    self._host.add(digest)
                elif digest in self._wanted:
                    failures[digest] = AdapterLoadFailed(f"adapter {digest} could not be read")
        for digest in sorted(self._host - self._wanted):
            if self.random.random() < 0.02:
                self._host.remove(digest)
        return failures

    def load(self, digest: str, pages: list[int]) -> ResidentAdapter:
        assert digest in self._host and len(pages) == self.sizes[digest]
        self.device.write_adapter(digest, pages)
        adapter = ResidentAdapter(digest=digest, pages=tuple(pages), directory=pages[0], max_rank=1)
        self.loaded[pages[0]] = adapter
        return adapter

    def host_tiers(self) -> dict[str, Tier]:
        return dict.fromkeys(self._host, Tier.HOST) | dict.fromkeys(self._reading, Tier.READING)

    def wait(self, timeout_s: float) -> None:
        """A read ends with a later poll."""

    def check(self) -> None:
        assert not self._host & self._reading.keys()

    def close(self) -> None:
        self._reading.clear()


class FakeRunner:
    """Reads and writes the fake device as a model would: a wrong page shows as a broken chain."""

    def __init__(self, device: FakeDevice, tiers: FakeTiers) -> None:
        self.device = device
        self.tiers = tiers
        self.num_forwards = 0

    def run(self, chunks: tuple[ChunkInput, ...]) -> tuple[int | None, ...]:
        self.num_forwards += 1
        states = [(chunk, self._run_chunk(chunk)) for chunk in chunks]
        return tuple(next_token(state) for chunk, state in states if chunk.sample is not None)

    def _run_chunk(self, chunk: ChunkInput) -> int:
        digest = None
        if chunk.adapter is not None:
            adapter = self.tiers.loaded[chunk.adapter.directory]
            self.device.read_adapter(adapter.digest, adapter.pages)
            digest = adapter.digest
        state = 0
        for position in range(chunk.start):
            previous, after = self.device.blocks[self._slot(chunk, position)]
            assert previous == state, f"position {position} of a chunk was overwritten"
            state = after
        for position, token_id in enumerate(chunk.token_ids, chunk.start):
            after = fold(state, digest, token_id)
            self.device.write_kv(*self._slot(chunk, position), state, after)
            state = after
        return state

    def _slot(self, chunk: ChunkInput, position: int) -> tuple[int, int]:
        page, slot = divmod(position, self.device.block_tokens)
        return chunk.block_table[page], slot
