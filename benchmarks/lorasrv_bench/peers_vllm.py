"""vLLM's Triton LoRA kernels, called as its Punica wrapper calls them; see docs/gpu-benchmarks.md."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from lorasrv_bench.gpu_peers import Checkout, PeerLoad

_OPS = "vllm.lora.ops.triton_ops"


class VllmPeer:
    """`lora_shrink` and `lora_expand` with the metadata of `LoRAKernelMeta`, made for just the adapters of the load."""

    name = "vllm"

    def __init__(self, folder: Path) -> None:
        checkout = Checkout("vllm", _package(folder), _stubs())
        self._shrink = checkout.load(f"{_OPS}.lora_shrink_op").lora_shrink
        self._expand = checkout.load(f"{_OPS}.lora_expand_op").lora_expand
        self._meta = checkout.load(f"{_OPS}.lora_kernel_metadata").LoRAKernelMeta
        # What they remember of weights, by address: freed memory comes back with other shapes.
        utils = checkout.load(f"{_OPS}.utils")
        self._remembered = (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT)

    def prepare(self, loads: Sequence[PeerLoad]) -> list[Callable[[], None]]:
        for found in self._remembered:
            found.clear()
        first = loads[0]
        device, num_tokens, num_adapters = first.x.device, first.x.shape[0], len(first.rows)
        mapping = torch.arange(num_adapters, dtype=torch.int32).repeat_interleave(torch.tensor(first.rows))
        meta = self._meta.make(num_adapters, num_tokens, device)
        meta.prepare_tensors(mapping.to(device))
        args = meta.meta_args(num_tokens, True)
        # `add_lora_linear` makes one for every call; the shrink zeroes it.
        h = torch.empty(len(first.a), num_tokens, first.rank, dtype=torch.float32, device=device)

        def call(load: PeerLoad) -> Callable[[], None]:
            a, b = list(load.a), list(load.b)

            def run() -> None:
                self._shrink(load.x, a, h, *args, 1.0)
                self._expand(h, b, load.out, *args, offset_start=0, add_inputs=True)

            return run

        return [call(load) for load in loads]


def _package(folder: Path) -> Path:
    """`folder` holds a checkout named vllm."""
    return folder / "vllm" / "vllm"


def _no_custom_op(*_: object, **__: object) -> None:
    """Their modules then offer the plain functions: registering with torch's dispatcher needs their platform layer."""
    raise AttributeError("plain functions are wanted")


def _to_device(data: object, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.as_tensor(data, dtype=dtype).to(device)


class _Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def has_device_capability(self, capability: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= capability


class _Silent:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _stubs() -> dict[str, dict[str, object]]:
    """Of what the kernels' modules import, what they use; settings have their defaults."""
    import triton
    import triton.language as tl

    settings = SimpleNamespace(
        VLLM_BATCH_INVARIANT=False,
        VLLM_TUNED_CONFIG_FOLDER=None,
        VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
    )
    return {
        "vllm.envs": vars(settings),
        "vllm.logger": {"init_logger": lambda _: _Silent()},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"triton": triton, "tl": tl, "HAS_TRITON": True},
        "vllm.utils": {},
        "vllm.utils.torch_utils": {"direct_register_custom_op": _no_custom_op, "async_tensor_h2d": _to_device},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2, "cdiv": triton.cdiv},
    }
