"""Which kernels the launchers have Triton compile for models of many shapes, and whether `gate`'s table has them, found
without a GPU: as in `launched_kernels`, launchers run on CPU tensors and Triton is stopped before it compiles.

Run as a program, since the process must not have Triton's interpreter: prints JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver

from launched_kernels import FakeDriver
from lorasrv.memory.layout import PageLayout
from lorasrv.memory.tensors import module_geometry
from lorasrv_kernels import gate, gpu, sampling
from lorasrv_kernels.attention_work import build_attention_work, tiling
from lorasrv_kernels.tiles import Delta, Module, Segments
from lorasrv_kernels.work import num_splits, plan_work

RANKS = (1, 16, 17, 256)
BATCHES = ((1, 1, 1), (1, 64), (1, 65, 200))  # rows of each segment
POOL = torch.empty(1 << 20, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 32


SHAPES = tuple(
    Shape(hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers)
    for hidden, intermediate, heads, kv_heads, head_dim, layers in (
        (192, 512, 6, 2, 32, 4),  # the demo's
        (768, 2048, 12, 12, 64, 12),  # 125M
        (576, 1536, 9, 3, 64, 30),  # SmolLM 135M
        (896, 4864, 14, 2, 64, 24),  # Qwen 2 0.5B
        (2048, 8192, 32, 8, 64, 16),  # Llama 3 1B
        (2560, 6912, 32, 32, 80, 32),  # StableLM 3B
        (3072, 8192, 32, 32, 96, 32),  # Phi 3
        (1536, 8960, 12, 2, 128, 28),  # Qwen 2 1.5B
        (3072, 8192, 24, 8, 128, 28),  # Llama 3 3B
        (4096, 14336, 32, 8, 128, 32),  # Llama 3 8B, Mistral
        (5120, 17408, 40, 8, 128, 40),  # Qwen 3 14B
        (8192, 28672, 64, 8, 128, 80),  # Llama 3 70B
        (8192, 3584, 8, 1, 128, 80),  # its eighth
        (6144, 16384, 48, 4, 128, 40),  # 12 query heads of a kv head
        (3072, 24576, 16, 16, 256, 28),  # Gemma 7B
        (2048, 16384, 8, 1, 256, 18),  # Gemma 2B
        (72, 200, 4, 1, 64, 2),  # rows that are not aligned
    )
)


def launch_all(shape: Shape, dtype: torch.dtype) -> None:
    layout = PageLayout(
        num_layers=shape.layers,
        block_tokens=16,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        itemsize=dtype.itemsize,
    )
    own, all_own = shape.heads * shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    modules = module_geometry(
        layout,
        (
            *(
                ("q", shape.hidden, own),
                ("k", shape.hidden, all_own // 2 - own // 2),
                ("v", shape.hidden, (all_own - own) // 2),
            ),
            *(("o", own, shape.hidden), ("gate", shape.hidden, shape.intermediate)),
            *(("up", shape.hidden, shape.intermediate), ("down", shape.intermediate, shape.hidden)),
        ),
    )
    qkv, o, gate_up, down = modules[:3], modules[3:4], modules[4:6], modules[6:]
    for rows, rank in product(BATCHES, (None, *RANKS)):
        num_rows = sum(rows) + 1  # one without an adapter
        segments = None if rank is None else segments_of(rows, rank, num_rows)

        def rows_of(width: int, num_rows: int = num_rows) -> Tensor:
            return torch.empty(num_rows, width, dtype=dtype)

        deltas = [delta_of(rows_of, group, segments) for group in (qkv, o, gate_up, down)]
        cos, sin = torch.empty(num_rows, 2, shape.head_dim // 2, dtype=dtype).unbind(1)
        kv = torch.empty(2, shape.layers, 2, 16, shape.kv_heads, shape.head_dim, dtype=dtype)
        slots, weight = torch.empty(num_rows, dtype=torch.int64), torch.empty(shape.hidden, dtype=dtype)
        for norms in (None, (torch.empty(shape.head_dim, dtype=dtype),) * 2):
            query = gpu.rope_write_kv(rows_of(all_own), deltas[0], norms, 1e-5, cos, sin, kv, 1, slots)
        x = gpu.rms_norm(rows_of(shape.hidden), weight, 1e-5)
        for delta in (deltas[1], deltas[3]):
            gpu.add_rms_norm(x, rows_of(shape.hidden), delta, weight, 1e-5)
            if delta is not None:
                gpu.add(x, rows_of(shape.hidden), delta)
        gpu.silu_mul(rows_of(2 * shape.intermediate), deltas[2])
        if rank in (None, 16):
            attend(shape, query, kv, rows)


def segments_of(rows: tuple[int, ...], rank: int, num_rows: int) -> Segments:
    bounds = [sum(rows[:index]) for index in range(len(rows) + 1)]
    starts, ends = (list(side) for side in zip(*pairwise(bounds), strict=True))
    return Segments(
        starts=torch.tensor(starts, dtype=torch.int32),
        ends=torch.tensor(ends, dtype=torch.int32),
        directories=torch.zeros(len(rows), dtype=torch.int32),
        scales=torch.ones(len(rows)),
        num_modules=7,
        max_rank=rank,
        work=plan_work(starts, ends, [rank] * len(rows), num_rows).upload(torch.device("cpu")),
    )


def delta_of(rows_of: Any, modules: tuple[Module, ...], segments: Segments | None) -> Delta | None:
    """As `gpu.project` leaves it, and expanded for those who use the kernels alone."""
    if segments is None:
        return None
    x = rows_of(modules[0].a.cols)
    h = torch.empty(num_splits(x.shape[1], len(x)), len(modules), len(x), -(-segments.max_rank // 16) * 16)
    gpu.sgmv_shrink(x, POOL, segments, 1, modules, h)
    gpu.sgmv_expand(h, POOL, segments, 1, modules, rows_of(sum(module.b.cols for module in modules)))
    return Delta(h=h, pool=POOL, segments=segments, layer=1, modules=modules)


def attend(shape: Shape, query: Tensor, kv: Tensor, rows: tuple[int, ...]) -> None:
    contexts = [300 + count for count in rows]
    tables = torch.zeros(len(rows), 64, dtype=torch.int32)
    nothing = torch.empty(0, dtype=torch.int32)
    for capability, deterministic, window in product((80, 90), (False, True), (None, 128)):
        table = tiling(
            shape.head_dim,
            shape.heads // shape.kv_heads,
            query.dtype,
            capability=capability,
            deterministic=deterministic,
        )
        work = build_attention_work(rows, contexts, table)
        gpu.paged_attention(query, kv, 1, tables, nothing, nothing, window, torch.empty_like(query), work=work)


def draw(dtype: torch.dtype) -> None:
    for vocab, min_p in product((512, 32000, 128256, 151936, 262144), (None, torch.full((2,), 0.1))):
        ones, numbers = torch.ones(2), torch.zeros(2, dtype=torch.int64)
        rows = torch.tensor([0]), torch.tensor([1])
        sampling.sample(
            torch.zeros(2, vocab, dtype=dtype), ones, ones, numbers + 3, min_p, numbers, numbers, numbers, *rows
        )


def identity(name: str, signature: Any, constants: Any, attrs: Any, options: Any) -> str:
    """All that a kernel is compiled from."""
    shown = {".".join(map(str, path)): value for path, value in constants if value is not None}
    divisible = sorted(list(path) for path, value in attrs if value)
    options = {key: options[key] for key in ("num_warps", "num_stages", "maxnreg")}
    return json.dumps([name, [str(kind) for kind in signature], shown, divisible, options], sort_keys=True, default=str)


def of_source(source: ASTSource, options: dict[str, int]) -> str:
    parsed = make_backend(GPUTarget("cuda", 90, 32)).parse_options(options)
    signature = [list(kind) if isinstance(kind, tuple) else kind for kind in source.signature.values()]
    constants = [(path, value) for path, value in source.constants.items()]
    return identity(source.name, signature, constants, source.attrs.items(), vars(parsed))


def launched() -> Iterator[str]:
    found: set[str] = set()

    def stop(*, fn: Any, **call: Any) -> bool:
        data = json.loads(call["compile"]["specialization_data"])
        constants = zip(data["constant_keys"], data["constant_vals"], strict=True)
        attrs = zip(data["attrs_keys"], data["attrs_vals"], strict=True)
        found.add(identity(fn.name, data["signature"].values(), constants, attrs, data["options"]))
        return True

    driver.set_active(FakeDriver())
    knobs.runtime.jit_cache_hook = stop
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            launch_all(shape, dtype)
        draw(dtype)
    yield from sorted(found)


def main() -> None:
    table = {of_source(gate.source(variant), variant.options): variant.name for variant in gate.variants()}
    found = set(launched())
    print(json.dumps({"missing": sorted(found - table.keys()), "idle": [table[key] for key in table.keys() - found]}))


if __name__ == "__main__":
    main()
