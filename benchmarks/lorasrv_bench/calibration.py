"""A hardware table of this machine, from what the real engine takes: its steps, reads and copies.

Steps are timed over a grid of batches, contexts and numbers of adapters, and the table's terms are fitted to the
medians, each cell's error counting by its share. What a fit cannot tell from the fixed part ends up there, so the table
is good for the model that it was measured on.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lorasrv.model.shape import ModelShape
from lorasrv.sim.cost import CostModel, StepWork
from lorasrv.sim.hardware import Hardware
from lorasrv.types import AdapterUse, EngineRequest, Tier, Warm
from lorasrv_bench.real_engine import RealEngine

ITEMSIZE = 4
# How many tokens' products take as long as reading the weights, to choose from.
_BALANCES = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
_UNBOUNDED = 1e18
_TRIALS = 7
_BATCHES, _CONTEXTS, _PREFILLS = (1, 4, 16), (32, 192), (16, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A kind of step and the median of its times."""

    work: StepWork
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`errors` are the fit's, as shares of the measured times."""

    hardware: Hardware
    timed: tuple[Timed, ...]
    errors: tuple[float, ...]


def calibrate(engine: RealEngine, *, timer: Callable[[], float], repeats: int = 9) -> Calibration:
    """Measure `engine`, which has no work and at least 60 adapters, in the seconds of `timer`."""
    prober = _Prober(engine, timer, repeats)
    read_s, disk_bytes_per_s, copy_bytes_per_s = prober.transfers()
    timed = tuple(prober.steps())
    fitted = fit(engine.shape, timed)
    hardware = replace(
        fitted,
        read_s=read_s,
        disk_bytes_per_s=disk_bytes_per_s,
        copy_bytes_per_s=copy_bytes_per_s,
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    )
    return Calibration(hardware=hardware, timed=timed, errors=_errors(engine.shape, hardware, timed))


def fit(shape: ModelShape, timed: Sequence[Timed]) -> Hardware:
    """The table whose steps come nearest to the measured ones; reads and copies cost nothing in it."""
    tables = [_fit(shape, timed, balance) for balance in _BALANCES]
    return min(tables, key=lambda table: sum(error**2 for error in _errors(shape, table, timed)))


def _fit(shape: ModelShape, timed: Sequence[Timed], balance: float) -> Hardware:
    """With the weights read in the time of `balance` tokens' products."""
    rows: list[tuple[float, ...]] = []
    for each in timed:
        work = each.work
        products = shape.linear_params * work.num_tokens + shape.head_params * work.num_rows
        linear = 2 * max(products, balance * shape.linear_params)
        adapters, kv = ITEMSIZE * work.adapter_params, ITEMSIZE * shape.kv_elems_per_token * work.context_tokens
        rows.append((1.0, work.num_rows, linear, work.num_adapters, adapters, kv))
    seconds = np.array([each.seconds for each in timed])
    step_s, row_s, flop_s, adapter_s, adapter_byte_s, kv_byte_s = _not_negative(np.array(rows) / seconds[:, None])
    flops_per_s = 1 / flop_s if flop_s else _UNBOUNDED
    weights = ITEMSIZE * (shape.linear_params + shape.head_params)
    return Hardware(
        name="calibrated",
        memory_bytes=_UNBOUNDED,
        read_bytes_per_s=weights * flops_per_s / (2 * balance * shape.linear_params),
        adapter_bytes_per_s=1 / adapter_byte_s if adapter_byte_s else _UNBOUNDED,
        kv_bytes_per_s=1 / kv_byte_s if kv_byte_s else _UNBOUNDED,
        flops_per_s=flops_per_s,
        copy_bytes_per_s=_UNBOUNDED,
        disk_bytes_per_s=_UNBOUNDED,
        read_s=0.0,
        step_s=step_s,
        row_s=row_s,
        adapter_s=adapter_s,
        runs_ahead=False,
    )


