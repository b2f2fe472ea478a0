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
from lorasrv_kernels.attention_work import AttentionWork
from lorasrv_kernels.forward import ForwardKernels
from lorasrv_kernels.tiles import Delta, Module, Segments


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
    attention: AttentionWork | None = None  # the sequences in lists, for kernels that ask for them


class Decoder:
    """A decoder of any family. Immutable after construction; `modules` says how adapters' matrices are cut.

    `kernels` is what computes: `reference`, or say `fixed`, under which a row's bits do not depend on its batch. They
    may pack the weights in place, so that `weights` are this decoder's alone from now on.
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
        cos, sin = cos.contiguous(), sin.contiguous()  # once, not by every layer's kernel
        following = [layer.input_norm for layer in self._weights.layers[1:]]
        normed = self._kernels.rms_norm(x, self._weights.layers[0].input_norm, eps)
        for index, layer in enumerate(self._weights.layers):
            out, delta = self._attention(index, layer, normed, cos, sin, batch, pool, kv)
            x, normed = self._kernels.add_rms_norm(x, out, delta, layer.post_attention_norm, eps)
            out, delta = self._mlp(index, layer, normed, batch, pool)
            if index < len(following):
                x, normed = self._kernels.add_rms_norm(x, out, delta, following[index], eps)
            else:
                x = self._kernels.add(x, out, delta)
        return x

    @torch.inference_mode()
    def logits(
        self,
        x: Tensor,  # [num_rows, hidden], rows of a forward's output
    ) -> Tensor:  # float32 [num_rows, vocab_size]
        x = self._kernels.rms_norm(x, self._weights.norm, self.architecture.rms_norm_eps)
        return self._kernels.logits(x, self._weights.lm_head)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,  # [num_tokens, hidden]
        cos: Tensor,
        sin: Tensor,
        batch: ForwardBatch,
        pool: Tensor,
        kv: Tensor,
    ) -> tuple[Tensor, Delta | None]:  # [num_tokens, hidden]
        kernels, segments = self._kernels, batch.segments
        qkv, delta = kernels.project(x, layer.qkv, layer.qkv_bias, pool, segments, index, self._qkv_modules)
        query = kernels.rope_write_kv(
            qkv, delta, layer.qk_norms, self.architecture.rms_norm_eps, cos, sin, kv, index, batch.slots
        )
        out = torch.empty_like(query)
        window = self.architecture.windows[index]
        kernels.paged_attention(
            query,
            kv,
            index,
            batch.block_tables,
            batch.query_starts,
            batch.context_lengths,
            window,
            out,
            work=batch.attention,
        )
        return kernels.project(out.flatten(1), layer.o, layer.o_bias, pool, segments, index, self._o_module)

    def _mlp(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,  # [num_tokens, hidden]
        batch: ForwardBatch,
        pool: Tensor,
    ) -> tuple[Tensor, Delta | None]:  # [num_tokens, hidden]
        kernels, segments = self._kernels, batch.segments
        gate_up, delta = kernels.project(x, layer.gate_up, None, pool, segments, index, self._gate_up_modules)
        hidden = kernels.silu_mul(gate_up, delta)
        return kernels.project(hidden, layer.down, None, pool, segments, index, self._down_module)


def _packed(weights: ModelWeights, kernels: ForwardKernels) -> ModelWeights:
    """The weights with every linear one as `kernels.linear` takes it, in the same memory where it can be."""
    pack = kernels.pack_linear
    layers = tuple(
        replace(layer, qkv=pack(layer.qkv), o=pack(layer.o), gate_up=pack(layer.gate_up), down=pack(layer.down))
        for layer in weights.layers
    )
    return replace(weights, layers=layers, lm_head=pack(weights.lm_head, keep=weights.lm_head is weights.embed))
