"""A device, tiers and a model of plain Python: they notice every page that is not what its reader takes it for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from zlib import crc32

from lorasrv.engine.batch import ChunkInput, StepOutput
from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.types import PositionLogprobs, Tier

VOCAB = 50
EOS = 0


def next_token(state: int, masked: Collection[int] = ()) -> int:
    """The fake model's only layer."""
    return next(token for token in (*range(state % VOCAB, VOCAB), *range(VOCAB)) if token not in masked)


def fold(state: int, adapter: str | None, token_id: int) -> int:
    return crc32(f"{adapter}/{token_id}".encode(), state)


def expected_tokens(
    prompt: tuple[int, ...],
    adapter: str | None,
    max_tokens: int,
    *,
    ends: Collection[int] = (EOS,),
    min_tokens: int = 0,
) -> list[int]:
    """What the fake model generates for a request served alone: the brute-force reference."""
    state = 0
    for token_id in prompt:
        state = fold(state, adapter, token_id)
    tokens: list[int] = []
    while len(tokens) < max_tokens and not set(tokens) & set(ends):
        tokens.append(next_token(state, ends if len(tokens) < min_tokens else ()))
        state = fold(state, adapter, tokens[-1])
    return tokens


def expected_scores(prompt: tuple[int, ...], adapter: str | None) -> list[tuple[int, float]]:
    """The fake model's log-probability of a token is what went before it, negated."""
    state, scores = 0, []
    for before, token_id in pairwise(prompt):
        state = fold(state, adapter, before)
        scores.append((token_id, -float(state)))
    return scores


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
        self._discarded: set[str] = set()

    def want(self, digests: Sequence[str]) -> None:
        self._discarded -= set(digests) - self._wanted
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
            if digest in self._discarded or self.random.random() < 0.02:
                self._host.remove(digest)
        self._discarded &= self._host | self._reading.keys()
        return failures

    def load(self, digest: str, pages: list[int]) -> ResidentAdapter:
        assert digest in self._host and len(pages) == self.sizes[digest]
        self.device.write_adapter(digest, pages)
        adapter = ResidentAdapter(digest=digest, pages=tuple(pages), directory=pages[0], max_rank=1)
        self.loaded[pages[0]] = adapter
        return adapter

    def discard(self, digest: str) -> None:
        self._discarded.add(digest)

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

    def run(self, chunks: tuple[ChunkInput, ...]) -> StepOutput:
        self.num_forwards += 1
        states = [(chunk, self._run_chunk(chunk)) for chunk in chunks]
        return StepOutput(
            tokens=tuple(
                next_token(rows[-1], chunk.sample.edits.masked if chunk.sample.edits else ())
                for chunk, rows in states
                if chunk.sample is not None
            ),
            prompt_logprobs={
                index: tuple(
                    PositionLogprobs(token_id=token_id, logprob=-float(rows[position - 1 - chunk.start]))
                    for position, token_id in enumerate(chunk.score.token_ids, chunk.score.start)
                )
                for index, (chunk, rows) in enumerate(states)
                if chunk.score is not None
            },
        )

    def _run_chunk(self, chunk: ChunkInput) -> list[int]:
        """The state behind every row."""
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
        rows: list[int] = []
        for position, token_id in enumerate(chunk.token_ids, chunk.start):
            after = fold(state, digest, token_id)
            self.device.write_kv(*self._slot(chunk, position), state, after)
            state = after
            rows.append(state)
        return rows

    def _slot(self, chunk: ChunkInput, position: int) -> tuple[int, int]:
        page, slot = divmod(position, self.device.block_tokens)
        return chunk.block_table[page], slot
