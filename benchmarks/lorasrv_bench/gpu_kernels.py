"""The one place where the benchmark takes the product's kernels: those that the engine takes on the device."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorasrv.engine.runner import ModelRunner
from lorasrv_kernels.attention_work import AttentionWork, build_attention_work
from lorasrv_kernels.dispatch import attention_tiling, forward_kernels
from lorasrv_kernels.tiles import Module, Segments
from lorasrv_kernels.work import num_splits, plan_work

Sgmv = Callable[[Tensor, Tensor, Segments, int, tuple[Module, ...], Tensor], None]


def sgmv(device: torch.device) -> tuple[Sgmv, Sgmv]:
    """(shrink, expand)."""
    kernels = forward_kernels(device, deterministic=False)
    return kernels.sgmv_shrink, kernels.sgmv_expand


def segments(
    rows: Sequence[int],  # of each adapter; they lie one behind the other
    directories: Sequence[int],
    rank: int,
    num_modules: int,
    device: torch.device,
) -> Segments:
    """All rows of a step, each of some adapter; scales are 1."""
    ends = torch.tensor(rows).cumsum(0).tolist()
    starts = [end - num_rows for end, num_rows in zip(ends, rows, strict=True)]
    work = plan_work(starts, ends, [rank] * len(rows), sum(rows)).upload(device)

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Segments(
        starts=ints(starts),
        ends=ints(ends),
        directories=ints(directories),
        scales=torch.ones(len(rows), device=device),
        num_modules=num_modules,
        max_rank=rank,
        work=work,
    )


def shrunk(
    modules: Sequence[Module], num_tokens: int, rank: int, device: torch.device
) -> Tensor:  # float32 [num_splits, len(modules), num_tokens, rank]
    """Where a shrink leaves its partial sums."""
    splits = num_splits(modules[0].a.cols, num_tokens)
    return torch.full((splits, len(modules), num_tokens, rank), float("nan"), device=device)


def attention(
    rows: Sequence[int], contexts: Sequence[int], num_heads: int, kv: Tensor
) -> Callable[[Tensor, Tensor, int, Tensor, Tensor, Tensor, int | None, Tensor], None]:
    """Paged attention for a step of these sequences, whose lists are made once."""
    kernels = forward_kernels(kv.device, deterministic=False)
    kv_heads, head_dim = kv.shape[4:]
    tiling = attention_tiling(kernels, kv.device, kv.dtype, head_dim, num_heads // kv_heads)
    work = None if tiling is None else _on(kv.device, build_attention_work(rows, contexts, tiling))

    def run(
        query: Tensor,
        kv: Tensor,
        layer: int,
        tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        window: int | None,
        out: Tensor,
    ) -> None:
        kernels.paged_attention(query, kv, layer, tables, starts, lengths, window, out, work=work)

    return run


def _on(device: torch.device, work: AttentionWork) -> AttentionWork:
    names = ("tiles", "splits", "merges", "counts")
    return replace(work, **{name: getattr(work, name).to(device) for name in names})


def make_ready(runner: ModelRunner, max_rows: int, max_blocks: int, max_rank: int, *, deterministic: bool) -> None:
    """What the engine does before it is ready: where steps run beside the host, decode steps are captured. Those of
    `deterministic` cannot be: its kernels ask the host."""
    if runner.runs_ahead and not deterministic:
        runner.capture_graphs(max_rows, max_blocks, max_rank)
