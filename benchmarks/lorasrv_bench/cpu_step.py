"""One decode step on a CPU, dissected: the oracles in torch and the native kernels, alternating in one run.

    PYTHONPATH=.:kernels:adapters:benchmarks python -m lorasrv_bench.cpu_step

A 125M Llama of random weights, 16 sequences, with 0, 1, 4 and 16 distinct adapters of rank 16 on all modules. Before
anything is timed, the native kernels' logits must be near the oracles' for every mix; otherwise no figure is printed.
What LoRA costs is held against the distinct adapters' bytes at the bandwidth at which this machine reads memory.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lorasrv.engine.batch import ChunkInput, SampleInput
from lorasrv.engine.fitting import page_layout
from lorasrv.engine.runner import ModelRunner
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import module_geometry, pack_adapter
from lorasrv.model.decoder import Decoder
from lorasrv.model.loader import dummy_weights
from lorasrv.model.sampler import draw
from lorasrv_bench.determinism import BLOCK_TOKENS, CONFIG, DTYPE, RANK, architecture_of, random_modules
from lorasrv_bench.figures import commit, cpu_name
from lorasrv_kernels import cpu, reference

NUM_SEQUENCES = 16
NUM_ADAPTERS = (0, 1, 4, 16)
PARTS = {
    "project": "products",
    "logits": "products",
    "paged_attention": "attention",
    "rope_write_kv": "rows",
    "add_rms_norm": "rows",
    "rms_norm": "rows",
    "add": "rows",
    "silu_mul": "rows",
}
GREEDY = SampleInput(temperature=0.0, top_p=1.0, top_k=None, seed=0, position=0)


class Timed:
    """Kernels that keep the seconds of each part of a step while `running`."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.running = False
        self.seconds: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        function, part = getattr(self.kernels, name), PARTS.get(name)
        if part is None:
            return function

        def timed(*arguments: Any, **keywords: Any) -> Any:
            if not self.running:
                return function(*arguments, **keywords)
            with self.timing(part):
                return function(*arguments, **keywords)

        setattr(self, name, timed)
        return timed

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - begin


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute a step."""

    name: str
    kernels: Timed
    decoder: Decoder
    runner: ModelRunner


@dataclass(frozen=True, kw_only=True)
class Rig:
    arms: tuple[Arm, ...]
    storage: PageStorage
    adapters: tuple[AdapterInput, ...]
    adapter_bytes: int
    first_free_page: int


def build(seed: int, context: int) -> Rig:
    native = cpu.load()
    if isinstance(native, str):
        raise SystemExit(f"there are no native kernels here: {native}")
    device, architecture = torch.device("cpu"), architecture_of(CONFIG)
    layout = page_layout(architecture, BLOCK_TOKENS, DTYPE.itemsize)
    shapes = architecture.module_shapes()
    images = [pack_adapter(random_modules(architecture, seed + n), layout, shapes) for n in range(max(NUM_ADAPTERS))]
    used = sum(image.num_pages for image in images)
    storage = PageStorage(layout, used + NUM_SEQUENCES * layout.pages_for_tokens(context), DTYPE, device)
    adapters: list[AdapterInput] = []
    for number, image in enumerate(images):
        pages = range(number * image.num_pages, (number + 1) * image.num_pages)
        directory = storage.write_adapter(image, pages, wait_for_steps=False).directory
        adapters.append(AdapterInput(directory=directory, max_rank=RANK, scale=1.0))
    storage.kv[used:].normal_(generator=torch.Generator().manual_seed(seed))
    modules = module_geometry(layout, shapes)

    def arm(name: str, kernels: Any) -> Arm:
        timed: Any = Timed(kernels)
        # Each has weights of its own, since kernels may pack them in place.
        decoder = Decoder(architecture, dummy_weights(architecture, DTYPE, device, seed), modules, timed)
        return Arm(name=name, kernels=timed, decoder=decoder, runner=ModelRunner(decoder, storage))

    num_elems = sum(RANK * (i + o) for _, i, o in shapes) * architecture.num_layers
    return Rig(
        arms=(arm("torch", reference), arm("native", native)),
        storage=storage,
        adapters=tuple(adapters),
        adapter_bytes=num_elems * DTYPE.itemsize,
        first_free_page=used,
    )


def chunks_of(rig: Rig, num_adapters: int, context: int, seed: int) -> list[ChunkInput]:
    token_ids = torch.randint(CONFIG["vocab_size"], (NUM_SEQUENCES,), generator=torch.Generator().manual_seed(seed))
    blocks = -(-context // BLOCK_TOKENS)
    firsts = range(rig.first_free_page, rig.first_free_page + NUM_SEQUENCES * blocks, blocks)
    return [
        ChunkInput(
            token_ids=(token_id,),
            start=context - 1,
            block_table=tuple(range(first, first + blocks)),
            adapter=rig.adapters[number * num_adapters // NUM_SEQUENCES] if num_adapters else None,
        )
        for number, (token_id, first) in enumerate(zip(token_ids.tolist(), firsts, strict=True))
    ]


def logits_of(rig: Rig, arm: Arm, chunks: Sequence[ChunkInput]) -> Tensor:
    with arm.kernels.timing("arrays"):
        batch = arm.runner.build_batch(chunks)
    return arm.decoder.logits(arm.decoder.forward(batch, rig.storage.bytes, rig.storage.kv))


def check(rig: Rig, chunks: Sequence[ChunkInput]) -> float:
    """How far the native logits are from the oracles', of their norm. Raises SystemExit where that is too far."""
    want, got = (logits_of(rig, arm, chunks) for arm in rig.arms)
    off = ((got - want).norm() / want.norm()).item()
    if not got.isfinite().all() or off > 0.05:
        raise SystemExit(f"native logits differ from the oracles' by {off:.3f} of their norm")
    return off


