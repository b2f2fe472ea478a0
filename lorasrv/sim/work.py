"""What a step computes, in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul

from lorasrv.engine.batch import ChunkInput


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What a step computes, summed over its sequences.

    `context_tokens` are those whose KV is read, the step's own included; `pairs` the (query, key) products; the adapter
    fields are of the distinct adapters: their weights, and `adapter_products` weights times their rows.
    """

    num_rows: int
    num_tokens: int
    context_tokens: int
    pairs: int
    num_adapters: int = 0
    adapter_params: int = 0
    adapter_products: int = 0


def step_work(chunks: Sequence[ChunkInput], params: Mapping[int, int]) -> StepWork:
    """Of a step's chunks; `params` are resident adapters' weights, by directory. Called for every simulated step."""
    num_tokens, context, pairs = 0, 0, 0
    rows: dict[int, int] = {}
    for token_ids, start, _, adapter, _, _ in chunks:
        num = len(token_ids) or 1
        end = start + num
        num_tokens += num
        context += end
        # Row i of the chunk sees start + i + 1 positions.
        pairs += end if num == 1 else num * start + num * (num + 1) // 2
        if adapter is not None:
            directory = adapter.directory
            rows[directory] = rows.get(directory, 0) + num
    sizes = [params[directory] for directory in rows]
    return StepWork(
        num_rows=len(chunks),
        num_tokens=num_tokens,
        context_tokens=context,
        pairs=pairs,
        num_adapters=len(sizes),
        adapter_params=sum(sizes),
        adapter_products=sum(map(mul, sizes, rows.values())),
    )
