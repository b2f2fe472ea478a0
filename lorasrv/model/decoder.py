"""The forward pass: one configurable decoder on the flat `[num_tokens, hidden]` batch of a step.

A step mixes prefill chunks and decode rows of many sequences and adapters. All it needs comes as a `ForwardBatch`;
the pool it reads adapters from and reads and writes KV in is an argument too.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lorasrv.model.families import Architecture
from lorasrv.model.loader import LayerWeights, ModelWeights
from lorasrv.model.rope import Rotation
from lorasrv_kernels import reference
from lorasrv_kernels.forward import ForwardKernels
from lorasrv_kernels.tiles import Module, Segments


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One step. Rows of a sequence are adjacent; its KV, that of this step included, is in its block table."""

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    slots: Tensor  # int64 [num_tokens], where each token's KV goes: page * block_tokens + place in the block
    block_tables: Tensor  # int32 [num_sequences, max_blocks]
    query_starts: Tensor  # int32 [num_sequences + 1]
    context_lengths: Tensor  # int32 [num_sequences]
    segments: Segments | None  # None when no row has an adapter


@dataclass(frozen=True, kw_only=True)
class _Lora:
    """A step's adapters while it runs: where to find them, and the shrink's output."""

    pool: Tensor  # uint8 [num_bytes]
    segments: Segments
    shrunk: Tensor  # float32 [1, most modules that share an input, num_tokens, max_rank]


class Decoder:
    """A decoder of any family. Immutable after construction; `modules` says how adapters' matrices are cut.

    `kernels` is the module that computes: `reference`, or `fixed`, under which a row's bits do not depend on its batch.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: ModelWeights,
        modules: tuple[Module, ...],
        kernels: ForwardKernels = reference,
    ) -> None:
        self.architecture = architecture
        self._kernels = kernels
        self._weights = _packed(weights, kernels)
        self._qkv_modules, self._o_module = modules[0:3], modules[3:4]
        self._gate_up_modules, self._down_module = modules[4:6], modules[6:7]
        self._rotation = Rotation(architecture.rope, architecture.head_dim, weights.embed.device)

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        pool: Tensor,  # uint8 [num_bytes]
        kv: Tensor,  # [num_pages, layers, 2, block_tokens, kv_heads, head_dim], a view of the pool
    ) -> Tensor:  # [num_tokens, hidden]
        """Compute every row, leave its KV in the pool, and return what `logits` takes."""
        eps = self.architecture.rms_norm_eps
        x = embedding(batch.token_ids, self._weights.embed)  # [num_tokens, hidden]
        cos, sin = self._kernels.by_rows(
            lambda positions: torch.stack(self._rotation.at(positions, x.dtype), dim=1), batch.positions
        ).unbind(1)
        lora = _step_lora(batch, pool)
        for index, layer in enumerate(self._weights.layers):
            normed = self._kernels.rms_norm(x, layer.input_norm, eps)
            x = x + self._attention(index, layer, normed, cos, sin, batch, kv, lora)
            normed = self._kernels.rms_norm(x, layer.post_attention_norm, eps)
            x = x + self._mlp(index, layer, normed, lora)
        return x

    @torch.inference_mode()
    def logits(
        self,
        x: Tensor,  # [num_rows, hidden], rows of a forward's output
    ) -> Tensor:  # float32 [num_rows, vocab_size]
        x = self._kernels.rms_norm(x, self._weights.norm, self.architecture.rms_norm_eps)
        return self._kernels.linear(x, self._weights.lm_head, None).float()

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,  # [num_tokens, hidden]
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        kv: Tensor,
        lora: _Lora | None,
    ) -> Tensor:  # [num_tokens, hidden]
        heads, kv_heads = self.architecture.num_heads, self.architecture.num_kv_heads
        qkv = self._project(x, layer.qkv, layer.qkv_bias, lora, index, self._qkv_modules)
        query, key, value = qkv.unflatten(1, (-1, self.architecture.head_dim)).split((heads, kv_heads, kv_heads), dim=1)
        if layer.qk_norms is not None:
            query = self._kernels.rms_norm(query, layer.qk_norms[0], self.architecture.rms_norm_eps)
            key = self._kernels.rms_norm(key, layer.qk_norms[1], self.architecture.rms_norm_eps)
        query = reference.rope(query, cos, sin)
        reference.write_kv(reference.rope(key, cos, sin), value, kv, index, batch.slots)
        out = torch.empty_like(query)
        window = self.architecture.windows[index]
        self._kernels.paged_attention(
            query, kv, index, batch.block_tables, batch.query_starts, batch.context_lengths, window, out
        )
        return self._project(out.flatten(1), layer.o, layer.o_bias, lora, index, self._o_module)

    def _mlp(self, index: int, layer: LayerWeights, x: Tensor, lora: _Lora | None) -> Tensor:  # [num_tokens, hidden]
        gate_up = self._project(x, layer.gate_up, None, lora, index, self._gate_up_modules)
        return self._project(self._kernels.silu_mul(gate_up), layer.down, None, lora, index, self._down_module)

    def _project(
        self,
        x: Tensor,  # [num_tokens, in_features]
        weight: Tensor,  # [sum of out_features, in_features]
        bias: Tensor | None,  # [sum of out_features]
        lora: _Lora | None,
        layer: int,
        modules: tuple[Module, ...],  # whose weights are stacked in `weight`
    ) -> Tensor:  # [num_tokens, sum of out_features]
        out = self._kernels.linear(x, weight, bias)
        if lora is not None:
            shrunk = lora.shrunk[:, : len(modules)]
            self._kernels.sgmv_shrink(x, lora.pool, lora.segments, layer, modules, shrunk)
            self._kernels.sgmv_expand(shrunk, lora.pool, lora.segments, layer, modules, out)
        return out


def _step_lora(batch: ForwardBatch, pool: Tensor) -> _Lora | None:
    if batch.segments is None:
        return None
    shape = (1, 3, batch.token_ids.shape[0], batch.segments.max_rank)
    shrunk = torch.empty(shape, dtype=torch.float32, device=batch.token_ids.device)
    return _Lora(pool=pool, segments=batch.segments, shrunk=shrunk)


def _packed(weights: ModelWeights, kernels: ForwardKernels) -> ModelWeights:
    """The weights with every linear one as `kernels.linear` takes it."""
    pack = kernels.pack_linear
    layers = tuple(
        replace(layer, qkv=pack(layer.qkv), o=pack(layer.o), gate_up=pack(layer.gate_up), down=pack(layer.down))
        for layer in weights.layers
    )
    return replace(weights, layers=layers, lm_head=pack(weights.lm_head))
