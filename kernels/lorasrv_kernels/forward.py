"""What a forward pass calls, as a type: the modules `reference`, `fixed` and `gpu` are its implementations, and
what `cpu` loads."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lorasrv_kernels.attention_work import AttentionWork
from lorasrv_kernels.tiles import Delta, Module, Segments


class LoraKernels(Protocol):
    """Those that meet adapters."""

    @staticmethod
    def sgmv_shrink(
        x: Tensor, pool: Tensor, segments: Segments, layer: int, modules: tuple[Module, ...], out: Tensor, /
    ) -> None: ...
    @staticmethod
    def sgmv_expand(
        h: Tensor, pool: Tensor, segments: Segments, layer: int, modules: tuple[Module, ...], out: Tensor, /
    ) -> None: ...


class ForwardKernels(LoraKernels, Protocol):
    """Functions of `reference`, under its names and signatures; see there for what they mean."""

    @staticmethod
    def pack_linear(weight: Tensor, /, *, keep: bool = False) -> Tensor: ...
    @staticmethod
    def logits(x: Tensor, weight: Tensor, /) -> Tensor: ...
    @staticmethod
    def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, /) -> Tensor: ...
    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float, /) -> Tensor: ...
    @staticmethod
    def project(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pool: Tensor,
        segments: Segments | None,
        layer: int,
        modules: tuple[Module, ...],
        /,
    ) -> tuple[Tensor, Delta | None]: ...
    @staticmethod
    def rope_write_kv(
        qkv: Tensor,
        delta: Delta | None,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        kv: Tensor,
        layer: int,
        slots: Tensor,
        /,
    ) -> Tensor: ...
    @staticmethod
    def add(residual: Tensor, out: Tensor, delta: Delta | None, /) -> Tensor: ...
    @staticmethod
    def add_rms_norm(
        residual: Tensor, out: Tensor, delta: Delta | None, weight: Tensor, eps: float, /
    ) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def silu_mul(gate_up: Tensor, delta: Delta | None, /) -> Tensor: ...
    @staticmethod
    def paged_attention(
        query: Tensor,
        kv: Tensor,
        layer: int,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lengths: Tensor,
        window: int | None,
        out: Tensor,
        /,
        *,
        work: AttentionWork | None,
    ) -> None: ...
