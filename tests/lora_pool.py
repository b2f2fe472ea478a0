"""Adapters of many ranks in a pool: their tiles on scattered pages, everything else NaN."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorasrv.memory.layout import PageLayout
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import PackedModule, module_geometry, pack_adapter
from lorasrv_kernels.tiles import Module, Segments
from lorasrv_kernels.work import Work, plan_work

NUM_LAYERS = 2
Shape = tuple[str, int, int]  # name, in_features, out_features


@dataclass(frozen=True, kw_only=True)
class Adapter:
    directory: int
    max_rank: int
    pages: list[int]
    modules: Mapping[tuple[int, int], PackedModule]  # by (layer, module)


@dataclass(frozen=True, kw_only=True)
class Range:
    start: int
    end: int
    adapter: Adapter
    scale: float = 1.0


@dataclass(kw_only=True)
class LoraPool:
    """A pool of `num_pages` pages; a page holds the KV of `kv_heads` heads of 32 elements."""

    shapes: Sequence[Shape]
    dtype: torch.dtype
    device: torch.device
    num_pages: int = 512
    kv_heads: int = 4
    seed: int = 0
    layout: PageLayout = field(init=False)
    storage: PageStorage = field(init=False)
    geometry: tuple[Module, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.layout = PageLayout(
            num_layers=NUM_LAYERS,
            block_tokens=16,
            num_kv_heads=self.kv_heads,
            head_dim=32,
            itemsize=self.dtype.itemsize,
        )
        self.storage = PageStorage(self.layout, self.num_pages, self.dtype, self.device)
        self.storage.bytes.view(self.dtype).fill_(float("nan"))
        self.geometry = module_geometry(self.layout, self.shapes)
        self._random = random.Random(self.seed)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._free = self._random.sample(range(self.num_pages), self.num_pages)

    def load(self, ranks: Mapping[int, int]) -> Adapter:
        """A new adapter, from the rank of each module that it changes."""
        return self._write(
            [
                PackedModule(
                    layer=layer,
                    module=index,
                    rank=rank,
                    scale=self._random.uniform(0.2, 1.5),
                    a=self.normal(rank, self.shapes[index][1]) / self.shapes[index][1] ** 0.5,
                    b=self.normal(self.shapes[index][2], rank) / rank**0.5,
                )
                for layer in range(NUM_LAYERS)
                for index, rank in ranks.items()
            ]
        )

    def unload(self, adapter: Adapter) -> None:
        """Its pages are NaN again."""
        for page in adapter.pages:
            self.storage.pages[page].view(self.dtype).fill_(float("nan"))
        self._free = self._random.sample([*self._free, *adapter.pages], len(self._free) + len(adapter.pages))

    def move(self, adapter: Adapter) -> Adapter:
        self.unload(adapter)
        return self._write(list(adapter.modules.values()))

    def _write(self, modules: list[PackedModule]) -> Adapter:
        packed = pack_adapter(modules, self.layout, tuple(self.shapes))
        pages = [self._free.pop() for _ in range(packed.num_pages)]
        copy = self.storage.write_adapter(packed, pages, wait_for_steps=True)
        if copy.event is not None:
            copy.event.synchronize()
        by_place = {(m.layer, m.module): m for m in modules}
        return Adapter(directory=copy.directory, max_rank=packed.max_rank, pages=pages, modules=by_place)

    def normal(self, *shape: int) -> Tensor:
        """Fresh values in the pool's type, on the CPU."""
        return torch.randn(shape, generator=self._generator).to(self.dtype)

    def segments(self, num_rows: int, ranges: Sequence[Range], height: int | None = None, spare: int = 0) -> Segments:
        """`spare` entries stand behind each list, and mean nothing."""
        starts, ends = [r.start for r in ranges], [r.end for r in ranges]
        ranks = [r.adapter.max_rank for r in ranges]
        plan = plan_work(starts, ends, ranks, num_rows, height)
        junk = 0x7ABCDEF

        def tensor(values: Sequence[object], width: int, dtype: torch.dtype = torch.int32) -> Tensor:
            table = torch.full((len(values) + spare, width), junk, dtype=dtype)
            table[: len(values)] = torch.tensor(values, dtype=dtype).view(-1, width)
            return table.to(self.device)

        return Segments(
            starts=torch.tensor(starts, dtype=torch.int32),
            ends=torch.tensor(ends, dtype=torch.int32),
            directories=tensor([r.adapter.directory for r in ranges], 1).squeeze(1),
            scales=tensor([r.scale for r in ranges], 1, torch.float32).squeeze(1),
            num_modules=len(self.shapes),
            max_rank=max(ranks, default=1),
            work=Work(
                height=plan.height,
                rank_step=plan.rank_step,
                row_blocks=tensor(plan.row_blocks, 4),
                rank_blocks=tensor(plan.rank_blocks, 2),
                counts=torch.tensor(
                    [len(plan.row_blocks), len(plan.rank_blocks)], dtype=torch.int32, device=self.device
                ),
            ),
        )
