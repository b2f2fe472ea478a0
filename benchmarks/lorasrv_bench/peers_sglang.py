"""SGLang's Triton LoRA kernels, called as its three back ends call them; see docs/gpu-benchmarks.md."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lorasrv_bench.gpu_peers import Checkout, PeerLoad

# Where the kernels have lain, the newest first.
_FOLDERS = ("sglang.kernels.ops.lora.dense", "sglang.kernels.ops.gemm", "sglang.srt.lora.triton_ops")


class _SglangPeer:
    """What the back ends share: stacked weights and a `LoRABatchInfo`."""

    def __init__(self, folder: Path) -> None:
        self._checkout = Checkout("sglang", folder / "sglang" / "python" / "sglang", _stubs())
        self._batch_info = self._checkout.load("sglang.srt.lora.utils").LoRABatchInfo

    def _kernels(self, name: str) -> ModuleType:
        return self._checkout.first([f"{folder}.{name}" for folder in _FOLDERS])

    def _info(self, load: PeerLoad, lengths: Sequence[int], adapters: Sequence[int], **values: object) -> object:
        """Segments of these lengths, each of an adapter."""
        device, num_adapters = load.x.device, len(load.rows)
        indptr = torch.tensor([0, *lengths]).cumsum(0)
        known: dict[str, object] = {
            "use_cuda_graph": True,
            "bs": len(lengths),
            "num_segments": len(lengths),
            "seg_indptr": _ints(indptr, device),
            "weight_indices": _ints(adapters, device),
            "lora_ranks": _ints([load.rank] * num_adapters, device),
            "scalings": torch.ones(num_adapters, device=device),
            "seg_lens": _ints(lengths, device),
            "permutation": None,
        }
        names = {field.name for field in fields(self._batch_info)}
        return self._batch_info(**{name: value for name, value in (known | values).items() if name in names})


class SegmentedPeer(_SglangPeer):
    """The back end `triton`: a segment for each adapter's rows, a kernel of its own for q/k/v and for gate/up."""

    name = "sglang-v1"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._shrink = self._kernels("sgemm_lora_a").sgemm_lora_a_fwd
        self._expand = self._kernels("sgemm_lora_b").sgemm_lora_b_fwd
        self._expand_qkv = self._kernels("qkv_lora_b").qkv_lora_b_fwd
        self._expand_gate_up = self._kernels("gate_up_lora_b").gate_up_lora_b_fwd

    def prepare(self, loads: Sequence[PeerLoad]) -> list[Callable[[], None]]:
        first = loads[0]
        info = self._info(first, first.rows, range(len(first.rows)), max_len=max(first.rows))
        num_modules, offsets = len(first.a), _ints(_offsets(first), first.x.device)

        def call(load: PeerLoad) -> Callable[[], None]:
            a, b = torch.cat(load.a, 1), torch.cat(load.b, 1)

            def run() -> None:
                h = self._shrink(load.x, a, info, stack_num=num_modules)
                if num_modules == 3:
                    self._expand_qkv(h, b, info, offsets, max(load.out_features), load.out)
                elif num_modules == 2:
                    self._expand_gate_up(h, b, info, load.out_features[0], load.out)
                else:
                    self._expand(h, b, info, load.out)

            return run

        return [call(load) for load in loads]


