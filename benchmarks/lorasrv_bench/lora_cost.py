"""What adapters add to a decode step, beside the time that reading their bytes takes.

    python -m lorasrv_bench.lora_cost

Steps of 16 rows on the 125M Llama in bfloat16, in process, with 1, 4 and 16 different adapters of rank 16 on all linear
modules, alternating with the base's. Promised is at most 1.5 times what the adapters' bytes take at the machine's
bandwidth, which is the most at which products of a few rows stream weights.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import linear

from lorasrv.config import SchedulerConfig
from lorasrv.types import BASE_ID
from lorasrv_bench.asks import Ask, make_asks
from lorasrv_bench.bench_model import CONFIGS, Size, write_config
from lorasrv_bench.checks import TOLERANCES, check_scores, sampled
from lorasrv_bench.in_process import InProcess
from lorasrv_bench.load import Call
from lorasrv_bench.real_engine import Prepared, prepare, real_engine
from lorasrv_bench.workloads import Arrival
from lorasrv_kernels import cpu, fixed

RANK = 16
DTYPE = "bfloat16"
ALLOWED = 1.5
# More than any cache holds.
STREAMED_SHAPE = (4096, 2048)
NUM_STREAMED = 32


@dataclass(frozen=True, kw_only=True)
class Setup:
    size: Size = "125m"
    rows: int = 16
    numbers: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 64
    output_tokens: int = 32
    rounds: int = 5
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """By how many different adapters, 0 being the base: the step's seconds by round. `wrong` is empty where there are
    figures."""

    step_s: dict[int, list[float]]
    adapter_bytes: int
    bytes_per_s: float
    wrong: tuple[str, ...]

    def added_s(self, number: int) -> list[float]:
        """What so many adapters added to the base's step, by round."""
        return [with_s - base_s for with_s, base_s in zip(self.step_s[number], self.step_s[0], strict=True)]

    def allowed_s(self, number: int) -> float:
        return ALLOWED * number * self.adapter_bytes / self.bytes_per_s


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(CONFIGS), default="125m")
    for name in ("rows", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setup(), name))
    setup = Setup(**vars(parser.parse_args(argv)))
    cost = measure(setup)
    if cost.wrong:
        print(f"NO SCORE, the output is wrong: {'; '.join(cost.wrong)}")
        return 1
    print(f"{setup}; {cost.adapter_bytes / 1e6:.2f} MB an adapter, weights read at {cost.bytes_per_s / 1e9:.1f} GB/s")
    print(f"base: {1e3 * statistics.median(cost.step_s[0]):.2f} ms a step")
    for number in setup.numbers:
        added = [1e3 * each for each in cost.added_s(number)]
        print(
            f"{number} adapters: + {statistics.median(added):.2f} ms ({min(added):.2f} to {max(added):.2f}); "
            f"{1e3 * cost.allowed_s(number):.2f} allowed"
        )
    return 0


def measure(setup: Setup) -> Cost:
    with tempfile.TemporaryDirectory(prefix="lorasrv-cost-") as folder:
        model = Path(folder) / "model"
        write_config(model, setup.size)
        prepared = prepare(Path(folder), num_adapters=max(setup.numbers), ranks=(RANK,), model=model)
        return measure_on(prepared, setup)


def measure_on(prepared: Prepared, setup: Setup) -> Cost:
    shape = prepared.shape
    adapter_bytes = shape.num_layers * RANK * sum(a + b for _, a, b in shape.module_shapes) * 2
    config = SchedulerConfig(max_running=setup.rows, max_step_tokens=max(512, setup.rows), prefix_cache=False)
    step_s: dict[int, list[float]] = {number: [] for number in (0, *setup.numbers)}
    wrong: list[str] = []
    pool_bytes = 2 * max(setup.numbers) * adapter_bytes + (256 << 20)
    with real_engine(prepared, pool_bytes=pool_bytes, scheduler=config, dtype=DTYPE) as engine:
        process = InProcess(engine.core, dict(zip(engine.digests, engine.digests, strict=True)))
        for turn in range(setup.rounds + 1):
            for number in step_s:
                asks = _asks(setup, engine.digests, number, turn)
                calls = process.send(asks, setup.rows).calls
                if turn:
                    step_s[number].append(_decode_s([call.piece_s for call in calls]))
                else:
                    wrong += _wrong(process, asks, calls, engine.digests)
    return Cost(step_s=step_s, adapter_bytes=adapter_bytes, bytes_per_s=weight_stream(), wrong=tuple(wrong))


def _asks(setup: Setup, names: Sequence[str], number: int, turn: int) -> list[Ask]:
    arrivals = [
        Arrival(
            at_s=0.0,
            adapter=row % number if number else None,
            tenant=0,
            prompt_tokens=setup.prompt_tokens,
            output_tokens=setup.output_tokens,
        )
        for row in range(setup.rows)
    ]
    return make_asks(arrivals, names, (setup.seed, turn, number), CONFIGS[setup.size]["vocab_size"])


def _decode_s(piece_s: Sequence[Sequence[float]]) -> float:
    """The median step of those in which all rows decoded: from the last row's first token to the first row's last."""
    begun_s, ended_s = max(times[0] for times in piece_s), min(times[-1] for times in piece_s)
    return statistics.median(b - a for times in piece_s for a, b in pairwise(times) if a >= begun_s and b <= ended_s)


def _wrong(process: InProcess, asks: Sequence[Ask], calls: Sequence[Call], names: Sequence[str]) -> Sequence[str]:
    by_index = {ask.index: ask for ask in asks}

    def other_than(ask: Ask) -> str | None:
        return BASE_ID if ask.adapter is not None else names[0]

    sample = sampled(calls, seed=0, size=2)
    return asyncio.run(check_scores(process, sample, by_index, other_than, TOLERANCES[DTYPE])).wrong


def weight_stream() -> float:
    """Bytes of bfloat16 weights a second that products of a few rows read: the most of what the library does with one
    row and with 16, with weights that oneDNN has packed, and what our own product does with one row."""
    weights = [torch.ones(STREAMED_SHAPE, dtype=torch.bfloat16) for _ in range(NUM_STREAMED)]
    can_pack = fixed.is_available(weights[0].device, weights[0].dtype)
    packed = [fixed.pack_linear(weight) for weight in weights] if can_pack else []
    one, some = (torch.ones(rows, STREAMED_SHAPE[1], dtype=torch.bfloat16) for rows in (1, 16))
    ways: list[Callable[[], object]] = [
        lambda: [linear(one, weight) for weight in weights],
        lambda: [linear(some, weight) for weight in weights],
    ]
    if can_pack:
        ways.append(lambda: [fixed.linear(some, weight, None) for weight in packed])
    native = cpu.load()
    if not isinstance(native, str) and native.multiplies:
        own = [native.pack_linear(weight, keep=True) for weight in weights]
        ways.append(lambda: [native.linear(one, weight, None) for weight in own])
    return sum(weight.nbytes for weight in weights) / min(map(_least_s, ways))


def _least_s(way: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(6):
        begun_s = time.perf_counter()
        way()
        times.append(time.perf_counter() - begun_s)
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main())
