"""Stands in for `EngineCore.discard` until the core has it."""

from lorasrv.engine.core import EngineCore
from lorasrv.engine.tiers import AdapterTiers
from lorasrv.memory.eviction import IdleAdapter
from lorasrv.types import EngineRequest, TokenDelta


class DiscardingCore(EngineCore):
    def discard(self, digest: str) -> None:
        self._discarded().add(digest)
        self._sweep()

    def add(self, request: EngineRequest) -> None:
        super().add(request)
        if request.adapter is not None:
            self._discarded().discard(request.adapter.digest)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        super().cancel(request_id, index)
        self._sweep()

    def step(self) -> tuple[TokenDelta, ...]:
        deltas = super().step()
        self._sweep()
        return deltas

    def _discarded(self) -> set[str]:
        return self.__dict__.setdefault("_discarded_digests", set())

    def _sweep(self) -> None:
        tiers: AdapterTiers = self._tiers
        for digest in self._discarded() - {sequence.digest or "" for sequence in self._sequences.values()}:
            self._discarded().remove(digest)
            if digest in self._residency:
                self._evict(IdleAdapter(digest, len(self._residency[digest].pages)))
                self._pool.reclaim(self._step)
            tiers.discard(digest)
