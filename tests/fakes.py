"""A device, tiers and a model of plain Python: they notice every page that is not what its reader takes it for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from random import Random
from zlib import crc32

from lorasrv.engine.batch import ChunkInput, Draw, PageCopy, StepOutput
from lorasrv.engine.tiers import TierChanges
from lorasrv.errors import AdapterLoadFailed, LorasrvError
from lorasrv.memory.residency import ResidentAdapter
from lorasrv.types import PositionLogprobs, Tier

VOCAB = 50
EOS = 0
PAGE_BYTES = 1 << 20


def next_token(state: int, masked: Collection[int] = (), sample: int = 0) -> int:
    """The fake model's only layer; each sample draws with numbers of its own."""
    state += 17 * sample
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
    sample: int = 0,
) -> list[int]:
    """What the fake model generates for a request served alone: the brute-force reference."""
    state = 0
    for token_id in prompt:
        state = fold(state, adapter, token_id)
    tokens: list[int] = []
    while len(tokens) < max_tokens and not set(tokens) & set(ends):
        tokens.append(next_token(state, ends if len(tokens) < min_tokens else (), sample))
        state = fold(state, adapter, tokens[-1])
    return tokens


def expected_scores(prompt: tuple[int, ...], adapter: str | None) -> list[tuple[int, float]]:
    """The fake model's log-probability of a token is what went before it, negated."""
    state, scores = 0, []
    for before, token_id in pairwise(prompt):
        state = fold(state, adapter, before)
        scores.append((token_id, -float(state)))
    return scores


class Timeline:
    """Streams of work on one logical clock. Work of one stream runs in order; how long it takes is random, and nothing
    at all without a `random`."""

    def __init__(self, random: Random | None = None) -> None:
        self.now = 0.0
        self._random = random
        self._ends: dict[str, float] = {}
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def submit(self, stream: str, actions: Sequence[Callable[[], None]], *, after: float = 0.0) -> float:
        """The actions run in order at some time between the work's start and its end, which is returned."""
        start = max(self.now, self.end(stream), after)
        end = start + (self._random.expovariate(1.0) if self._random else 0.0)
        times = sorted(self._random.uniform(start, end) if self._random else end for _ in actions)
        for time, action in zip(times, actions, strict=True):
            heappush(self._actions, (time, self._serial, action))
            self._serial += 1
        self._ends[stream] = end
        return end

    def end(self, stream: str) -> float:
        """When all that is submitted to the stream has run."""
        return self._ends.get(stream, 0.0)

    def advance(self, time: float) -> None:
        self.now = max(self.now, time)
        while self._actions and self._actions[0][0] <= self.now:
            heappop(self._actions)[2]()

    def next_time(self) -> float:
        """When something happens next."""
        return self._actions[0][0]

    def pass_time(self) -> None:
        """What the host does takes time too."""
        self.advance(self.now + (self._random.expovariate(5.0) if self._random else 0.0))


@dataclass
class FakeDevice:
    """Pages as dictionaries: adapter pages hold (digest, local page), KV pages hold a chain of states by slot."""

    block_tokens: int
    timeline: Timeline = field(default_factory=Timeline)
    adapters: dict[int, tuple[str, int]] = field(default_factory=dict[int, tuple[str, int]])
    blocks: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict[tuple[int, int], tuple[int, int]])

    def write_adapter(self, digest: str, pages: Sequence[int]) -> None:
        for local, page in enumerate(pages):
            self.write_adapter_page(digest, local, page)

    def write_adapter_page(self, digest: str, local: int, page: int) -> None:
        self.adapters[page] = (digest, local)
        for slot in range(self.block_tokens):
            self.blocks.pop((page, slot), None)

    def write_kv(self, page: int, slot: int, previous: int, state: int) -> None:
        self.adapters.pop(page, None)
        self.blocks[page, slot] = (previous, state)

    def copy_page(self, copy: PageCopy) -> None:
        self.adapters.pop(copy.target, None)
        for slot in range(self.block_tokens):
            self.blocks.pop((copy.target, slot), None)
            if (copy.source, slot) in self.blocks:
                self.blocks[copy.target, slot] = self.blocks[copy.source, slot]

    def read_adapter(self, digest: str, pages: tuple[int, ...]) -> None:
        for local, page in enumerate(pages):
            assert self.adapters.get(page) == (digest, local), f"page {page} of {digest} was overwritten"


