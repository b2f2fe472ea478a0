"""Decode steps as CUDA graphs: captured before the server is ready, replayed with whatever arrays are loaded.

A graph is captured for a number of rows, with adapters and without. A step replays the smallest that holds it; the
rows behind its own are computed and mean nothing. Which adapters are in the batch is data, in the graph's buffer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv.engine.step_arrays import Room
from lorasrv.model.decoder import ForwardBatch


@dataclass(frozen=True, kw_only=True)
class StaticStep:
    """A step's tensors at fixed addresses: views of one buffer, which the arrays of any step in this room fill."""

    room: Room
    buffer: Tensor  # uint8
    batch: ForwardBatch


@dataclass(frozen=True, kw_only=True)
class Forwarded:
    """What a forward gave. A graph computes the logits of all its rows with it."""

    hidden: Tensor  # [num_tokens, hidden]
    logits: Tensor | None  # [num_tokens, vocab_size]


@dataclass(frozen=True, kw_only=True)
class DecodeGraph:
    """A captured forward of `step`. What it gives is overwritten by the next replay of any graph."""

    step: StaticStep
    graph: torch.cuda.CUDAGraph
    forwarded: Forwarded

    def replay(self) -> Forwarded:
        self.graph.replay()
        return self.forwarded


class DecodeGraphs:
    """All graphs of a runner. They share their memory, since one runs at a time: the largest is captured first."""

    def __init__(
        self,
        sizes: Sequence[int],
        static_step: Callable[[int, bool], StaticStep],  # of a number of rows, with or without adapters
        forward: Callable[[ForwardBatch], Forwarded],
    ) -> None:
        self._sizes = tuple(sorted(sizes))
        self._graphs: dict[tuple[int, bool], DecodeGraph] = {}
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for size in reversed(self._sizes):
            for lora in (True, False):
                step, graph = static_step(size, lora), torch.cuda.CUDAGraph()
                # Compiles what has not been, and lets libraries allocate what they must not in a capture.
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    forward(step.batch)
                torch.cuda.current_stream().wait_stream(stream)
                with torch.cuda.graph(graph, pool=pool):
                    forwarded = forward(step.batch)
                self._graphs[size, lora] = DecodeGraph(step=step, graph=graph, forwarded=forwarded)

    def find(self, num_rows: int, lora: bool) -> DecodeGraph | None:
        """The smallest that holds so many rows."""
        size = next((size for size in self._sizes if size >= num_rows), None)
        return None if size is None else self._graphs[size, lora]


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows worth a graph: a step pays for at most twice its rows up to 16, then for at most 15 more, which
    cost a matrix product little, and from 256 on for at most 63 more."""
    sizes = {1, 2, 4, 8, *range(16, 257, 16), *range(320, max(max_rows, 320) + 64, 64)}
    return tuple(sorted({min(size, max_rows) for size in sizes}))
