"""Who holds which pages: sequences, the prefix cache and adapters. All of the core's effects on memory are here.

The scheduler asks (`sched.scheduler.Resources`); the core carries out what it decided. Nothing here computes.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from lorasrv.engine.batch import PageCopy
from lorasrv.engine.costs import Costs
from lorasrv.engine.messages import failure_of
from lorasrv.engine.sampling import first_needed_row
from lorasrv.engine.tiers import AdapterTiers, TierChanges
from lorasrv.memory.eviction import Candidate, EvictionOrder, IdleAdapter, IdleBlock, Policy
from lorasrv.memory.likelihood import Likelihood, RequestClock
from lorasrv.memory.pages import Owner, OwnerKind, PagePool
from lorasrv.memory.prefix import BlockKeys, PrefixCache
from lorasrv.memory.residency import AdapterInput, Residency
from lorasrv.memory.victims import name_of
from lorasrv.sched.plan import Admission
from lorasrv.sched.sequence import Sequence
from lorasrv.types import AdapterResidency, EngineRequest, PoolStats, Tier

_CACHE = Owner(OwnerKind.PREFIX, "cache")


class Ledger:
    """Owned by the engine's thread. `step` is the number of the last submitted step, `completed` of the last one that
    has run to its end; the core keeps both."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_bytes: int,
        block_tokens: int,
        keep_prefixes: bool,
        tiers: AdapterTiers,
        policy: Policy,
        clock: Callable[[], float],
    ) -> None:
        self.step = 0
        self.completed = 0
        self.costs = Costs()
        self._clock = clock
        self._page_bytes = page_bytes
        self._block_tokens = block_tokens
        self._keep_prefixes = keep_prefixes
        self._tiers = tiers
        self._pool = PagePool(num_pages)
        self._requests = RequestClock()
        self._order = EvictionOrder(policy)
        self._residency = Residency(self._order, Likelihood(self._requests))
        self._prefix = PrefixCache(self._order, Likelihood(self._requests))
        self._discarded: set[str] = set()
        # What the tiers were told last. What has failed is not wanted in the next plan, since its requests have ended.
        self._wanted: tuple[str, ...] = ()

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_pins(self) -> int:
        return self._residency.num_pins

    # What the scheduler asks.

    def is_resident(self, digest: str) -> bool:
        return digest in self._residency

    def is_loaded(self, digest: str) -> bool:
        return self._residency.is_loaded(digest)

    def resident(self) -> Iterable[str]:
        return (adapter.digest for adapter in self._residency)

    def num_pages(self, digest: str) -> int | None:
        if digest in self._residency:
            return len(self._residency[digest].pages)
        return self._tiers.num_pages(digest)

    def idle(self) -> Iterable[Candidate]:
        return self._order

    def num_own_pages(self, sequence: Sequence) -> int:
        return len(self._prefix.split(sequence.block_table)[1])

    def cached_blocks(self, sequence: Sequence) -> list[int]:
        if not self._shares(sequence):
            return []
        # What the request needs the logits of is computed in any case.
        count = first_needed_row(sequence) // self._block_tokens
        return self._prefix.match(sequence.keys.first(count, sequence.token_ids))

    def num_cached_tokens(self, request: EngineRequest) -> int:
        """Of the prompt of a request that is not queued yet."""
        if not self._keep_prefixes:
            return 0
        count = (len(request.token_ids) - 1) // self._block_tokens
        keys = self.block_keys(request).first(count, request.token_ids)
        return len(self._prefix.match(keys)) * self._block_tokens

    def copyable_page(self, sequence: Sequence) -> int | None:
        other, num_prompt = sequence.sibling, len(sequence.request.token_ids)
        if other is None or sequence.num_generated or other.num_computed < num_prompt:
            return None
        return other.block_table[(num_prompt - 1) // self._block_tokens]

    # Effects.

    def poll(self) -> TierChanges:
        """Take in what the tiers have done."""
        changes, now = self._tiers.poll(), self._clock()
        for digest in changes.loaded:
            self._arrived(digest)
        for digest in changes.failed:
            if digest in self.costs.reads:
                self.costs.reads.given_up(digest, now)
        for digest in changes.read:
            if digest in self.costs.reads:
                self.costs.reads.arrived(digest, self._num_bytes(digest), now)
        return changes

    def want(self, digests: tuple[str, ...]) -> None:
        """Have adapters read to host memory, where they are not, and kept there: `AdapterTiers.want`."""
        if digests == self._wanted:
            return
        self._wanted = digests
        reads, now = self.costs.reads, self._clock()
        for digest in set(reads).difference(digests):
            reads.given_up(digest, now)
        for digest in digests:
            if digest not in reads and self._tiers.num_pages(digest) is None:
                reads.began(digest, now)
        self._tiers.want(digests)

    def block_keys(self, request: EngineRequest) -> BlockKeys:
        """What names the blocks of a request: without a kept cache, only its own samples know their names."""
        salt = request.tenant if self._keep_prefixes else request.request_id
        return BlockKeys(weights=repr(request.adapter), salt=salt, block_tokens=self._block_tokens)

    @property
    def pages_at_once(self) -> int:
        """An adapter of no more pages is there when `load` returns."""
        return self._tiers.bytes_at_once() // self._page_bytes

    def load(self, digest: str) -> None:
        """Begin to copy an adapter from host memory to free pages."""
        num_pages = self._tiers.num_pages(digest)
        assert num_pages is not None, f"{digest} is planned to load but not in host memory"
        pages = self._pool.alloc(num_pages, Owner(OwnerKind.ADAPTER, digest))
        wait_for_steps, at_once = self._pool.last_reader(pages) > self.completed, num_pages <= self.pages_at_once
        self.costs.copies.began(digest, self._clock())
        self._residency.add(self._tiers.load(digest, pages, wait_for_steps=wait_for_steps))
        if at_once:
            self._arrived(digest)

    def evict(self, victims: Collection[Candidate]) -> None:
        """Make room."""
        self._order.evict(*map(name_of, victims))
        for victim in victims:
            if isinstance(victim, IdleAdapter):
                self._remove_adapter(victim.digest)
        blocks = [victim.page for victim in victims if isinstance(victim, IdleBlock)]
        self._prefix.remove(*blocks)
        self._pool.retire(blocks, _CACHE, self.step)

    def admit(self, sequence: Sequence, admission: Admission) -> PageCopy | None:
        """Give a sequence the pages of its known tokens, cached ones first. Returns what is to be copied to them."""
        num_cached = admission.num_cached_blocks
        sequence.block_table = self.cached_blocks(sequence)[:num_cached]
        # Further samples of a request tell nothing of requests to come.
        again = sequence.sample == 0
        self._prefix.pin(sequence.block_table, again=again)
        self._requests.now += 1
        sequence.num_keyed_blocks = num_cached
        sequence.num_computed = sequence.num_covered = num_cached * self._block_tokens
        self.grow(sequence, len(sequence.token_ids))
        if sequence.digest is not None:
            self._residency.pin(sequence.digest, again=again)
            sequence.adapter = self._adapter_input(sequence.request)
            sequence.held_up = not self._residency.is_loaded(sequence.digest)
        if admission.copied_page is None:
            return None
        sequence.num_computed = len(sequence.token_ids) - 1
        return PageCopy(source=admission.copied_page, target=sequence.block_table[num_cached])

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Let the sequence's pages cover `num_tokens` tokens."""
        missing = -(-num_tokens // self._block_tokens) - len(sequence.block_table)
        if missing > 0:
            sequence.block_table += self._pool.alloc(missing, sequence.owner)
            sequence.num_covered = len(sequence.block_table) * self._block_tokens

    def share_full_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the blocks that the first `num_tokens` tokens fill to the prefix cache, where others find them."""
        num_full, first = num_tokens // self._block_tokens, sequence.num_keyed_blocks
        if num_full <= first:
            return
        sequence.num_keyed_blocks = num_full
        if not self._shares(sequence):
            return
        table = sequence.block_table
        keys, own = sequence.keys.between(first, num_full, sequence.token_ids), table[first:num_full]
        cached = self._prefix.insert(keys, own, table[first - 1] if first else None)
        if cached != own:
            table[first:num_full] = cached
            twice = [page for page, other in zip(own, cached, strict=True) if page != other]
            self._pool.retire(twice, sequence.owner, self.step)
            own = [page for page, other in zip(own, cached, strict=True) if page == other]
        self._pool.transfer(own, sequence.owner, _CACHE)

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take back a running sequence's pages and pins. Its full blocks stay in the prefix cache; with `forget` those
        that nobody else uses do not."""
        cached, own = self._prefix.split(sequence.block_table)
        self._prefix.unpin(cached, self.costs.prefill_s_per_token * self._block_tokens)
        self._pool.retire(own, sequence.owner, self.step)
        if forget or not self._keep_prefixes:
            self._remove_idle_from(cached)
        sequence.block_table = []
        sequence.num_computed = sequence.num_covered = sequence.num_keyed_blocks = 0
        sequence.adapter, sequence.held_up = None, False
        if sequence.digest is not None:
            self._residency.unpin(sequence.digest, self._adapter_cost_s(sequence.digest))

    def forget(self, sequence: Sequence) -> None:
        """Take a queued sequence's full blocks, which it had before it was preempted, out of the prefix cache."""
        keys = sequence.keys.first(len(sequence.token_ids) // self._block_tokens, sequence.token_ids)
        self._remove_idle_from(self._prefix.match(keys))

    def discard(self, digest: str) -> None:
        self._discarded.add(digest)

    def keep(self, digest: str) -> None:
        """Undo a `discard` that has not been carried out."""
        self._discarded.discard(digest)

    def drop_discarded(self, used: set[str]) -> None:
        """Let go of the discarded adapters that are not `used`."""
        for digest in [digest for digest in self._discarded if digest not in used]:
            if digest in self._residency:
                if not self._residency.is_loaded(digest):
                    continue  # its pages are being written
                self._remove_adapter(digest)
            self._tiers.discard(digest)
            self._discarded.remove(digest)

    @property
    def has_discarded(self) -> bool:
        return bool(self._discarded)

    # What others are told.

    def pool_stats(self) -> PoolStats:
        return self._pool.stats()

    def adapters(self) -> tuple[AdapterResidency, ...]:
        """Every adapter version above the disk tier, and those whose last read failed."""
        resident = {
            adapter.digest: AdapterResidency(
                digest=adapter.digest,
                tier=Tier.DEVICE if self._residency.is_loaded(adapter.digest) else Tier.COPYING,
                num_pages=len(adapter.pages),
                pins=self._residency.pins(adapter.digest),
            )
            for adapter in self._residency
        }
        below = {
            digest: AdapterResidency(digest=digest, tier=tier, num_pages=0, pins=0)
            for digest, tier in self._tiers.host_tiers().items()
        }
        failed = {
            digest: AdapterResidency(digest=digest, tier=Tier.FAILED, num_pages=0, pins=0, failure=failure_of(error))
            for digest, error in self._tiers.failures().items()
        }
        return tuple((failed | below | resident).values())

    def check(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the parts are sound and every page and pin belongs to one of `running`, to the
        cache or to an adapter."""
        running = tuple(running)
        self._pool.check()
        self._residency.check()
        self._prefix.check()
        self._order.check()
        self._tiers.check()
        for sequence in running:
            owners = {_CACHE, sequence.owner}
            assert all(self._pool.owner(page) in owners for page in sequence.block_table), "a block is another's"
            assert sequence.num_covered == len(sequence.block_table) * self._block_tokens, "a miscounted block table"
            assert sequence.num_computed <= sequence.num_covered, "KV without a page"
        stats = self._pool.stats()
        shared = Counter(page for s in running for page in s.block_table if page in self._prefix)
        num_blocks = sum(len(sequence.block_table) for sequence in running)
        assert stats.sequences == num_blocks - shared.total(), "sequence pages leaked"
        assert stats.prefix == len(self._prefix), "cached pages leaked"
        assert all(self._prefix.pins(page) == count for page, count in shared.items()), "a cached block's pins are off"
        num_idle = self._prefix.num_idle
        assert len(shared) + num_idle == len(self._prefix), "a cached block is pinned by nobody"
        assert self._keep_prefixes or not num_idle, "a block is kept without a cache"
        assert stats.adapters == sum(len(adapter.pages) for adapter in self._residency), "adapter pages leaked"
        used = Counter(sequence.digest for sequence in running)
        for adapter in self._residency:
            assert self._residency.pins(adapter.digest) == used[adapter.digest], "pins do not match requests"

    def _arrived(self, digest: str) -> None:
        self._residency.loaded(digest, self._adapter_cost_s(digest))
        self.costs.copies.arrived(digest, self._num_bytes(digest), self._clock())

    def _adapter_input(self, request: EngineRequest) -> AdapterInput:
        assert request.adapter is not None, "the base model needs no pages"
        resident = self._residency[request.adapter.digest]
        return AdapterInput(directory=resident.directory, max_rank=resident.max_rank, scale=request.adapter.scale)

    def _remove_adapter(self, digest: str) -> None:
        adapter = self._residency.remove(digest)
        self._pool.retire(adapter.pages, Owner(OwnerKind.ADAPTER, digest), self.step)

    def _remove_idle_from(self, pages: Iterable[int]) -> None:
        idle = self._prefix.idle_from(pages)
        self._prefix.remove(*idle)
        self._pool.retire(idle, _CACHE, self.step)

    def _num_bytes(self, digest: str) -> int:
        num_pages = self.num_pages(digest)
        assert num_pages is not None, f"{digest} is neither on the device nor in host memory"
        return num_pages * self._page_bytes

    def _adapter_cost_s(self, digest: str) -> float:
        """Of bringing a resident adapter back."""
        per_byte = self.costs.copy_s_per_byte
        if self._tiers.num_pages(digest) is None:
            per_byte += self.costs.read_s_per_byte
        return per_byte * self._num_bytes(digest)

    def _shares(self, sequence: Sequence) -> bool:
        return self._keep_prefixes or sequence.request.n > 1
