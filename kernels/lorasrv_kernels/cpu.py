"""What a forward pass calls on a CPU, under the names and signatures of `reference`: C++ on the tensors' memory.

Semantics: those of `reference`. Sums are in fp32 and rounded where a result is stored; what lies between two stored
results of `reference` may be rounded once less. All adapters of a step are met in the calls that the base model makes
anyway, so the number of calls does not depend on them: the shrink beside a product, the expand in whatever reads that
product next.

In bf16, where the CPU multiplies it, weights are packed to panels that a product reads from start to end, and threads
take panels as they get through them: one that the system holds up holds up nobody. Elsewhere products are torch's.

The sources are in `native`. There are as many threads as torch has, but our own (`native/team.h`): one that has no core
is not waited for.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasrv_kernels import native, reference
from lorasrv_kernels.attention_work import AttentionWork
from lorasrv_kernels.tiles import Delta, Matrix, Module, Segments

PANEL = 16
_BY_TYPE = {torch.float32: 0, torch.bfloat16: 1}

_Pointer, _Size, _Flag, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = (("cols", _Size), ("chunk", _Size), ("odd_chunk", _Size))

    @staticmethod
    def of(matrix: Matrix) -> "_Matrix":
        return _Matrix(matrix.cols, matrix.chunk, matrix.odd_chunk)


class _Module(ctypes.Structure):
    _fields_ = (("index", _Size), ("a", _Matrix), ("b", _Matrix))

    @staticmethod
    def of(module: Module) -> "_Module":
        return _Module(module.index, _Matrix.of(module.a), _Matrix.of(module.b))


class _Adapters(ctypes.Structure):
    """`Adapters` of native/lora.h."""

    _fields_ = (
        ("pool", _Pointer),
        ("starts", _Pointer),
        ("ends", _Pointer),
        ("directories", _Pointer),
        ("scales", _Pointer),
        ("num_segments", _Size),
        ("num_modules", _Size),
        ("modules", _Pointer),
        ("group", _Size),
        ("layer", _Size),
        ("h", _Pointer),
        ("num_tokens", _Size),
        ("stride", _Size),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack": (_Pointer, _Size, _Size),
    "project": (_Pointer, _Size, _Size, _Pointer, _Size, _Pointer, _Flag, _Pointer, _Pointer),
    "shrink": (_Flag, _Pointer, _Size, _Pointer),
    "expand": (_Flag, _Pointer, _Pointer, _Size),
    "rms_norm": (_Flag, _Pointer, _Pointer, _Float, _Size, _Size, _Pointer),
    "add_rms_norm": (_Flag, *(_Pointer,) * 4, _Float, _Size, _Size, _Pointer, _Pointer),
    "silu_mul": (_Flag, _Pointer, _Pointer, _Size, _Size, _Pointer),
    "rope_write_kv": (
        *(_Flag, _Pointer, _Pointer, *(_Size,) * 4, _Pointer, _Pointer, _Float),
        *(_Pointer, _Pointer, _Pointer, _Size, _Size, _Pointer, _Pointer),
    ),
    "sample": (_Pointer, _Size, _Size, *(_Pointer,) * 7),
    "paged_attention": (
        *(_Flag, _Pointer, *(_Size,) * 3, _Pointer, _Size, _Size),
        *(_Pointer, _Size, _Pointer, _Pointer, _Size, _Size, _Pointer),
    ),
}


def load() -> "CpuKernels | str":
    """The kernels, or why there are none here."""
    found = native.find()
    if isinstance(found, str):
        return found
    try:
        return CpuKernels(found)
    except OSError as error:
        return str(error)
    except AttributeError as error:
        return f"built from other sources: {error}"


@lru_cache
def _open(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, f"lorasrv_{name}")
        function.argtypes, function.restype = arguments, None
    return loaded


class CpuKernels:
    """Implements `forward.ForwardKernels`. Used by one thread, since it keeps what it told the library last."""

    def __init__(self, library: Path) -> None:
        """Raises OSError where the library cannot be loaded, AttributeError where it lacks a function."""
        self.name = library.stem
        loaded = _open(library)
        for name in _SIGNATURES:
            setattr(self, f"_{name}", getattr(loaded, f"lorasrv_{name}"))
        self.multiplies = bool(loaded.lorasrv_multiplies())
        self._keys: _Keys | None = None
        self._segments: Segments | None = None
        self._groups: dict[int, tuple[tuple[Module, ...], _Adapters, ctypes.Array[_Module]]] = {}

    _pack: Callable[..., None]
    _project: Callable[..., None]
    _shrink: Callable[..., None]
    _expand: Callable[..., None]
    _rms_norm: Callable[..., None]
    _add_rms_norm: Callable[..., None]
    _silu_mul: Callable[..., None]
    _rope_write_kv: Callable[..., None]
    _paged_attention: Callable[..., None]
    _sample: Callable[..., None]

    by_rows = staticmethod(reference.by_rows)

    def pack_linear(
        self,
        weight: Tensor,  # [out_features, in_features]
        *,
        keep: bool = False,
    ) -> Tensor:
        """[out_features / 16, in_features / 2, 16, 2] where products are ours, else the weight itself."""
        out_features, in_features = weight.shape
        if not self.multiplies or weight.dtype != torch.bfloat16 or out_features % PANEL or in_features % 2:
            return weight
        packed = weight.clone() if keep or not weight.is_contiguous() else weight
        self._pack(packed.data_ptr(), out_features, in_features)
        return packed.view(out_features // PANEL, in_features // 2, PANEL, 2)

    def linear(
        self,
        x: Tensor,  # [num_rows, in_features]
        weight: Tensor,  # as `pack_linear` gave it
        bias: Tensor | None,  # [out_features]
    ) -> Tensor:  # [num_rows, out_features]
        if weight.dim() == 2:
            return reference.linear(x, weight, bias)
        return self._multiply(x, weight, bias, None, x.dtype)

    def logits(
        self,
        x: Tensor,  # [num_rows, in_features]
        weight: Tensor,  # [vocab_size, in_features] as `pack_linear` gave it
    ) -> Tensor:  # float32 [num_rows, vocab_size]
        if weight.dim() == 2:
            return reference.logits(x, weight)
        return self._multiply(x, weight, None, None, torch.float32)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Any, out_type: torch.dtype) -> Tensor:
        num_rows, out_features = x.shape[0], weight.shape[0] * PANEL
        out = torch.empty(num_rows, out_features, dtype=out_type)
        if not x.is_contiguous():
            x = x.contiguous()
        self._project(
            *(x.data_ptr(), num_rows, x.shape[1], weight.data_ptr(), out_features),
            *(None if bias is None else bias.data_ptr(), _BY_TYPE[out_type], out.data_ptr(), adapters),
        )
        return out

    def project(
        self,
        x: Tensor,  # [num_tokens, in_features]
        weight: Tensor,  # the modules' weights stacked, as `pack_linear` gave it
        bias: Tensor | None,  # [sum of out_features]
        pool: Tensor,  # [num_bytes], uint8
        segments: Segments | None,
        layer: int,
        modules: tuple[Module, ...],
    ) -> tuple[Tensor, Delta | None]:  # [num_tokens, sum of out_features]
        if segments is None:
            return self.linear(x, weight, bias), None
        h = torch.empty(1, len(modules), x.shape[0], segments.max_rank)
        delta = Delta(h=h, pool=pool, segments=segments, layer=layer, modules=modules)
        if weight.dim() == 2:
            self.sgmv_shrink(x, pool, segments, layer, modules, h)
            return reference.linear(x, weight, bias), delta
        return self._multiply(x, weight, bias, self._adapters(delta), x.dtype), delta

    def sgmv_shrink(
        self,
        x: Tensor,  # [num_tokens, in_features]
        pool: Tensor,  # [num_bytes], uint8
        segments: Segments,
        layer: int,
        modules: tuple[Module, ...],
        out: Tensor,  # float32 [num_splits, len(modules), num_tokens, >= max_rank]
    ) -> None:
        if out.shape[0] > 1:
            reference.sgmv_shrink(x, pool, segments, layer, modules, out)
            return
        assert out.is_contiguous(), "h has gaps"
        delta = Delta(h=out, pool=pool, segments=segments, layer=layer, modules=modules)
        if not x.is_contiguous():
            x = x.contiguous()
        self._shrink(_BY_TYPE[x.dtype], x.data_ptr(), x.shape[1], self._adapters(delta))

    def sgmv_expand(
        self,
        h: Tensor,  # float32 [num_splits, len(modules), num_tokens, >= max_rank], as sgmv_shrink left it
        pool: Tensor,  # [num_bytes], uint8
        segments: Segments,
        layer: int,
        modules: tuple[Module, ...],
        out: Tensor,  # [num_tokens, sum of out_features], the modules' outputs side by side
    ) -> None:
        if h.shape[0] > 1:
            reference.sgmv_expand(h, pool, segments, layer, modules, out)
            return
        assert out.is_contiguous(), "the outputs have gaps"
        delta = Delta(h=h, pool=pool, segments=segments, layer=layer, modules=modules)
        self._expand(_BY_TYPE[out.dtype], self._adapters(delta), out.data_ptr(), out.shape[1])

    def rms_norm(
        self,
        x: Tensor,  # [..., hidden]
        weight: Tensor,  # [hidden]
        eps: float,
    ) -> Tensor:  # [..., hidden]
        if not x.is_contiguous():
            x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._rms_norm(
            _BY_TYPE[x.dtype], x.data_ptr(), weight.data_ptr(), eps, x.numel() // width, width, out.data_ptr()
        )
        return out

    def add(
        self,
        residual: Tensor,  # [num_tokens, hidden]
        out: Tensor,  # [num_tokens, hidden], of a linear module; may be written
        delta: Delta | None,
    ) -> Tensor:  # [num_tokens, hidden]
        total = torch.empty_like(residual)
        self._add(residual, out, delta, None, 0.0, total, None)
        return total

    def add_rms_norm(
        self,
        residual: Tensor,  # [num_tokens, hidden]
        out: Tensor,  # [num_tokens, hidden], of a linear module; may be written
        delta: Delta | None,
        weight: Tensor,  # [hidden]
        eps: float,
    ) -> tuple[Tensor, Tensor]:  # [num_tokens, hidden], [num_tokens, hidden]
        total, normed = torch.empty_like(residual), torch.empty_like(residual)
        self._add(residual, out, delta, weight.data_ptr(), eps, total, normed.data_ptr())
        return total, normed

    def _add(
        self,
        residual: Tensor,
        out: Tensor,
        delta: Delta | None,
        weight: int | None,
        eps: float,
        total: Tensor,
        normed: int | None,
    ) -> None:
        num_tokens, hidden = residual.shape
        assert residual.is_contiguous() and out.is_contiguous(), "rows have gaps"
        self._add_rms_norm(
            *(_BY_TYPE[out.dtype], residual.data_ptr(), out.data_ptr(), self._adapters(delta), weight, eps),
            *(num_tokens, hidden, total.data_ptr(), normed),
        )

    def silu_mul(
        self,
        gate_up: Tensor,  # [num_tokens, 2 * intermediate], of a linear module; may be written
        delta: Delta | None = None,
    ) -> Tensor:  # [num_tokens, intermediate]
        num_tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.is_contiguous(), "rows have gaps"
        out = torch.empty(num_tokens, intermediate, dtype=gate_up.dtype)
        adapters = self._adapters(delta)
        self._silu_mul(_BY_TYPE[out.dtype], gate_up.data_ptr(), adapters, num_tokens, intermediate, out.data_ptr())
        return out

    def rope_write_kv(
        self,
        qkv: Tensor,  # [num_tokens, (num_heads + 2 * kv_heads) * head_dim], of a linear module; may be written
        delta: Delta | None,
        norms: tuple[Tensor, Tensor] | None,  # [head_dim] for queries and for keys
        eps: float,
        cos: Tensor,  # [num_tokens, head_dim / 2]
        sin: Tensor,  # [num_tokens, head_dim / 2]
        kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
        layer: int,
        slots: Tensor,  # int64 [num_tokens]
    ) -> Tensor:  # [num_tokens, num_heads, head_dim]
        num_tokens, keys = qkv.shape[0], self._keys_of(kv)
        block_tokens, kv_heads, head_dim = keys.block
        num_heads = qkv.shape[1] // head_dim - 2 * kv_heads
        if not (cos.is_contiguous() and sin.is_contiguous()):
            cos, sin = cos.contiguous(), sin.contiguous()
        assert qkv.is_contiguous(), "rows have gaps"
        query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype)
        query_norm, key_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        self._rope_write_kv(
            *(_BY_TYPE[qkv.dtype], qkv.data_ptr(), self._adapters(delta), num_tokens, num_heads, kv_heads, head_dim),
            *(query_norm, key_norm, eps, cos.data_ptr(), sin.data_ptr()),
            *(
                keys.first + layer * keys.layer_bytes,
                keys.page_stride,
                block_tokens,
                slots.data_ptr(),
                query.data_ptr(),
            ),
        )
        return query

    def paged_attention(
        self,
        query: Tensor,  # [num_tokens, num_heads, head_dim]
        kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
        layer: int,
        block_tables: Tensor,  # int32 [num_sequences, max_blocks]
        query_starts: Tensor,  # int32 [num_sequences + 1]
        context_lengths: Tensor,  # int32 [num_sequences]
        window: int | None,
        out: Tensor,  # [num_tokens, num_heads, head_dim]
        *,
        work: AttentionWork | None = None,  # not read here
    ) -> None:
        keys = self._keys_of(kv)
        block_tokens, kv_heads, head_dim = keys.block
        num_sequences, max_blocks = block_tables.shape
        assert query.is_contiguous() and out.is_contiguous() and block_tables.is_contiguous(), "rows have gaps"
        self._paged_attention(
            *(_BY_TYPE[query.dtype], query.data_ptr(), query.shape[1], kv_heads, head_dim),
            *(
                keys.first + layer * keys.layer_bytes,
                keys.page_stride,
                block_tokens,
                block_tables.data_ptr(),
                max_blocks,
            ),
            *(query_starts.data_ptr(), context_lengths.data_ptr(), num_sequences, window or 0, out.data_ptr()),
        )

    def sample(
        self,
        logits: Tensor,  # [num_rows, vocab_size]
        temperature: Tensor,  # float32 [num_rows], >= 0
        top_p: Tensor,  # float32 [num_rows]
        top_k: Tensor,  # int64 [num_rows]
        min_p: Tensor | None,  # float32 [num_rows]
        seeds: Tensor,  # int64 [num_rows]
        samples: Tensor,  # int64 [num_rows]
        positions: Tensor,  # int64 [num_rows]
        whole: Tensor,  # int64 [num_whole], not read here
        cut: Tensor,  # int64 [num_cut]
    ) -> tuple[Tensor, Tensor]:  # int64 [num_rows], bool [num_rows]
        """Rows that are cut, are sorted and drawn by torch."""
        own = logits.float().contiguous()
        num_rows, vocab_size = own.shape
        tokens, valid = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool)
        self._sample(
            *(own.data_ptr(), num_rows, vocab_size, temperature.data_ptr()),
            *(None if min_p is None else min_p.data_ptr(), seeds.data_ptr(), samples.data_ptr(), positions.data_ptr()),
            *(tokens.data_ptr(), valid.data_ptr()),
        )
        if len(cut):
            some = None if min_p is None else min_p[cut]
            others = (temperature[cut], top_p[cut], top_k[cut], some, seeds[cut], samples[cut], positions[cut])
            tokens[cut] = reference.sample(logits[cut], *others, cut[:0], torch.arange(len(cut)))[0]
        return tokens, valid

    def _keys_of(self, kv: Tensor) -> "_Keys":
        if self._keys is None or self._keys.kv is not kv:
            self._keys = _Keys.of(kv)
        return self._keys

    def _adapters(self, delta: Delta | None) -> Any:
        """What a call is told of a delta; what does not change within a step is kept."""
        if delta is None:
            return None
        if delta.segments is not self._segments:
            self._segments, self._groups = delta.segments, {}
        known = self._groups.get(id(delta.modules))
        if known is None:
            known = self._groups[id(delta.modules)] = _describe(delta.segments, delta.modules)
        told = known[1]
        told.pool, told.layer, told.h = delta.pool.data_ptr(), delta.layer, delta.h.data_ptr()
        told.num_tokens, told.stride = delta.h.shape[2:]
        return ctypes.byref(told)


def _describe(
    segments: Segments, modules: tuple[Module, ...]
) -> tuple[tuple[Module, ...], _Adapters, "ctypes.Array[_Module]"]:
    """With what it points to."""
    geometry = (_Module * len(modules))(*(_Module.of(module) for module in modules))
    told = _Adapters(
        starts=segments.starts.data_ptr(),
        ends=segments.ends.data_ptr(),
        directories=segments.directories.data_ptr(),
        scales=segments.scales.data_ptr(),
        num_segments=len(segments.starts),
        num_modules=segments.num_modules,
        modules=ctypes.addressof(geometry),
        group=len(modules),
    )
    return modules, told, geometry


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """Where a pool's keys are: what the kernels are told of `kv`."""

    kv: Tensor  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim]
    first: int  # address of the first layer's
    layer_bytes: int
    page_stride: int  # elements
    block: tuple[int, int, int]  # block_tokens, kv_heads, head_dim

    @staticmethod
    def of(kv: Tensor) -> "_Keys":
        block_tokens, kv_heads, head_dim = kv.shape[3:]
        dense = (block_tokens * kv_heads * head_dim, kv_heads * head_dim, head_dim, 1)
        assert kv.stride()[2:] == dense, "a layer's keys and values have gaps"
        return _Keys(
            kv=kv,
            first=kv.data_ptr(),
            layer_bytes=kv.stride(1) * kv.element_size(),
            page_stride=kv.stride(0),
            block=(block_tokens, kv_heads, head_dim),
        )
