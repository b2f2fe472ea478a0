"""How many threads compute on a CPU."""

import os

import torch

from lorasrv.config import ModelConfig
from lorasrv.model.families import read_architecture
from lorasrv.model.shape import ModelShape

# A product of less than this is over before a second thread has begun, and it waits for that one, which the front
# process and the builders may keep from its core (benchmarks/RESULTS.md, "Threads of a small model").
_SMALL_WEIGHTS_BYTES = 64 << 20


def use_threads(config: ModelConfig) -> None:
    """Have torch use `config.threads` in this process; None leaves it all cores, or what OMP_NUM_THREADS says, unless
    the model is small. Raises UnsupportedModel."""
    threads = config.threads
    if threads is None and "OMP_NUM_THREADS" not in os.environ and _weights_bytes(config) < _SMALL_WEIGHTS_BYTES:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def _weights_bytes(config: ModelConfig) -> int:
    shape = ModelShape.of(read_architecture(config.path))
    return (shape.linear_params + shape.head_params) * getattr(torch, config.dtype).itemsize
