"""What a launcher chooses at compile time. A kernel module lists all it can choose in `variants()`, for `gate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs

# "*bf16:16" points to bf16 and is divisible by 16, as is the number "i32:16"; "none" is None.
ArgumentType = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with all that a launcher chooses at compile time.

    `arguments` are the others, as the launcher passes them: an address or a number that is always divisible by 16 says
    so, and the vectors in which memory is read follow from that.
    """

    kernel: Any  # what triton.jit made
    arguments: Mapping[str, ArgumentType]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool  # a product of bf16 or fp16 is among what it computes
    since: int = 80  # the least compute capability that it is chosen for
    max_registers: int | None = None  # None leaves it to the assembler, which may spill a little to fit more programs

    @property
    def options(self) -> dict[str, int]:
        """Triton's, at compile time."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    @property
    def name(self) -> str:
        values = ",".join(f"{name}={value}" for name, value in self.constexprs.items())
        elements = "/".join(sorted({str(t)[1:].split(":")[0] for t in self.arguments.values() if str(t)[0] == "*"}))
        return f"{self.kernel.__name__}[{elements}]({values}) w{self.num_warps} s{self.num_stages}"

    def launch(self, num_programs: int, *arguments: object) -> None:
        """`arguments` in the kernel's order, as its first parameters."""
        self.kernel[(num_programs,)](*arguments, **self.constexprs, **self.options)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on a CPU: TRITON_INTERPRET=1 when it was imported."""
    return knobs.runtime.interpret


def num_programs(num_items: int, device: torch.device) -> int:
    """Programs of a persistent kernel that has at most `num_items` to do."""
    if device.type != "cuda":
        return max(1, min(num_items, 3))
    return max(1, min(num_items, 4 * torch.cuda.get_device_properties(device).multi_processor_count))
