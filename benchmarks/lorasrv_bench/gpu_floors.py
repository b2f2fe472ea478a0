"""What a piece of work must move and compute at the least, and how long that takes at measured ceilings.

Every input is read once and every output written once; what stays between two kernels of one operation (shrink's
partial sums, a softmax) counts nothing. All bytes are taken at the read bandwidth, the higher one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorasrv_bench.gpu_models import ModelShape


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Bytes per second and floating-point operations per second that the device reached in this run."""

    read: float
    copy: float  # bytes read plus bytes written
    to_device: float  # from pinned memory; from host memory where there is no device
    matmul: float

    @staticmethod
    def of(values: Mapping[str, float]) -> "Ceilings":
        return Ceilings(
            read=values["read"], copy=values["copy"], to_device=values["to_device"], matmul=values["matmul"]
        )


@dataclass(frozen=True, kw_only=True)
class Floor:
    num_bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.read, self.flops / ceilings.matmul)

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(num_bytes=self.num_bytes + other.num_bytes, flops=self.flops + other.flops)


def sgmv_floor(
    in_features: int,
    out_features: Sequence[int],  # of each module that shares the input
    ranks: Sequence[int],  # of each adapter
    rows: Sequence[int],  # of each adapter
    itemsize: int,
) -> Floor:
    """A shrink and an expand that adds to the modules' outputs, which are read and written."""
    assert len(ranks) == len(rows), (ranks, rows)
    per_rank = len(out_features) * in_features + sum(out_features)
    tokens = sum(rows)
    weights = per_rank * sum(rank for rank, num_rows in zip(ranks, rows, strict=True) if num_rows)
    elems = tokens * in_features + weights + 2 * tokens * sum(out_features)
    work = sum(rank * num_rows for rank, num_rows in zip(ranks, rows, strict=True))
    return Floor(num_bytes=itemsize * elems, flops=2 * per_rank * work)


def attention_floor(
    model: ModelShape,
    rows: Sequence[int],  # of each sequence
    contexts: Sequence[int],  # those rows included
    itemsize: int,
) -> Floor:
    """One layer: every key and value read once, queries read, results written; two products over what a row sees."""
    tokens, query = sum(rows), model.num_heads * model.head_dim
    kv = 2 * sum(contexts) * model.num_kv_heads * model.head_dim
    pairs = sum(seen_pairs(num_rows, context) for num_rows, context in zip(rows, contexts, strict=True))
    return Floor(num_bytes=itemsize * (kv + 2 * tokens * query), flops=4 * pairs * query)


def seen_pairs(rows: int, context: int) -> int:
    """Row i of the last `rows` of `context` positions sees context - rows + i + 1 of them."""
    return rows * (context - rows) + rows * (rows + 1) // 2


def step_floor(
    model: ModelShape,
    rows: Sequence[int],  # of each sequence
    contexts: Sequence[int],  # those rows included
    ranks: Sequence[int],  # of the step's distinct adapters, on all modules
    rows_by_rank: Mapping[int, int],  # rows of adapters of each rank
    itemsize: int,
) -> Floor:
    """A whole step: weights, adapters and contexts read once, logits of a row per sequence. Activations, which are
    small beside them, count nothing."""
    attention = attention_floor(model, rows, contexts, itemsize)
    params = model.linear_params + model.head_params + sum(model.adapter_params(rank) for rank in ranks)
    lora = sum(2 * model.adapter_params(rank) * num_rows for rank, num_rows in rows_by_rank.items())
    dense = 2 * (model.linear_params * sum(rows) + model.head_params * len(rows))
    kv_bytes = 2 * itemsize * sum(contexts) * model.num_kv_heads * model.head_dim
    return Floor(
        num_bytes=itemsize * params + model.num_layers * kv_bytes,
        flops=dense + lora + model.num_layers * attention.flops,
    )
