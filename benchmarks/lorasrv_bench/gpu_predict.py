"""What the H200 rows should come to by bytes, operations and launches alone: predicted, unmeasured.

Ceilings are leads, not readings: 4.3 TB/s read, 700 TFLOP/s of bf16, 50 GB/s from pinned memory. A kernel that waits
for the one before costs a launch's latency inside a graph, 1.2 to 2.5 us, in which nothing streams. So a step's time is
the floor of its bytes (or of its operations) plus the latency of every kernel that stands in the chain. Products and
attention are taken to reach the ceilings themselves, and sampling to cost its launches, which is optimistic.
"""

from dataclasses import dataclass

from lorasrv_bench.gpu_floors import Ceilings, Floor, step_floor
from lorasrv_bench.gpu_models import LLAMA_8B, ModelShape
from lorasrv_bench.gpu_pool import DTYPE

ASSUMED = Ceilings(read=4.3e12, copy=4.3e12, to_device=50e9, matmul=700e12)
LAUNCH_S = (1.2e-6, 2.5e-6)
# Kernels of a layer that wait for each other, without adapters: qkv, rope and KV write, attention, the merge of its
# splits, o, add and norm, gate_up, silu, down, add and norm.
LAYER_KERNELS = 10
# With adapters, shrink runs beside the base product and expand inside the kernel that follows anyway: what is added to
# the chain is at most a shrink that takes longer than the product beside it, here one in a layer.
LORA_KERNELS = 1
# Embedding, first norm, final norm, logits, and a few of the sampler.
STEP_KERNELS = 8


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Seconds at the two assumed launch latencies."""

    what: str
    floor_s: float
    low_s: float
    high_s: float


def decode_step(model: ModelShape, batch: int, context: int, num_adapters: int, rank: int) -> Predicted:
    floor = step_floor(
        model,
        [1] * batch,
        [context] * batch,
        [rank] * num_adapters,
        {rank: batch if num_adapters else 0},
        DTYPE.itemsize,
    )
    kernels = model.num_layers * (LAYER_KERNELS + LORA_KERNELS * bool(num_adapters)) + STEP_KERNELS
    return _predicted(f"decode step, batch {batch}, {num_adapters} adapters r{rank}", floor, kernels)


def prefill(model: ModelShape, tokens: int, rank: int) -> Predicted:
    """Products at the assumed rate, and between them the kernels that move activations, at the assumed bandwidth."""
    ranks, rows = ([rank], {rank: tokens}) if rank else ([], {})
    floor = step_floor(model, [tokens], [tokens], ranks, rows, DTYPE.itemsize)
    kernels = model.num_layers * (LAYER_KERNELS + LORA_KERNELS * bool(rank)) + STEP_KERNELS
    moved_s = activation_bytes(model, tokens, lora=bool(rank)) / ASSUMED.read
    return _predicted(f"prefill of {tokens} tokens" + (f", r{rank}" if rank else ""), floor, kernels, moved_s)


def activation_bytes(model: ModelShape, tokens: int, *, lora: bool) -> int:
    """Read and written by all layers' kernels between the products: two of add and norm (four rows of hidden each),
    rope (q, k, v in and out), silu (three rows of intermediate). Shrinks read every product's input once more."""
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = 8 * model.hidden + 2 * qkv + 3 * model.intermediate
    if lora:
        per_token += 2 * model.hidden + model.num_heads * model.head_dim + model.intermediate
    return DTYPE.itemsize * model.num_layers * tokens * per_token


def adapter_copy(model: ModelShape, rank: int) -> Predicted:
    seconds = DTYPE.itemsize * model.adapter_params(rank) / ASSUMED.to_device
    return Predicted(what=f"host to device, an adapter r{rank}", floor_s=seconds, low_s=seconds, high_s=seconds)


def h200_rows() -> list[Predicted]:
    model = LLAMA_8B
    steps = [(0, 1), (0, 16), (0, 64), (1, 1), (1, 64), (64, 64), (64, 256), (256, 256)]
    return [
        *(decode_step(model, batch, 1024, adapters, 16) for adapters, batch in steps),
        *(prefill(model, 8192, rank) for rank in (0, 16, 64)),
        adapter_copy(model, 16),
    ]


def _predicted(what: str, floor: Floor, kernels: int, moved_s: float = 0.0) -> Predicted:
    seconds = floor.seconds(ASSUMED)
    low, high = (seconds + moved_s + kernels * launch for launch in LAUNCH_S)
    return Predicted(what=what, floor_s=seconds, low_s=low, high_s=high)


def table() -> str:
    """Markdown; says that nothing in it is measured."""
    lines = [
        "Predicted, unmeasured: 8B in bf16 at 1k context, at 4.3 TB/s, 700 TFLOP/s, 50 GB/s from pinned memory and",
        f"{LAUNCH_S[0] * 1e6} to {LAUNCH_S[1] * 1e6} us for each kernel that waits for the one before it in a graph",
        f"({LAYER_KERNELS} of a layer, {LORA_KERNELS} more with adapters). Products are taken to reach those ceilings,",
        "which is optimistic.",
        "",
        "| what | floor ms | predicted ms | over the floor |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row.what} | {row.floor_s * 1e3:.2f} | {row.low_s * 1e3:.2f}–{row.high_s * 1e3:.2f} "
        f"| {row.low_s / row.floor_s:.2f}–{row.high_s / row.floor_s:.2f} |"
        for row in h200_rows()
    ]
    return "\n".join(lines)