def step(rig: Rig, arm: Arm, chunks: Sequence[ChunkInput]) -> None:
    logits = logits_of(rig, arm, chunks)
    with arm.kernels.timing("draw"):
        draw(logits, [GREEDY] * NUM_SEQUENCES).read()


def dissect(rig: Rig, arm: Arm, chunks: Sequence[ChunkInput]) -> dict[str, float]:
    """Milliseconds by part; `rest` is the interpreter's, and that of torch's calls between the parts."""
    arm.kernels.seconds.clear()
    arm.kernels.running = True
    whole = timed_ms(lambda: step(rig, arm, chunks))
    arm.kernels.running = False
    found = {name: seconds * 1e3 for name, seconds in arm.kernels.seconds.items()}
    return found | {"rest": whole - sum(found.values())}


def timed_ms(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def weight_bandwidth(kernels: Timed, rounds: int) -> float:
    """GB/s at which one row meets 640 MB of packed weights, the best of a few times: they come from memory alone."""
    weights = [kernels.pack_linear(torch.zeros(26_000, 768, dtype=DTYPE)) for _ in range(16)]
    x = torch.zeros(1, 768, dtype=DTYPE)
    least_ms = min(timed_ms(lambda: [kernels.linear(x, weight, None) for weight in weights]) for _ in range(rounds))
    return sum(weight.nbytes for weight in weights) / least_ms / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    rig = build(arguments.seed, arguments.context)
    print(f"commit {commit()}, torch {torch.__version__}, seed {arguments.seed}")
    print(
        f"device {cpu_name()}, {torch.get_num_threads()} threads, {DTYPE}; native kernels: {rig.arms[1].kernels.name}"
    )
    print(f"configuration 125M Llama {CONFIG}; {NUM_SEQUENCES} sequences at context {arguments.context}")
    bandwidth = weight_bandwidth(rig.arms[1].kernels, 10)
    print(f"weights are read at {bandwidth:.1f} GB/s; an adapter has {rig.adapter_bytes / 1e6:.2f} MB\n")
    mixes = {number: chunks_of(rig, number, arguments.context, arguments.seed) for number in NUM_ADAPTERS}
    off = max(check(rig, chunks) for chunks in mixes.values())
    print(f"logits of all mixes are within {off:.3f} of the oracles' (of their norm)\n")
    whole: dict[tuple[str, int], list[float]] = {}
    parts: dict[tuple[str, int], list[dict[str, float]]] = {}
    for round_number in range(arguments.rounds):
        for arm in rig.arms[0 if round_number < 5 else 1 :]:  # a few of the slow ones will do
            for number, chunks in mixes.items():
                key = (arm.name, number)
                whole.setdefault(key, []).append(timed_ms(lambda a=arm, c=chunks: step(rig, a, c)))
                parts.setdefault(key, []).append(dissect(rig, arm, chunks))
    report(rig, whole, parts, bandwidth)


def report(
    rig: Rig,
    whole: dict[tuple[str, int], list[float]],
    parts: dict[tuple[str, int], list[dict[str, float]]],
    bandwidth: float,
) -> None:
    names = ("products", "attention", "rows", "arrays", "draw", "rest")
    print(f"| median ms | adapters | whole | best | {' | '.join(names)} |\n|---|---|---|---|{'---|' * len(names)}")
    for (arm, number), times in sorted(whole.items(), key=lambda item: item[0][0], reverse=True):
        shares = [median(each[name] for each in parts[arm, number]) for name in names]
        told = " | ".join(f"{share:.2f}" for share in shares)
        print(f"| {arm} | {number} | {median(times):.2f} | {min(times):.2f} | {told} |")
    print(
        "\n| adapters | LoRA costs, ms (median) | best to best | allowed: 1.5 x bytes / bandwidth |\n|---|---|---|---|"
    )
    base = whole["native", 0]
    for number in NUM_ADAPTERS[1:]:
        times = whole["native", number]
        allowed = 1.5 * number * rig.adapter_bytes / bandwidth / 1e6
        print(f"| {number} | {median(times) - median(base):.2f} | {min(times) - min(base):.2f} | {allowed:.2f} |")


if __name__ == "__main__":
    main()
