"""How long a step takes: what it must read and compute at the least, over what the hardware reaches, and overheads.

A phase takes the longer of its bytes over the bandwidth and its operations over the matrix rate: the linear modules,
the adapters, and attention. Between them stand the latencies of the kernels that wait for each other. Activations,
which are small beside the rest, count nothing. (Roofline: Williams et al., CACM 2009.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul

from lorasrv.engine.batch import ChunkInput
from lorasrv.model.shape import ModelShape
from lorasrv.sim.hardware import Hardware

# Kernels of a layer that wait for each other: qkv, rope and KV write, attention, the merge of its splits, o, add and
# norm, gate_up, silu, down, add and norm; with adapters one more, a shrink that outlasts the product beside it.
LAYER_KERNELS = 10
LORA_KERNELS = 1
# Embedding, first norm, final norm, logits, and a few of the sampler.
STEP_KERNELS = 8


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


class CostModel:
    """Seconds of a model on a machine; `itemsize` is that of weights and KV, in bytes."""

    def __init__(self, shape: ModelShape, hardware: Hardware, itemsize: int) -> None:
        self.shape = shape
        self.hardware = hardware
        self.itemsize = itemsize

    def linear_s(self, work: StepWork) -> float:
        shape, hardware = self.shape, self.hardware
        read = self.itemsize * (shape.linear_params + shape.head_params)
        products = shape.linear_params * work.num_tokens + shape.head_params * work.num_rows
        return max(read / hardware.read_bytes_per_s, 2 * products / hardware.flops_per_s)

    def adapters_s(self, work: StepWork) -> float:
        hardware = self.hardware
        read_s = self.itemsize * work.adapter_params / hardware.adapter_bytes_per_s
        return max(read_s, 2 * work.adapter_products / hardware.flops_per_s) + work.num_adapters * hardware.adapter_s

    def attention_s(self, work: StepWork) -> float:
        shape, hardware = self.shape, self.hardware
        read = self.itemsize * shape.kv_elems_per_token * work.context_tokens
        flops = 4 * shape.num_layers * shape.num_heads * shape.head_dim * work.pairs
        return max(read / hardware.kv_bytes_per_s, flops / hardware.flops_per_s)

    def forward_s(self, work: StepWork) -> float:
        """A step on the device."""
        kernels = self.shape.num_layers * (LAYER_KERNELS + LORA_KERNELS * bool(work.num_adapters)) + STEP_KERNELS
        phases = self.linear_s(work) + self.adapters_s(work) + self.attention_s(work)
        return phases + kernels * self.hardware.kernel_s

    def host_s(self, num_rows: int) -> float:
        """What the engine's own code takes for a step."""
        return self.hardware.step_s + num_rows * self.hardware.row_s

    def copy_s(self, num_bytes: int) -> float:
        """From host memory to the device."""
        return num_bytes / self.hardware.copy_bytes_per_s