class FakeTiers:
    """Host tier whose reads end after a random number of polls; some fail. Copies run beside the device's steps, but
    for the first `pages_at_once` of those that begin between two polls."""

    def __init__(
        self,
        device: FakeDevice,
        sizes: Mapping[str, int],
        random: Random,
        failing: float = 0.0,
        pages_at_once: int = 0,
    ) -> None:
        self.device = device
        self.sizes = sizes
        self.random = random
        self.failing = failing
        self.pages_at_once = pages_at_once
        self._pages_left = pages_at_once
        self.waits_for_steps = True
        self.loaded: dict[int, ResidentAdapter] = {}
        self.discarded: list[str] = []
        self._copying: dict[str, float] = {}
        self._reading: dict[str, int] = {}
        self._host: set[str] = set()
        self.wanted: set[str] = set()
        self._discarded: set[str] = set()

    def want(self, digests: Sequence[str]) -> None:
        self._discarded -= set(digests) - self.wanted
        self.wanted = set(digests)
        for digest in digests:
            if digest not in self._host:
                self._reading.setdefault(digest, self.random.randrange(4))

    def num_pages(self, digest: str) -> int | None:
        return self.sizes[digest] if digest in self._host else None

    def poll(self) -> TierChanges:
        self.device.timeline.pass_time()
        failures: dict[str, AdapterLoadFailed] = {}
        read: list[str] = []
        for digest in list(self._reading):
            self._reading[digest] -= 1
            if self._reading[digest] < 0:
                del self._reading[digest]
                if self.random.random() >= self.failing:
                    self._host.add(digest)
                    read.append(digest)
                elif digest in self.wanted:
                    failures[digest] = AdapterLoadFailed(f"adapter {digest} could not be read")
        for digest in sorted(self._host - self.wanted):
            if digest in self._discarded or self.random.random() < 0.02:
                self._host.remove(digest)
        self._discarded &= self._host | self._reading.keys()
        self._pages_left = self.pages_at_once
        loaded = tuple(digest for digest, end in self._copying.items() if end <= self.device.timeline.now)
        for digest in loaded:
            del self._copying[digest]
        return TierChanges(failed=failures, read=tuple(read), loaded=loaded)

    def load(self, digest: str, pages: list[int], *, wait_for_steps: bool) -> ResidentAdapter:
        assert digest in self._host and len(pages) == self.sizes[digest]
        timeline, at_once = self.device.timeline, len(pages) <= self._pages_left
        self._pages_left = self._pages_left - len(pages) if at_once else 0
        writes = [
            lambda local=local, page=page: self.device.write_adapter_page(digest, local, page)
            for local, page in enumerate(pages)
        ]
        after = timeline.end("steps") if wait_for_steps and self.waits_for_steps else 0.0
        if at_once:
            self.device.write_adapter(digest, pages)
        else:
            self._copying[digest] = timeline.submit("copies", writes, after=after)
        adapter = ResidentAdapter(digest=digest, pages=tuple(pages), directory=pages[0], max_rank=1)
        self.loaded[pages[0]] = adapter
        return adapter

    def bytes_at_once(self) -> int:
        return self._pages_left * PAGE_BYTES

    def discard(self, digest: str) -> None:
        self.discarded.append(digest)
        self._discarded.add(digest)

    def host_tiers(self) -> dict[str, Tier]:
        return dict.fromkeys(self._host, Tier.HOST) | dict.fromkeys(self._reading, Tier.READING)

    def failures(self) -> Mapping[str, LorasrvError]:
        return {}

    def wait(self, timeout_s: float) -> None:
        """A read ends with a later poll, a copy with its time."""
        self.device.timeline.advance(min(self._copying.values(), default=0.0))

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
        self.not_finite = False
        self.last: FakeStep | None = None

    @property
    def runs_ahead(self) -> bool:
        return False

    def forward(self, chunks: tuple[ChunkInput, ...], copies: tuple[PageCopy, ...] = ()) -> "FakeStep":
        self.num_forwards += 1
        before, self.last = self.last, FakeStep(self.device, chunks, self.not_finite)
        adapters = [None if c.adapter is None else self.tiers.loaded[c.adapter.directory] for c in chunks]
        self.last.submit(copies, adapters, before)
        return self.last