def _not_negative(rows: NDArray[np.float64]) -> list[float]:
    """Coefficients of least squares to ones, terms that would be negative left out, the most negative first."""
    kept = list(range(rows.shape[1]))
    while True:
        scale = rows[:, kept].max(axis=0)
        found = np.linalg.lstsq(rows[:, kept] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        if not kept or found.min() >= 0:
            break
        kept.pop(int((found * scale).argmin()))
    coefficients = [0.0] * rows.shape[1]
    for column, value in zip(kept, found.tolist(), strict=True):
        coefficients[column] = value
    return coefficients


def _errors(shape: ModelShape, hardware: Hardware, timed: Sequence[Timed]) -> tuple[float, ...]:
    costs = CostModel(shape, hardware, ITEMSIZE)
    return tuple((costs.host_s(t.work.num_rows) + costs.forward_s(t.work)) / t.seconds - 1 for t in timed)


class _Prober:
    """Asks a real engine for steps of one kind after the other."""

    def __init__(self, engine: RealEngine, timer: Callable[[], float], repeats: int) -> None:
        self._engine = engine
        self._timer = timer
        self._repeats = repeats
        self._numbers = itertools.count()

    def transfers(self) -> tuple[float, float, float]:
        """(seconds to open an adapter, bytes read per second, bytes copied per second), from two sizes of adapters.

        Reads as they are made in service: beside a sequence that decodes.
        """
        engine = self._engine
        small, large = (engine.ranks.index(rank) for rank in (min(engine.ranks), max(engine.ranks)))
        sizes = [ITEMSIZE * engine.shape.adapter_params(engine.ranks[place]) for place in (small, large)]
        unread = [iter(engine.digests[place :: len(engine.ranks)]) for place in (small, large)]
        beside = self._add(32, 3000, 0, 0)
        reads = [self._read(next(ones)) for _ in range(_TRIALS) for ones in unread]
        engine.core.cancel(beside)
        copies = [self._copy(next(ones)) for _ in range(_TRIALS) for ones in unread]
        read_small, read_large = statistics.median(reads[0::2]), statistics.median(reads[1::2])
        copy_small, copy_large = statistics.median(copies[0::2]), statistics.median(copies[1::2])
        step = sizes[1] - sizes[0]
        bytes_per_s = step / (read_large - read_small) if read_large > read_small else _UNBOUNDED
        copied_per_s = step / (copy_large - copy_small) if copy_large > copy_small else _UNBOUNDED
        return max(0.0, read_small - sizes[0] / bytes_per_s), bytes_per_s, copied_per_s

    def steps(self) -> Iterator[Timed]:
        for batch in _BATCHES:
            for context in _CONTEXTS:
                for adapters in sorted({0, 1, min(4, batch), batch}):
                    yield self._decode(batch, context, adapters)
        for tokens in _PREFILLS:
            for adapters in (0, 1):
                yield self._prefill(tokens, adapters)

    def _read(self, digest: str) -> float:
        """Seconds from disk to host memory, asked for by a request."""
        core = self._engine.core
        begin = time.perf_counter()
        request_id, seconds, is_open = self._ask(digest, 1, 1), None, True
        while is_open:
            is_open = not any(delta.request_id == request_id and delta.finish for delta in core.step())
            if seconds is None and core.tier_of(digest) is not Tier.DISK:
                seconds = time.perf_counter() - begin
        assert seconds is not None, "an adapter was served from disk"
        return seconds

    def _copy(self, digest: str) -> float:
        """Seconds from host memory to the device."""
        self._warm(digest, Tier.HOST)
        return self._warm(digest, Tier.DEVICE)

    def _warm(self, digest: str, tier: Tier) -> float:
        core = self._engine.core
        begin = time.perf_counter()
        core.warm(Warm(warm_id=next(self._numbers), digest=digest, tier=tier, deadline_s=time.monotonic() + 60))
        while core.has_work():
            core.step()
        seconds = time.perf_counter() - begin
        (warmed,) = core.take_warmed()
        assert warmed.failure is None, warmed
        return seconds

    def _decode(self, batch: int, context: int, adapters: int) -> Timed:
        """All of a batch one token further, each behind about `context` tokens."""
        core = self._engine.core
        waiting = {self._add(context, 2 * self._repeats + batch, place, adapters) for place in range(batch)}
        while waiting:
            waiting -= {delta.request_id for delta in core.step() if delta.token_ids}
        seconds = [self._step_s() for _ in range(self._repeats)]
        while core.has_work():
            core.step()
        params = self._params(batch, adapters)
        # The first of the batch have some tokens more than the last.
        seen = batch * (context + self._repeats // 2 + 1)
        work = StepWork(
            num_rows=batch,
            num_tokens=batch,
            context_tokens=seen,
            pairs=seen,
            num_adapters=adapters,
            adapter_params=sum(params[: adapters or 0]),
            adapter_products=sum(params),
        )
        return Timed(work=work, seconds=statistics.median(seconds))

    def _prefill(self, tokens: int, adapters: int) -> Timed:
        core = self._engine.core
        seconds: list[float] = []
        for _ in range(self._repeats):
            self._add(tokens, 1, 0, adapters)
            seconds.append(self._step_s())
            assert not core.has_work(), "a prefill of more than one step"
        params = sum(self._params(1, adapters))
        work = StepWork(
            num_rows=1,
            num_tokens=tokens,
            context_tokens=tokens,
            pairs=tokens * (tokens + 1) // 2,
            num_adapters=adapters,
            adapter_params=params,
            adapter_products=params * tokens,
        )
        return Timed(work=work, seconds=statistics.median(seconds))

    def _add(self, prompt: int, output: int, place: int, adapters: int) -> str:
        return self._ask(self._engine.digests[place % adapters] if adapters else None, prompt, output)

    def _ask(self, digest: str | None, prompt: int, output: int) -> str:
        engine, number = self._engine, next(self._numbers)
        # All prompts differ from the first token on.
        token_ids = tuple(
            (number * 31 + 17 * position) % (engine.info.vocab_size - 3) + 3 for position in range(prompt)
        )
        request = EngineRequest(
            request_id=f"probe {number}",
            token_ids=token_ids,
            adapter=None if digest is None else AdapterUse(digest=digest),
            max_tokens=output,
            seed=0,
            temperature=0.0,
            ignore_eos=True,
            tenant=str(number),
        )
        engine.core.add(request)
        return request.request_id

    def _step_s(self) -> float:
        begin = self._timer()
        self._engine.core.step()
        return self._timer() - begin

    def _params(self, batch: int, adapters: int) -> list[int]:
        """Of the adapter of each request of a batch."""
        engine = self._engine
        numbers = [place % adapters for place in range(batch)] if adapters else []
        return [engine.shape.adapter_params(engine.ranks[number % len(engine.ranks)]) for number in numbers]
