"""Ours beside those who can do the same: same weights, same prompts, in one run, alternating.

    python -m lorasrv_bench.peers

A 125M Llama of random weights and adapters of rank 16 on all its linear modules; so many requests at a time, of so many
tokens in and out, to the base, to one adapter, and to four in turn.

- `PEFT mixed batch`: `generate(adapter_names=[...])`; `one model per adapter`: merged, each adapter's requests in turn,
  which is plain `generate` where there is one; `transformers continuous batching`: of the base alone.
- `ours, through gRPC`: `lorasrv serve` and a client process; `ours, in process`: `lorasrv.LLM`.
- servers by URL, started on what `--write FOLDER` has written, and measured with `--folder FOLDER`.

First, in float32, everyone's greedy tokens have to equal those of PEFT with each request alone. Then each peer gets its
best threads, type and batch, by a small search. Answers of the timed rounds are scored by the float32 model: each
greedy token has to be the likeliest there but for rounding, and not under other weights. Who is wrong has no figures.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from transformers.utils.logging import disable_progress_bar

from lorasrv_bench.asks import Ask, make_asks
from lorasrv_bench.bench_model import CONFIGS, Size, write_model
from lorasrv_bench.clients import Clients
from lorasrv_bench.figures import commit, cpu_name
from lorasrv_bench.fresh_adapters import write_adapters
from lorasrv_bench.peers_arms import Arm, Material, PeerArm, by_url, ours
from lorasrv_bench.peers_transformers import PEERS, Models, Referee, Settings, best_settings
from lorasrv_bench.workloads import Arrival

NUM_ADAPTERS = 4
RANK = 16
# By how many adapters the requests name in turn.
CASES: Mapping[str, int] = MappingProxyType({"base": 0, "one adapter": 1, "4 adapters": NUM_ADAPTERS})
ONLY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "PEFT mixed batch": ("one adapter", "4 adapters"),
        "transformers continuous batching": ("base",),
    }
)
OURS = "ours, through gRPC"
# Servers that want adapters by number.
BY_NUMBER = ("llama.cpp",)
MIXED = "4 adapters"
CHECKED_TOKENS = 16
SCORED = 4
# What weights, adapters and sums of eight digits may do beside float32; other weights are several nats off.
TOLERANCE = 1.0
# Behind the seed, so that no two draws share prompts.
CHECK, SEARCH, ROUND = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`urls` are of servers by name; with `servers_only` the peers of this process are left out."""

    size: Size = "125m"
    concurrency: int = 16
    requests: int = 32
    prompt_tokens: int = 64
    output_tokens: int = 64
    rounds: int = 3
    seed: int = 0
    urls: tuple[tuple[str, str], ...] = ()
    servers_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a run has found: tokens/s by arm, case and round; what was wrong by arm; each peer's search."""

    rates: dict[str, dict[str, list[float]]]
    wrong: dict[str, list[str]]
    bound: dict[str, list[str]]
    searched: dict[str, dict[str, float]]
    chosen: dict[str, str]
    worst_gap: dict[str, float]

    def median(self, arm: str, case: str) -> float | None:
        """None for an arm that was wrong, or does not know the case."""
        rates = self.rates.get(arm, {}).get(case)
        return statistics.median(rates) if rates and arm not in self.wrong else None

    def ratio(self, ours: str, case: str, theirs: str) -> list[float] | None:
        """Ours over theirs, round by round; None where one of both has no figures."""
        if self.median(ours, case) is None or self.median(theirs, case) is None:
            return None
        return [a / b for a, b in zip(self.rates[ours][case], self.rates[theirs][case], strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    setup, write, kept, out = _parsed(argv)
    if write is not None:
        print(written(write, setup).model.parent)
        return 0
    disable_progress_bar()
    print(f"commit {commit()}; {platform.machine()}, {cpu_name()}, {os.cpu_count()} cores; torch {torch.__version__}")
    print(f"{setup}, rank {RANK}", flush=True)
    with tempfile.TemporaryDirectory(prefix="lorasrv-peers-") as folder:
        material = written(Path(folder) / "material", setup) if kept is None else material_in(kept)
        found = measured(setup, material, Path(folder))
    print(report(found))
    if out is not None:
        told = {"commit": commit(), "machine": cpu_name(), "setup": asdict(setup), **asdict(found)}
        out.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if found.wrong else 0


def written(folder: Path, setup: Setup) -> Material:
    """Model and adapters, by the seed."""
    model = write_model(folder / "model", setup.size, setup.seed)
    write_adapters(folder / "adapters", model, dict.fromkeys(range(NUM_ADAPTERS), RANK), seeds=(setup.seed,))
    return material_in(folder)


def material_in(folder: Path) -> Material:
    paths = sorted((folder / "adapters").iterdir())
    return Material(model=folder / "model", adapters={f"lora-{number}": path for number, path in enumerate(paths)})


def measured(setup: Setup, material: Material, folder: Path) -> Compared:
    """Checks, searches, then rounds in which all arms take turns. `folder` is for what servers keep."""
    found = Compared(rates={}, wrong={}, bound={}, searched={}, chosen={}, worst_gap={})
    models = Models(material.model, tuple(material.adapters.values()))
    referee = Referee(models)
    clients = Clients(1)
    try:
        _check(setup, material, models, referee, clients, folder, found)
        with ExitStack() as stack:
            arms = dict[str, Arm](stack.enter_context(ours(material, "bfloat16", setup.concurrency, clients, folder)))
            for name, url in setup.urls:
                ids = {each: number for number, each in enumerate(material.adapters)}
                arms[name] = by_url(url, clients, setup.concurrency, ids if name in BY_NUMBER else None)
            if not setup.servers_only:
                arms |= _searched(setup, material, models, found)
            for number in range(setup.rounds + 1):
                _round(setup, material, arms, referee, number, found)
    finally:
        clients.close()
    return found


def asks_of(setup: Setup, material: Material, adapters: Sequence[int | None], seeds: tuple[int, ...]) -> list[Ask]:
    """Prompts are drawn by the seeds, those of a round for it alone: caches of prefixes know none of them."""
    arrivals = [
        Arrival(
            at_s=0.0,
            adapter=adapter,
            tenant=0,
            prompt_tokens=setup.prompt_tokens,
            output_tokens=setup.output_tokens,
        )
        for adapter in adapters
    ]
    return make_asks(arrivals, tuple(material.adapters), (setup.seed, *seeds), CONFIGS[setup.size]["vocab_size"])


def adapters_of(case: str, requests: int) -> list[int | None]:
    number = CASES[case]
    return [index % number if number else None for index in range(requests)]


def knows(arm: str, case: str) -> bool:
    return case in ONLY.get(arm, CASES)


def _check(
    setup: Setup,
    material: Material,
    models: Models,
    referee: Referee,
    clients: Clients,
    folder: Path,
    found: Compared,
) -> None:
    """Everyone's float32 tokens against the referee's, in batches in which the base and all adapters are mixed."""
    short = replace(setup, output_tokens=min(CHECKED_TOKENS, setup.output_tokens))
    asks = asks_of(short, material, (None, *range(NUM_ADAPTERS)) * 2, (CHECK,))
    expected = {ask.index: referee.greedy(ask) for ask in asks}
    settings = Settings(threads=torch.get_num_threads(), dtype="float32", batch=setup.concurrency)
    peers = {name: PeerArm(kind, models, settings) for name, kind in PEERS.items() if not setup.servers_only}
    with ours(material, "float32", setup.concurrency, clients, folder) as arms:
        for name, arm in {**arms, **peers}.items():
            known = [ask for ask in asks if ask.adapter is None or knows(name, MIXED)]
            answers = arm.answer(known).tokens
            wrong = [ask.index for ask, said in zip(known, answers, strict=True) if said != expected[ask.index]]
            if wrong:
                found.wrong[name] = [f"float32 tokens of requests {wrong} are not those of PEFT with each alone"]
            print(f"float32 tokens as PEFT's alone: {name}: {len(known) - len(wrong)} of {len(known)}", flush=True)


def _searched(setup: Setup, material: Material, models: Models, found: Compared) -> dict[str, Arm]:
    """Each peer with the settings that are its best, for answers of half the length; shorter ones are mostly prompt."""
    short = replace(setup, output_tokens=max(2, setup.output_tokens // 2))
    arms: dict[str, Arm] = {}
    for name, kind in PEERS.items():
        case = MIXED if knows(name, MIXED) else "base"
        asks = asks_of(short, material, adapters_of(case, setup.concurrency), (SEARCH,))
        best, tried = best_settings(kind, models, asks, setup.concurrency)
        found.searched[name], found.chosen[name] = tried, str(best)
        print(f"search, {name}: {best}; " + "; ".join(f"{each} {rate:.0f} tok/s" for each, rate in tried.items()))
        arms[name] = PeerArm(kind, models, best)
    return arms


def _short(setup: Setup) -> Setup:
    return replace(setup, output_tokens=max(2, setup.output_tokens // 4))


def _round(
    setup: Setup, material: Material, arms: Mapping[str, Arm], referee: Referee, number: int, found: Compared
) -> None:
    """All arms in turn, case by case; round 0 warms up, with less of it. A sample of all answers is scored."""
    if not number:
        setup = replace(_short(setup), requests=min(setup.requests, setup.concurrency))
    for place, case in enumerate(CASES):
        asks = asks_of(setup, material, adapters_of(case, setup.requests), (ROUND, number, place))
        for name, arm in arms.items():
            if name in found.wrong or not knows(name, case):
                continue
            try:
                answered = arm.answer(asks)
            except RuntimeError as error:
                found.wrong[name] = [f"{case}, round {number}: {error}"]
                continue
            wrong = _wrong(asks, answered.tokens, referee, found.worst_gap, name)
            if wrong:
                found.wrong[name] = [f"{case}, round {number}: {wrong}"]
            elif number:
                found.rates.setdefault(name, {}).setdefault(case, []).append(answered.tokens_per_s)
                found.bound.setdefault(name, []).extend(answered.bound)
                print(f"round {number}, {case}, {name}: {answered.tokens_per_s:.0f} tok/s", flush=True)


def _wrong(
    asks: Sequence[Ask], answers: Sequence[tuple[int, ...]], referee: Referee, worst: dict[str, float], arm: str
) -> str | None:
    lengths = [ask.index for ask, said in zip(asks, answers, strict=True) if len(said) != ask.max_tokens]
    if lengths:
        return f"requests {lengths} have other than {asks[0].max_tokens} tokens"
    for ask, said in list(zip(asks, answers, strict=True))[:SCORED]:
        gap = max(referee.gaps(ask, said))
        worst[arm] = max(gap, worst.get(arm, 0.0))
        if gap > TOLERANCE:
            return f"request {ask.index}: a token is {gap:.3g} nats from the likeliest in float32"
        other = replace(ask, adapter=0 if ask.adapter is None else None)
        if max(referee.gaps(other, said)) <= TOLERANCE:
            return f"request {ask.index}: its answer passes as well under other weights"
    return None


def report(found: Compared) -> str:
    """A table of medians (least to most), and ours over each."""
    lines = ["", f"| tokens/s, median (least to most); {OURS} ÷ it | " + " | ".join(CASES) + " |", "|---" * 4 + "|"]
    for name in dict.fromkeys([*found.rates, *found.wrong]):
        if name in found.wrong:
            lines.append(f"| {name} | NO SCORE, the output is wrong: {'; '.join(found.wrong[name])} | | |")
            continue
        cells = [_cell(found, name, case) for case in CASES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"CLIENT-BOUND, {name}: {each}" for name, bound in found.bound.items() for each in dict.fromkeys(bound)]
    gaps = ", ".join(f"{name} {gap:.3f}" for name, gap in found.worst_gap.items())
    return "\n".join([*lines, f"worst gaps to the likeliest in float32, nats ({TOLERANCE} allowed): {gaps}"])


def _cell(found: Compared, name: str, case: str) -> str:
    rates = found.rates[name].get(case)
    if rates is None:
        return "–"
    ratios = found.ratio(OURS, case, name)
    over = "" if ratios is None or name == OURS else f"; {statistics.median(ratios):.2f} ×"
    return f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}){over}"


def _parsed(argv: Sequence[str] | None) -> tuple[Setup, Path | None, Path | None, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(CONFIGS), default="125m")
    for name in ("concurrency", "requests", "prompt-tokens", "output-tokens", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setup(), name.replace("-", "_")))
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write model/ and adapters/ there, and end")
    add_urls(parser)
    parser.add_argument("--servers-only", action="store_true", help="ours and those by URL: a short run")
    parser.add_argument("--out", type=Path, help="write all of it there, as JSON")
    given = parser.parse_args(argv)
    sizes = {name: value for name, value in vars(given).items() if name in Setup.__dataclass_fields__}
    return with_urls(parser, Setup(**sizes), given), given.write, given.folder, given.out


def add_urls(parser: argparse.ArgumentParser) -> None:
    """Options that name servers which were started on what --write has written."""
    parser.add_argument("--folder", type=Path, help="what --write has written, for servers that were started on it")
    parser.add_argument("--vllm", metavar="URL", help="its models: base, lora-0, lora-1, …")
    parser.add_argument("--llama-cpp", metavar="URL", help="its adapters by number, in the field `lora`")


def with_urls(parser: argparse.ArgumentParser, setup: Setup, given: argparse.Namespace) -> Setup:
    urls = tuple((name, url) for name, url in (("vllm", given.vllm), ("llama.cpp", given.llama_cpp)) if url)
    if urls and given.folder is None:
        parser.error("servers by URL need --folder: what they were started on")
    return replace(setup, urls=urls)


if __name__ == "__main__":
    sys.exit(main())
