"""A forward pass of the GPU's kernels against one of the oracles: in Triton's interpreter, or on a GPU where there is
one, where decode steps are replayed from graphs too."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernel_device import DEVICE
from lorasrv.config import EngineConfig, ModelConfig, PoolConfig
from lorasrv.engine.batch import ChunkInput, Draw, SampleInput
from lorasrv.engine.fitting import page_layout
from lorasrv.engine.packer import Packer
from lorasrv.engine.runner import ModelRunner, build_runner
from lorasrv.engine.step_arrays import Room, StepPlan
from lorasrv.engine.warm_up import warm_up
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import module_geometry
from lorasrv.model.decoder import Decoder
from lorasrv.model.families import read_architecture
from lorasrv.model.loader import load_weights
from lorasrv.model.logit_edits import LogitEdits
from lorasrv_kernels.dispatch import attention_tiling
from test_gpu_engine import pack, save_model

from triton import knobs  # isort: skip
from lorasrv_kernels import gpu  # isort: skip

BLOCK_TOKENS, NUM_PAGES, VOCAB = 16, 160, 101
GREEDY = SampleInput(temperature=0.0, top_p=1.0, top_k=None, seed=0, position=0)
# (adapter, tokens): two sequences share one.
SEQUENCES = ((None, 21), ("r3", 9), ("r64", 40), ("r3", 17), ("r1", 5), (None, 3))


class Rig:
    """One model on two devices' kernels. Pages are handed out alike, so chunks mean the same to both."""

    def __init__(self, folder: Path) -> None:
        save_model(folder)
        self.oracle, oracle_storage, architecture, _ = build_runner(
            EngineConfig(model=ModelConfig(path=str(folder)), pool=PoolConfig(pool_bytes=NUM_PAGES * 8192))
        )
        layout = page_layout(architecture, BLOCK_TOKENS, 4)
        self.storage = PageStorage(layout, NUM_PAGES, torch.float32, DEVICE)
        self.storage.bytes.view(torch.float32).fill_(float("nan"))
        weights = load_weights(folder, read_architecture(folder), torch.float32, DEVICE)
        decoder = Decoder(architecture, weights, module_geometry(layout, architecture.module_shapes()), gpu)
        group = architecture.num_heads // architecture.num_kv_heads
        tiling = attention_tiling(gpu, DEVICE, torch.float32, architecture.head_dim, group)
        self.runner = ModelRunner(decoder, self.storage, tiling)
        self._free = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0)).tolist()
        packer = Packer(layout=layout, module_shapes=architecture.module_shapes())
        self.adapters: dict[str, AdapterInput] = {}
        for name in ("r1", "r3", "r64"):
            packed = pack(name, packer)
            pages = [self._free.pop() for _ in range(packed.num_pages)]
            for storage in (self.storage, oracle_storage):
                copy = storage.write_adapter(packed, pages, wait_for_steps=True)
            self.adapters[name] = AdapterInput(directory=copy.directory, max_rank=packed.max_rank, scale=1.0)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.tables = [tuple(self._free.pop() for _ in range(-(-(n + 9) // BLOCK_TOKENS))) for _, n in SEQUENCES]

    def chunk(self, sequence: int, start: int, end: int) -> ChunkInput:
        name = SEQUENCES[sequence][0]
        return ChunkInput(
            token_ids=tuple((7 * sequence + 3 * place) % VOCAB for place in range(start, end)),
            start=start,
            block_table=self.tables[sequence][: -(-end // BLOCK_TOKENS)],
            adapter=None if name is None else self.adapters[name],
        )

    def compare(self, chunks: Sequence[ChunkInput]) -> Tensor:
        """float32 [num_chunks, vocab_size], from the GPU's kernels."""
        got, want = (logits(runner, chunks) for runner in (self.runner, self.oracle))
        torch.testing.assert_close(got.cpu(), want, atol=2e-4, rtol=1e-4)
        return got


def logits(runner: ModelRunner, chunks: Sequence[ChunkInput]) -> Tensor:
    ordered = sorted(chunks, key=lambda chunk: (chunk.adapter is None, chunk.adapter.directory if chunk.adapter else 0))
    batch = runner.build_batch(ordered)
    hidden = runner._decoder.forward(batch, runner._storage.bytes, runner._storage.kv)
    return runner._decoder.logits(hidden[batch.query_starts[1:].long() - 1])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("model"))


def test_prompts_chunks_and_decodes_of_many_adapters_are_the_oracles(rig: Rig) -> None:
    lengths = [length for _, length in SEQUENCES]
    rig.compare([rig.chunk(sequence, 0, min(16, length)) for sequence, length in enumerate(lengths)])
    rest = [sequence for sequence, length in enumerate(lengths) if length > 16]
    rig.compare([rig.chunk(sequence, 16, lengths[sequence]) for sequence in rest] + [rig.chunk(1, 9, 10)])
    lengths[1] += 1
    found = rig.compare([rig.chunk(sequence, length, length + 1) for sequence, length in enumerate(lengths)])
    assert len({tuple(row.tolist()) for row in found}) == len(SEQUENCES)

    step = [rig.chunk(sequence, length + 1, length + 2) for sequence, length in enumerate(lengths)]
    step.sort(key=lambda chunk: (chunk.adapter is None, chunk.adapter.directory if chunk.adapter else 0))
    room = Room.of_decodes(8, 8, 64, BLOCK_TOKENS, rig.runner._tiling)
    static = rig.runner.static_step(room, torch.full((8, 8), 10**6, dtype=torch.int32, device=DEVICE))
    rig.runner.load(static, StepPlan.of(step, rig.runner._tiling, 16))
    with warnings.catch_warnings():
        # Rows beyond the step hold what the memory held; NumPy tells of their overflows.
        warnings.simplefilter("ignore", RuntimeWarning)
        hidden = rig.runner._decoder.forward(static.batch, rig.storage.bytes, rig.storage.kv)[: len(step)]
    torch.testing.assert_close(rig.runner._decoder.logits(hidden).cpu(), logits(rig.oracle, step), atol=2e-4, rtol=1e-4)


def test_a_runner_is_warmed_up_and_right_behind_it(rig: Rig, tmp_path: Path) -> None:
    other = Rig(tmp_path)
    architecture = read_architecture(tmp_path)
    warm_up(other.oracle, other.oracle._storage, architecture.module_shapes(), 64, 20)
    step = other.oracle.forward((other.chunk(0, 0, 21),))
    step.draw((Draw(chunk=0, how=GREEDY),))
    again = rig.oracle.forward((rig.chunk(0, 0, 21),))
    again.draw((Draw(chunk=0, how=GREEDY),))
    assert step.output().tokens == again.output().tokens


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
def test_replayed_steps_draw_the_oracles_tokens(rig: Rig) -> None:
    """Each replay with other adapters than the one before, down to none."""
    rig.runner.capture_graphs(8, 8, 64)
    for runner in (rig.runner, rig.oracle):
        prompts = tuple(rig.chunk(sequence, 0, length) for sequence, (_, length) in enumerate(SEQUENCES))
        runner.forward(prompts).draw(())
    for members in ((0, 1, 2, 3, 4, 5), (0, 5), (2,), (1, 3, 4), (5, 2, 0)):
        chunks = tuple(rig.chunk(sequence, SEQUENCES[sequence][1], SEQUENCES[sequence][1] + 1) for sequence in members)
        tokens: list[tuple[int | None, ...]] = []
        for runner in (rig.runner, rig.oracle):
            step = runner.forward(chunks)
            step.draw(tuple(Draw(chunk=index, how=GREEDY) for index in range(len(chunks))))
            tokens.append(step.output().tokens)
        assert tokens[0] == tokens[1], members


# What a request may ask for, none of which may make a step wait.
HOW = (
    GREEDY,
    GREEDY._replace(temperature=0.8, logprobs=2),
    GREEDY._replace(temperature=0.8, top_p=0.9),
    GREEDY._replace(temperature=0.8, top_k=5, min_p=0.1),
    GREEDY._replace(edits=LogitEdits(repeated=(3,), repetition_penalty=1.1, added=((4, 1.0),), masked=(5,))),
    GREEDY._replace(temperature=1.2),
)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="nothing waits for a CPU")
def test_steady_steps_neither_wait_for_the_device_nor_compile(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come from the step before, on the device; ranks are new to its decode steps."""
    rig.runner.capture_graphs(8, 8, 64)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, fn, **_: compiled.append(fn.name))
    prompts = tuple(rig.chunk(sequence, 0, length) for sequence, (_, length) in enumerate(SEQUENCES))
    rig.runner.forward(prompts).draw(())

    def run(members: Sequence[int], how: Sequence[SampleInput], num_steps: int) -> None:
        starts = [SEQUENCES[sequence][1] for sequence in members]
        draws = tuple(Draw(chunk=index, how=each) for index, each in enumerate(how))
        step = rig.runner.forward(tuple(rig.chunk(s, n, n + 1) for s, n in zip(members, starts, strict=True)))
        step.draw(draws)
        for ahead in range(1, num_steps):
            following = (rig.chunk(s, n + ahead, n + ahead + 1) for s, n in zip(members, starts, strict=True))
            submitted = rig.runner.forward(
                tuple(chunk._replace(token_ids=(), drawn=index) for index, chunk in enumerate(following))
            )
            assert None not in step.output().tokens
            submitted.draw(draws)
            step = submitted
        step.output()

    for how in HOW:
        run((0, 4), (how, GREEDY), 2)
    compiled.clear()
    with warnings.catch_warnings():
        # Torch tells that it may not see every wait.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        run(range(len(SEQUENCES)), HOW, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled == []
