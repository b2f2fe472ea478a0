"""What the `deterministic` option costs: one forward with logits, with and without it, alternating in one run.

    PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.determinism

A 125M Llama of random weights. Before anything is timed, the option's logits must be near those of the default and
equal to the bit whether a sequence is computed alone or in the batch; otherwise no figure is printed.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasrv.engine.batch import ChunkInput
from lorasrv.engine.fitting import page_layout
from lorasrv.engine.runner import ModelRunner
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import PackedModule, module_geometry, pack_adapter
from lorasrv.model.decoder import Decoder
from lorasrv.model.families import Architecture, read_architecture
from lorasrv.model.loader import dummy_weights
from lorasrv_bench.figures import commit
from lorasrv_kernels.dispatch import forward_kernels

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 26_000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
CONTEXT = 96
PREFILL = 512
BLOCK_TOKENS = 16
RANK = 16
NUM_ADAPTERS = 4
DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Rig:
    """One model as two decoders on one pool, with adapters in it."""

    default: ModelRunner
    deterministic: ModelRunner
    storage: PageStorage
    adapters: tuple[AdapterInput, ...]
    first_free_page: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """`num_sequences` chunks of `num_rows` tokens that end at position `context`, with adapters in turn or none."""

    name: str
    num_sequences: int
    num_rows: int
    context: int
    adapters: bool


CASES = tuple(
    Case(name=f"{name}, {'4 adapters' if lora else 'base'}", num_sequences=n, num_rows=rows, context=end, adapters=lora)
    for lora in (False, True)
    for name, n, rows, end in (
        ("decode 1", 1, 1, CONTEXT),
        ("decode 16", 16, 1, CONTEXT),
        ("decode 32", 32, 1, CONTEXT),
        (f"prefill {PREFILL}", 1, PREFILL, PREFILL),
        (f"prefill 4 x {PREFILL // 4}", 4, PREFILL // 4, PREFILL // 4),
    )
)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_architecture(folder)


def build(seed: int) -> Rig:
    cpu = torch.device("cpu")
    architecture = architecture_of(CONFIG)
    layout = page_layout(architecture, BLOCK_TOKENS, DTYPE.itemsize)
    storage = PageStorage(layout, 320, DTYPE, cpu)
    weights = dummy_weights(architecture, DTYPE, cpu, seed)
    modules = module_geometry(layout, architecture.module_shapes())
    adapters: list[AdapterInput] = []
    first_page = 0
    for index in range(NUM_ADAPTERS):
        packed = pack_adapter(random_modules(architecture, seed + index), layout, architecture.module_shapes())
        pages = range(first_page, first_page + packed.num_pages)
        directory = storage.write_adapter(packed, pages, wait_for_steps=False).directory
        first_page += packed.num_pages
        adapters.append(AdapterInput(directory=directory, max_rank=RANK, scale=1.0))
    # The default's kernels may pack the weights in place: they come last.
    deterministic, default = (
        ModelRunner(Decoder(architecture, weights, modules, forward_kernels(cpu, deterministic=option)), storage)
        for option in (True, False)
    )
    return Rig(
        default=default,
        deterministic=deterministic,
        storage=storage,
        adapters=tuple(adapters),
        first_free_page=first_page,
    )


def random_modules(architecture: Architecture, seed: int) -> list[PackedModule]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(0.02).to(DTYPE)

    return [
        PackedModule(
            layer=layer, module=index, rank=RANK, scale=2.0, a=draw(RANK, in_features), b=draw(out_features, RANK)
        )
        for layer in range(architecture.num_layers)
        for index, (_, in_features, out_features) in enumerate(architecture.module_shapes())
    ]


def chunks_of(rig: Rig, case: Case, seed: int) -> list[ChunkInput]:
    """Chunks whose sequences have pages of their own; sorted by adapter, as a batch wants them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-case.context // BLOCK_TOKENS)
    chunks: list[ChunkInput] = []
    for index in range(case.num_sequences):
        first_page = rig.first_free_page + index * blocks
        adapter = rig.adapters[index * NUM_ADAPTERS // case.num_sequences] if case.adapters else None
        chunks.append(
            ChunkInput(
                token_ids=tuple(torch.randint(26_000, (case.num_rows,), generator=generator).tolist()),
                start=case.context - case.num_rows,
                block_table=tuple(range(first_page, first_page + blocks)),
                adapter=adapter,
            )
        )
    return chunks


def forward(rig: Rig, runner: ModelRunner, chunks: Sequence[ChunkInput]) -> Callable[[], Tensor]:
    decoder, batch = runner._decoder, runner.build_batch(chunks)
    rows = batch.query_starts[1:].long() - 1
    return lambda: decoder.logits(decoder.forward(batch, rig.storage.bytes, rig.storage.kv)[rows])


def check(rig: Rig, chunks: Sequence[ChunkInput]) -> None:
    """Raises SystemExit where the option's logits are wrong."""
    usual, got = (forward(rig, runner, chunks)() for runner in (rig.default, rig.deterministic))
    alone = torch.cat([forward(rig, rig.deterministic, [chunk])() for chunk in chunks])
    off = ((got - usual).norm() / usual.norm()).item()
    if not got.isfinite().all() or off > 0.05:
        raise SystemExit(f"logits under the option differ from the default's by {off:.3f} of their norm")
    if not torch.equal(got, alone):
        raise SystemExit("logits under the option depend on the batch")


def measure(usual: Callable[[], Tensor], ours: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """The least milliseconds of each, run in turn: other work on the machine only ever adds."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, found in zip((usual, ours), times, strict=True):
            begin = time.perf_counter()
            run()
            found.append((time.perf_counter() - begin) * 1e3)
    return min(times[0]), min(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"commit {commit()}, torch {torch.__version__}, seed {arguments.seed}")
    print(f"device cpu ({torch.backends.cpu.get_cpu_capability()}), {arguments.threads} threads, {DTYPE}")
    print(f"configuration 125M Llama {CONFIG}, decode at context {CONTEXT}, {NUM_ADAPTERS} adapters of rank {RANK}")
    rig = build(arguments.seed)
    rig.storage.kv[rig.first_free_page :].normal_(generator=torch.Generator().manual_seed(arguments.seed))
    print(f"\n| best of {arguments.repeats} forwards | default ms | deterministic ms | ratio |\n|---|---|---|---|")
    for case in CASES:
        chunks = chunks_of(rig, case, arguments.seed)
        check(rig, chunks)
        usual, ours = measure(
            forward(rig, rig.default, chunks), forward(rig, rig.deterministic, chunks), arguments.repeats
        )
        print(f"| {case.name} | {usual:.1f} | {ours:.1f} | {ours / usual:.2f} |", flush=True)


if __name__ == "__main__":
    main()