class FakeStep:
    def __init__(self, device: FakeDevice, chunks: tuple[ChunkInput, ...], not_finite: bool) -> None:
        self.device = device
        self.chunks = chunks
        self.not_finite = not_finite
        self.rows: list[list[int]] = []  # the state behind every row, by chunk
        self.tokens: list[int] = []
        self.num_draws = 0

    def submit(
        self, copies: Sequence[PageCopy], adapters: Sequence[ResidentAdapter | None], before: "FakeStep | None"
    ) -> None:
        copying = [lambda copy=copy: self.device.copy_page(copy) for copy in copies]
        computing = [
            lambda chunk=chunk, adapter=adapter: self._run_chunk(chunk, adapter, before)
            for chunk, adapter in zip(self.chunks, adapters, strict=True)
        ]
        self.device.timeline.submit("steps", [*copying, *computing])

    def draw(self, draws: tuple[Draw, ...]) -> None:
        self.num_draws = len(draws)
        self.device.timeline.submit("steps", [lambda draw=draw: self._draw(draw) for draw in draws])

    def output(self) -> StepOutput:
        timeline = self.device.timeline
        while len(self.rows) < len(self.chunks) or len(self.tokens) < self.num_draws:
            timeline.advance(timeline.next_time())
        return StepOutput(
            tokens=tuple(None if self.not_finite else token for token in self.tokens),
            prompt_logprobs={
                number: tuple(
                    PositionLogprobs(token_id=token_id, logprob=-float(rows[position - 1 - chunk.start]))
                    for position, token_id in enumerate(chunk.score.token_ids, chunk.score.start)
                )
                for number, (chunk, rows) in enumerate(zip(self.chunks, self.rows, strict=True))
                if chunk.score is not None
            },
        )

    def _draw(self, draw: Draw) -> None:
        masked = draw.how.edits.masked if draw.how.edits else ()
        self.tokens.append(next_token(self.rows[draw.chunk][-1], masked, draw.how.sample))

    def _run_chunk(self, chunk: ChunkInput, adapter: ResidentAdapter | None, before: "FakeStep | None") -> None:
        if adapter is not None:
            self.device.read_adapter(adapter.digest, adapter.pages)
        state = 0
        for position in range(chunk.start):
            previous, after = self.device.blocks.get(self._slot(chunk, position), (None, state))
            assert previous == state, f"position {position} of a chunk was overwritten"
            state = after
        token_ids = chunk.token_ids
        if chunk.drawn is not None:
            assert before is not None and not token_ids
            token_ids = (before.tokens[chunk.drawn],)
        rows: list[int] = []
        for position, token_id in enumerate(token_ids, chunk.start):
            after = fold(state, adapter.digest if adapter else None, token_id)
            self.device.write_kv(*self._slot(chunk, position), state, after)
            state = after
            rows.append(state)
        self.rows.append(rows)

    def _slot(self, chunk: ChunkInput, position: int) -> tuple[int, int]:
        page, slot = divmod(position, self.device.block_tokens)
        return chunk.block_table[page], slot
