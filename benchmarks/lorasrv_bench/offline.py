"""A workload in process, all its requests at once: the engine without a server, a wire or a client."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasrv.config import DType
from lorasrv.llm import LLM
from lorasrv.model.families import read_architecture
from lorasrv.offline.results import Generation
from lorasrv.types import SamplingParams
from lorasrv_bench.asks import Ask, make_asks
from lorasrv_bench.checks import SAMPLE, TOLERANCES
from lorasrv_bench.fresh_adapters import write_adapters
from lorasrv_bench.scoring import BEST, gaps_of
from lorasrv_bench.serving import Phase, silent
from lorasrv_bench.summary import spread
from lorasrv_bench.workloads import Workload


def run(
    llm: LLM, workload: Workload, model: Path, *, dtype: DType, repeats: int, exact: bool, phase: Phase = silent
) -> dict[str, Any]:
    """The figures of `repeats` runs, behind one that warms up. All runs have to say the same, and a sample of that is
    scored alone; else there are no figures. Bits are compared where `exact`, in other dtypes and batches only scores.
    """
    asked = list(dict.fromkeys(arrival.adapter for arrival in workload.arrivals if arrival.adapter is not None))
    names = [f"bench-{number:05d}" for number in range(workload.num_adapters)]
    ranks = {number: workload.rank(number) for number in asked}
    with tempfile.TemporaryDirectory(prefix="lorasrv-bench-") as folder:
        with phase("make adapters", len(asked)) as advance:
            made = write_adapters(Path(folder), model, ranks, seeds=(workload.seed,), advance=advance)
        for number, path in made.items():
            llm.add_adapter(names[number], path)
    asks = make_asks(workload.arrivals, names, (workload.seed,), read_architecture(model).vocab_size)
    runs: list[tuple[float, list[Generation]]] = []
    with phase("runs", repeats + 1) as advance:
        for _ in range(repeats + 1):
            begun_s = time.monotonic()
            outputs = generate(llm, asks)
            runs.append((time.monotonic() - begun_s, outputs))
            advance()
    wrong = _wrong(llm, asks, [outputs for _, outputs in runs], TOLERANCES[dtype], exact=exact)
    checked = f"{len(asks)} lengths in each of {len(runs)} runs; {min(SAMPLE, len(asks))} answers scored alone"
    summary: dict[str, Any] = {"checks": {"wrong": wrong, "done": [checked]}}
    if wrong:
        return summary
    tokens = sum(ask.max_tokens for ask in asks)
    times = [seconds for seconds, _ in runs[1:]]
    median_s = statistics.median(times)
    return summary | {
        "requests": len(asks),
        "output_tokens_per_s": tokens / median_s,
        "tokens_per_s": (tokens + sum(len(ask.prompt) for ask in asks)) / median_s,
        "duration_s": spread(times),
    }


def generate(llm: LLM, asks: Sequence[Ask]) -> list[Generation]:
    prompts = [ask.tokens for ask in asks]
    sampling = [SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True) for ask in asks]
    return llm.generate(prompts, adapter=[ask.name for ask in asks], sampling=sampling)


def gaps(llm: LLM, ask: Ask, token_ids: Sequence[int]) -> list[float]:
    """As `checks.Scorer` says."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=BEST, prompt_logprobs=1)
    (scored,) = llm.generate([(*ask.tokens, *token_ids[:-1])], adapter=ask.name, sampling=sampling)
    assert scored.prompt_logprobs is not None and scored.logprobs is not None, "both were asked for"
    return gaps_of(len(ask.prompt), scored.prompt_logprobs, scored.logprobs[0], token_ids)


def _wrong(
    llm: LLM, asks: Sequence[Ask], runs: Sequence[Sequence[Generation]], tolerance: float, *, exact: bool
) -> list[str]:
    wrong: list[str] = []
    for outputs in runs:
        for ask, output in zip(asks, outputs, strict=True):
            if output.error is not None:
                wrong.append(f"request {ask.index} failed: {output.error}")
            elif len(output.token_ids) != ask.max_tokens:
                wrong.append(f"request {ask.index}: {len(output.token_ids)} tokens came, not {ask.max_tokens}")
    if wrong:
        return wrong
    if exact:
        first = [output.token_ids for output in runs[0]]
        wrong += [
            f"run {number} says something else than run 0"
            for number, outputs in enumerate(runs)
            if [output.token_ids for output in outputs] != first
        ]
    for ask, output in list(zip(asks, runs[-1], strict=True))[:SAMPLE]:
        worst = max(gaps(llm, ask, output.token_ids))
        if worst > tolerance:
            wrong.append(f"request {ask.index}: a token is {worst:.3g} nats from the likeliest when scored alone")
    return wrong