class ChunkedPeer(_SglangPeer):
    """The back end `csgmv`: adapters' rows in chunks, as long as its rule says for the number of tokens, and at most
    `max_chunk`, a setting of its servers (by default 16)."""

    def __init__(self, folder: Path, max_chunk: int) -> None:
        super().__init__(folder)
        self.name = f"sglang-csgmv-{max_chunk}"
        self._max_chunk = max_chunk
        self._shrink = self._kernels("chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
        self._expand = self._kernels("chunked_sgmv_expand").chunked_sgmv_lora_expand_forward

    def prepare(self, loads: Sequence[PeerLoad]) -> list[Callable[[], None]]:
        first = loads[0]
        device, num_tokens = first.x.device, first.x.shape[0]
        # ChunkedSgmvLoRABackend._determine_chunk_size_for_tokens
        chunk = min(self._max_chunk, 128 if num_tokens >= 256 else 32 if num_tokens >= 64 else 16)
        pieces = [(n, min(chunk, rows - at)) for n, rows in enumerate(first.rows) for at in range(0, rows, chunk)]
        info = self._info(
            first,
            [length for _, length in pieces],
            [adapter for adapter, _ in pieces],
            max_len=chunk,
            permutation=_ints(range(num_tokens), device),
            seg_lens=None,
        )
        offsets = _ints(_offsets(first), device)
        # Newer versions know the offsets on the host too.
        extra: dict[str, object] = {}
        if "slice_offsets_cpu" in inspect.signature(self._expand).parameters:
            extra = {"slice_offsets_cpu": torch.tensor(_offsets(first))}

        def call(load: PeerLoad) -> Callable[[], None]:
            a, b = torch.cat(load.a, 1), torch.cat(load.b, 1)

            def run() -> None:
                h = self._shrink(x=load.x, weights=a, batch_info=info, num_slices=len(load.a))
                self._expand(
                    x=h,
                    weights=b,
                    batch_info=info,
                    slice_offsets=offsets,
                    max_slice_size=max(load.out_features),
                    base_output=load.out,
                    **extra,
                )

            return run

        return [call(load) for load in loads]


class PlannedPeer(_SglangPeer):
    """The back end `triton_v2`: plans by shape, from its tables. Its routes, built once a step, are not in the time."""

    name = "sglang-v2"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._runners = self._checkout.load("sglang.srt.lora.dense.runner")
        self._plan = self._checkout.load("sglang.srt.lora.dense.plan")
        self._workspace = self._checkout.load("sglang.srt.lora.workspace").LoraWorkspace
        self._phase = self._checkout.load("sglang.srt.lora.utils").Phase

    def prepare(self, loads: Sequence[PeerLoad]) -> list[Callable[[], None]]:
        first = loads[0]
        device, num_tokens, num_adapters = first.x.device, first.x.shape[0], len(first.rows)
        runner = self._runners.DenseLoraRunner(self._workspace(), max_loras=num_adapters, device=device)
        slots = torch.arange(num_adapters).repeat_interleave(torch.tensor(first.rows))
        runner.begin_batch(
            token_slots=_ints(slots, device),
            lora_ranks=_ints([first.rank] * num_adapters, device),
            scalings=torch.ones(num_adapters, device=device),
            num_tokens=num_tokens,
            phase=self._phase.PREFILL if num_tokens > 256 else self._phase.DECODE,
            graph_mode=True,
        )
        offsets, num_in = tuple(_offsets(first)), first.x.shape[1]
        linear = self._plan.DenseLoraKind.LINEAR
        plan = runner.plan_for(linear, first.rank, num_in, offsets[-1], num_tokens=num_tokens)

        def call(load: PeerLoad) -> Callable[[], None]:
            a, b = torch.cat(load.a, 1), torch.cat(load.b, 1)
            return lambda: runner.apply(load.x, lambda: load.out, plan, a=a, b=b, offsets=offsets)

        return [call(load) for load in loads]


def _offsets(load: PeerLoad) -> list[int]:
    """Where each module's columns begin in the output, and where the last one's end."""
    offsets = [0]
    for width in load.out_features:
        offsets.append(offsets[-1] + width)
    return offsets


def _ints(values: Sequence[int] | range | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(values if isinstance(values, Tensor) else list(values)).to(device, torch.int32)


def _uncached(key: object = None) -> Callable[[object], object]:
    """Their launch cache saves time of the host, which a replayed graph does not have."""
    return lambda kernel: kernel


def _device_name(device: int = 0) -> str:
    """Names their tables of tuned blocks."""
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"


def _stubs() -> dict[str, dict[str, object]]:
    """Of what the kernels' modules import, what they use or name in annotations."""
    return {
        "sglang.srt.utils": {"cached_triton_kernel": _uncached, "get_device_name": _device_name},
        "sglang.srt.utils.hf_transformers_utils": {"AutoConfig": object},
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
    }
