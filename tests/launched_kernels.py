"""Which kernels a CUDA engine would have Triton compile, found without a GPU: launchers run on CPU tensors, Triton
chooses what to compile as it does on a device, and is stopped there, so nothing runs and tensors hold garbage.

Run as a program, since the process must not have Triton's interpreter: prints JSON.
"""

import json
import random
import sys
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lorasrv.config import EngineConfig, ModelConfig, PoolConfig
from lorasrv.engine.batch import ChunkInput, Draw, SampleInput
from lorasrv.engine.runner import ModelRunner, build_runner
from lorasrv.engine.step_arrays import Room, StepPlan
from lorasrv.engine.warm_up import warm_up
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import module_geometry
from lorasrv.model import sampler as drawing
from lorasrv.model.decoder import Decoder
from lorasrv.model.loader import dummy_weights
from lorasrv_kernels import gpu, sampling
from lorasrv_kernels.attention_work import tiling
from lorasrv_kernels.work import DECODE_HEIGHT

MAX_RANK, MAX_ROWS, BLOCK_TOKENS, CONTEXT = 256, 8, 16, 2048


class FakeDriver:
    """A Hopper GPU as far as choosing what to compile goes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def build(folder: str, dtype: torch.dtype) -> tuple[ModelRunner, PageStorage, Any]:
    name = str(dtype).removeprefix("torch.")
    config = EngineConfig(model=ModelConfig(path=folder, dtype=name), pool=PoolConfig(pool_bytes=64 << 20))
    _, storage, architecture, _ = build_runner(config)
    weights = dummy_weights(architecture, dtype, torch.device("cpu"), 0)
    decoder = Decoder(architecture, weights, module_geometry(storage.layout, architecture.module_shapes()), gpu)
    group = architecture.num_heads // architecture.num_kv_heads
    runner = ModelRunner(decoder, storage, tiling(architecture.head_dim, group, dtype, capability=90))
    return runner, storage, architecture


def random_steps(runner: ModelRunner, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        adapters = [
            AdapterInput(directory=rng.randrange(64), max_rank=rng.randint(1, MAX_RANK), scale=1.0) for _ in range(3)
        ]
        chunks: list[ChunkInput] = []
        for _ in range(rng.randint(1, MAX_ROWS)):
            start, length = rng.randrange(1500), rng.choice((1, 1, 1, 2, 15, 16, 17, 33, 64, 65, 100, 257))
            table = tuple(rng.randrange(200) for _ in range(-(-(start + length) // BLOCK_TOKENS)))
            adapter = rng.choice([None, *adapters])
            chunks.append(ChunkInput(token_ids=(1,) * length, start=start, block_table=table, adapter=adapter))
        how = SampleInput(
            temperature=rng.choice((0.0, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((None, 3)),
            min_p=rng.choice((0.0, 0.1)),
            seed=rng.getrandbits(64),
            position=rng.randrange(2000),
            logprobs=rng.choice((None, 3)),
        )
        runner.forward(tuple(chunks)).draw(tuple(Draw(chunk=index, how=how) for index in range(len(chunks))))


def capture(runner: ModelRunner) -> None:
    """What `capture_graphs` runs before it captures."""
    for num_rows in (1, 2, 4, MAX_ROWS):
        for max_rank in (0, MAX_RANK):
            room = Room.of_decodes(num_rows, CONTEXT // BLOCK_TOKENS, max_rank, BLOCK_TOKENS, runner._tiling)
            step = runner.static_step(room, torch.zeros(num_rows, room.max_blocks, dtype=torch.int32))
            runner._decoder.logits(runner._forward(step.batch).hidden)
            chunk = ChunkInput(token_ids=(1,), start=5, block_table=(1,), adapter=None)
            runner.load(step, StepPlan.of((chunk,), runner._tiling, DECODE_HEIGHT))


def sample(*arguments: Any) -> tuple[Tensor, Tensor]:
    """With tokens that can be looked up, as no kernel has run."""
    tokens, valid = sampling.sample(*arguments)
    return torch.zeros_like(tokens), valid


def main(folder: str, dtype: str) -> None:
    found: list[tuple[str, str]] = []

    def stop(*, key: str, fn: Any, **_: object) -> bool:
        found.append((fn.name, key))
        return True

    driver.set_active(FakeDriver())
    knobs.runtime.jit_cache_hook = stop
    runner, storage, architecture = build(folder, getattr(torch, dtype))
    # A GPU's engine samples with the kernels, whatever this machine has.
    drawing.sampler = lambda _: sample
    capture(runner)
    warm_up(runner, storage, architecture.module_shapes(), CONTEXT, MAX_RANK)
    ready = set(found)
    for seed in range(3):
        random_steps(runner, seed)
    later = sorted(set(found) - ready)
    print(json.dumps({"ready": sorted({name for name, _ in ready}), "count": len(ready), "later": later}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
