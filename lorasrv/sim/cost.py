"""How long a step takes: what it must read and compute at the least, over what the hardware reaches, and overheads.

A phase takes the longer of its bytes over the bandwidth and its operations over the matrix rate: the linear modules,
the adapters, and attention. Between them stand the latencies of the kernels that wait for each other. Activations,
which are small beside the rest, count nothing. (Roofline: Williams et al., CACM 2009.)

Where the hardware table has steps that were measured, a step takes what they took.
"""

from lorasrv.errors import ConfigurationError
from lorasrv.model.shape import ModelShape
from lorasrv.sim.hardware import Hardware
from lorasrv.sim.work import StepWork

# Kernels of a layer that wait for each other: qkv, rope and KV write, attention, the merge of its splits, o, add and
# norm, gate_up, silu, down, add and norm; with adapters one more, a shrink that outlasts the product beside it.
LAYER_KERNELS = 10
LORA_KERNELS = 1
# Embedding, first norm, final norm, logits, and a few of the sampler.
STEP_KERNELS = 8


class CostModel:
    """Seconds of a model on a machine; `itemsize` is that of weights and KV, in bytes."""

    def __init__(self, shape: ModelShape, hardware: Hardware, itemsize: int) -> None:
        """Raises ConfigurationError for measured steps of another model."""
        if hardware.steps is not None and hardware.steps.linear_params != shape.linear_params:
            measured = f"{hardware.name}: its steps were measured on a model of {hardware.steps.linear_params}"
            raise ConfigurationError(f"hardware {measured} linear parameters; {shape.name} has {shape.linear_params}")
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
        if self.hardware.steps is not None:
            return self.hardware.steps.step_s(work)
        kernels = self.shape.num_layers * (LAYER_KERNELS + LORA_KERNELS * bool(work.num_adapters)) + STEP_KERNELS
        phases = self.linear_s(work) + self.adapters_s(work) + self.attention_s(work)
        return phases + kernels * self.hardware.kernel_s

    def host_s(self, num_rows: int) -> float:
        """What the engine's own code takes for a step; nothing beyond measured steps, which it is part of."""
        if self.hardware.steps is not None:
            return 0.0
        return self.hardware.step_s + num_rows * self.hardware.row_s

    def copy_s(self, num_bytes: int) -> float:
        """From host memory to the device."""
        return num_bytes / self.hardware.copy_bytes_per_s
