"""An engine core on a fake device, and what its tests ask of it."""

from collections.abc import Callable
from random import Random
from typing import Any

from fakes import EOS, PAGE_BYTES, VOCAB, FakeDevice, FakeRunner, FakeTiers, Timeline
from lorasrv.config import SchedulerConfig
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.types import AdapterUse, EngineRequest, TokenDelta

BLOCK_TOKENS = 4
NUM_PAGES = 40


def make_core(
    sizes: dict[str, int],
    *,
    num_pages: int = NUM_PAGES,
    seed: int = 0,
    failing: float = 0.0,
    delays: Random | None = None,
    pages_at_once: int = 0,
    clock: Callable[[], float] = lambda: 0.0,
    **config: Any,
) -> tuple[EngineCore, FakeRunner]:
    """With `delays`, the device's work takes its time, without them copies of `pages_at_once` a step take none."""
    device = FakeDevice(block_tokens=BLOCK_TOKENS, timeline=Timeline(delays))
    tiers = FakeTiers(device, sizes, Random(seed), failing, pages_at_once)
    runner = FakeRunner(device, tiers)
    limits = Limits(
        num_pages=num_pages,
        page_bytes=PAGE_BYTES,
        block_tokens=BLOCK_TOKENS,
        context_tokens=200,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
    )
    scheduler = SchedulerConfig(**({"max_step_tokens": 32, "max_running": 8} | config))
    return EngineCore(config=scheduler, limits=limits, runner=runner, tiers=tiers, clock=clock), runner


def make_request(
    request_id: str,
    prompt: tuple[int, ...] = (1, 2, 3),
    digest: str | None = None,
    max_tokens: int = 5,
    *,
    scale: float = 1.0,
    tenant: str = "",
) -> EngineRequest:
    adapter = AdapterUse(digest=digest, scale=scale) if digest else None
    return EngineRequest(
        request_id=request_id, token_ids=prompt, adapter=adapter, max_tokens=max_tokens, seed=0, tenant=tenant
    )


def run_all(core: EngineCore, max_steps: int = 1000) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {}
    for _ in range(max_steps):
        if not core.has_work():
            return deltas
        for delta in core.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        core.check()
    raise AssertionError(f"work is left after {max_steps} steps")


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]
