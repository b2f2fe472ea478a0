"""What makes room: the engine's order of eviction against others, by the seconds that bringing things back takes.

    PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.eviction

The engine's own ledger, prefix cache and eviction order, without a model, under requests in a closed loop: see
`eviction_rig`. All policies meet the same requests. A figure counts when the ledger's accounting is whole at the end
and every policy was asked for as many prompt tokens.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import accumulate
from random import Random

from lorasrv.memory.eviction import GreedyDual, Policy
from lorasrv_bench.eviction_rig import Ask, Hardware, Outcome, Rig
from lorasrv_bench.figures import commit
from lorasrv_bench.policies import LeastFrequentlyUsed, LeastRecentlyUsed
from lorasrv_bench.workloads import parse_workload

RANKS = "ranks=S2"
WORKLOADS = (
    f"slora:n=2000,alpha=1,{RANKS}",
    f"slora:n=2000,alpha=0.3,{RANKS}",
    f"slora:n=2000,alpha=0.1,{RANKS}",
    f"zipf:n=2000,s=1,churn=0.05,rate=25,{RANKS}",
    f"zipf:n=200,s=1,prefix_tokens=1024,{RANKS}",
    f"zipf:n=1000,s=1,churn=0.05,rate=25,prefix_tokens=1024,{RANKS}",
    f"cold_storm:n=600,hot=40,rate=25,at=120,prefix_tokens=1024,{RANKS}",
    "chats:n=200,s=1",
)
POLICIES: Mapping[str, tuple[Policy, bool]] = {
    "drop when idle": (LeastRecentlyUsed(), True),
    "LRU": (LeastRecentlyUsed(), False),
    "LFU": (LeastFrequentlyUsed(), False),
    "the engine's": (GreedyDual(), False),
}
CHAT_ADAPTERS, OPEN_CHATS, TURN, REPLY, LONGEST_CHAT = 200, 150, (64, 512), (8, 256), 3500


class WrongAccounting(Exception):
    """The runs that are to be compared did not see the same."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000, help="of each workload; a third of them warms up")
    parser.add_argument("--pages", type=int, default=Hardware.num_pages, help="of the pool, 2 MiB each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workload", action="append", help="instead of the usual ones; may be given again")
    options = parser.parse_args(argv)
    hardware = Hardware(num_pages=options.pages)
    print(f"commit {commit()}, seed {options.seed}, {options.requests} requests a workload, a third of them unmeasured")
    print(f"accounting alone, no device; taken costs and sizes: {hardware}")
    print(f"\nSeconds are for a thousand requests. Chats: {OPEN_CHATS} open, a turn {TURN} tokens, a reply {REPLY}.\n")
    print(
        "| workload | policy | brought back s | copies s | reads s | prefill s | adapter hits | prompt tokens saved |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for text in options.workload or WORKLOADS:
        for line in compare(text, options.requests, options.seed, hardware):
            print(line, flush=True)
    return 0


def compare(text: str, num_requests: int, seed: int, hardware: Hardware) -> list[str]:
    """A row of the table for each policy. Raises WrongAccounting."""
    asks = chats(num_requests, seed) if text.startswith("chats") else asks_of(text, num_requests, seed)
    outcomes: dict[str, Outcome] = {}
    for name, (policy, drop_idle) in POLICIES.items():
        outcomes[name] = Rig(policy, hardware, drop_idle=drop_idle).run(asks, warm_up=len(asks) // 3)
    if len({(each.requests, each.prompt_tokens) for each in outcomes.values()}) != 1:
        raise WrongAccounting(f"{text}: not all policies were asked for the same: {outcomes}")
    return [_row(text, name, outcome, hardware) for name, outcome in outcomes.items()]


def asks_of(text: str, num_requests: int, seed: int) -> list[Ask]:
    """Prompts begin alike where the workload says so; all else of them is their own."""
    asks: list[Ask] = []
    for number, each in enumerate(parse_workload(f"{text},requests={num_requests}", seed).arrivals):
        prompt = ((_own(number), each.prompt_tokens - each.prefix_tokens),)
        if each.prefix is not None:
            prompt = ((each.prefix, each.prefix_tokens), *prompt)
        asks.append(Ask(adapter=each.adapter, prompt=prompt, output_tokens=each.output_tokens))
    return asks


def chats(num_requests: int, seed: int) -> list[Ask]:
    """Turns of conversations, each with all before it as its prompt. Who goes on is drawn, and may stop at any turn."""
    random = Random(seed)
    popularity = list(accumulate(1 / place for place in range(1, CHAT_ADAPTERS + 1)))
    open_chats: list[tuple[int, list[tuple[int, int]]]] = []
    asks: list[Ask] = []
    while len(asks) < num_requests:
        if len(open_chats) < OPEN_CHATS:
            adapter = random.choices(range(CHAT_ADAPTERS), cum_weights=popularity)[0]
            open_chats.append((adapter, []))
        adapter, turns = chat = random.choice(open_chats)
        turns.append((_own(len(asks)), random.randrange(*TURN)))
        asks.append(Ask(adapter=adapter, prompt=tuple(turns), output_tokens=random.randrange(*REPLY)))
        if sum(length for _, length in turns) > LONGEST_CHAT or random.random() < 0.15:
            open_chats.remove(chat)
    return asks


def _own(number: int) -> int:
    """A name of tokens that is no prefix's."""
    return (1 << 24) + number


def _row(text: str, name: str, outcome: Outcome, hardware: Hardware) -> str:
    seconds = (outcome.seconds(hardware), outcome.copies_s(hardware), outcome.reads_s(hardware))
    shares = (outcome.adapter_hits / outcome.adapter_requests, outcome.cached_tokens / outcome.prompt_tokens)
    cells = [*(f"{each:.2f}" for each in (*seconds, outcome.prefill_s(hardware))), *(f"{each:.1%}" for each in shares)]
    return f"| {text} | {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
