"""Torch's own attention on the same keys and values, as a bar.

Most of it wants keys and values in one piece, which an engine with pages would first have to gather: a bar for the
arithmetic, not a way to serve. FlexAttention is left out: it has to be compiled for every shape.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorasrv_bench.gpu_attention_load import Load
from lorasrv_bench.gpu_section import NotRun

Attend = Callable[[int], Tensor]  # of a layer, [num_tokens, num_heads, head_dim]


def baselines() -> dict[str, Callable[[Load], Attend]]:
    """Each makes what computes a layer. Raises NotRun where torch cannot do it."""
    return {"torch sdpa": _sdpa, "torch varlen": _varlen, "torch varlen, paged": _varlen_paged}


def _sdpa(load: Load) -> Attend:
    sequences, rows, context = len(load.rows), load.rows[0], load.contexts[0]
    if len(set(zip(load.rows, load.contexts, strict=True))) > 1 or 1 < rows < context:
        raise NotRun("its causal mask is that of whole prompts of one length")
    query = load.query.view(sequences, rows, *load.query.shape[1:]).transpose(1, 2)
    pairs = [
        [dense.unflatten(0, (sequences, context)).transpose(1, 2).contiguous() for dense in _dense(load, layer)]
        for layer in range(load.num_layers)
    ]

    def attend(layer: int) -> Tensor:
        found = torch.nn.functional.scaled_dot_product_attention(
            query, *pairs[layer], is_causal=rows > 1, enable_gqa=True
        )
        return found.transpose(1, 2).flatten(0, 1)

    return attend


def _varlen(load: Load) -> Attend:
    attention, known = _varlen_attn(load)
    pairs = [_dense(load, layer) for layer in range(load.num_layers)]
    key_starts = torch.tensor([0, *load.contexts]).cumsum(0).to(load.kv.device, torch.int32)

    def attend(layer: int) -> Tensor:
        key, value = pairs[layer]
        return attention(load.query, key, value, load.starts, key_starts, max(load.rows), max(load.contexts), **known)

    return attend


def _varlen_paged(load: Load) -> Attend:
    attention, known = _varlen_attn(load)
    if "block_table" not in inspect.signature(attention).parameters:
        raise NotRun(f"torch {torch.__version__} has no block_table")

    def attend(layer: int) -> Tensor:
        key, value = load.kv[:, layer, 0], load.kv[:, layer, 1]
        return attention(
            load.query,
            key,
            value,
            load.starts,
            None,
            max(load.rows),
            max(load.contexts),
            seqused_k=load.lengths,
            block_table=load.tables,
            **known,
        )

    return attend


def _varlen_attn(load: Load) -> tuple[Callable[..., Any], dict[str, object]]:
    """The function, and the arguments by which this version of it is causal and shares keys among heads."""
    if load.kv.device.type != "cuda":
        raise NotRun("it is for CUDA")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise NotRun(str(error)) from error
    parameters = inspect.signature(varlen_attn).parameters
    known: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        known["enable_gqa"] = True
    return varlen_attn, known


def _dense(load: Load, layer: int) -> list[Tensor]:  # [sum of contexts, kv_heads, head_dim], twice
    """Keys and values of a layer in one piece, sequence behind sequence."""
    block_tokens = load.kv.shape[3]
    places = [load.tables[index, : -(-context // block_tokens)].long() for index, context in enumerate(load.contexts)]
    return [
        torch.cat(
            [
                load.kv[pages, layer, which].flatten(0, 1)[:context]
                for pages, context in zip(places, load.contexts, strict=True)
            ]
        )
        for which in (0, 1)
    ]
