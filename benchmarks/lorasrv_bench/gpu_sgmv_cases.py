"""Which LoRA products are measured, the most telling first, and how each is laid into the pool."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.tensors import module_geometry
from lorasrv_bench.gpu_floors import Floor, sgmv_floor
from lorasrv_bench.gpu_kernels import segments
from lorasrv_bench.gpu_models import GROUPS, ModelShape
from lorasrv_bench.gpu_pool import DTYPE, LaidAdapter, adapter_form, lay, page_layout
from lorasrv_bench.gpu_section import NotRun
from lorasrv_bench.gpu_sizes import Size
from lorasrv_kernels.tiles import Module, Segments


@dataclass(frozen=True, kw_only=True)
class SgmvCase:
    """`tokens` rows, shared out evenly among `adapters` adapters of one rank, through the modules of one group."""

    model: ModelShape
    group: str
    rank: int
    tokens: int
    adapters: int

    @property
    def labels(self) -> dict[str, object]:
        return {
            "model": self.model.name,
            "group": self.group,
            "rank": self.rank,
            "tokens": self.tokens,
            "adapters": self.adapters,
        }

    @property
    def module_ids(self) -> tuple[int, ...]:
        return GROUPS[self.group]

    @property
    def in_features(self) -> int:
        return self.model.module_shapes[self.module_ids[0]][1]

    @property
    def out_features(self) -> tuple[int, ...]:
        return tuple(self.model.module_shapes[module][2] for module in self.module_ids)

    @property
    def rows(self) -> tuple[int, ...]:
        """Of each adapter: they differ by one at most."""
        most, more = divmod(self.tokens, self.adapters)
        return tuple(most + (index < more) for index in range(self.adapters))

    @property
    def floor(self) -> Floor:
        return sgmv_floor(self.in_features, self.out_features, [self.rank] * self.adapters, self.rows, DTYPE.itemsize)


def sgmv_cases(size: Size) -> list[SgmvCase]:
    """All of them. What comes early in every list comes early, so that a run cut short has seen some of everything."""
    lists = (size.ranks, size.loads, size.sgmv_models, tuple(GROUPS))
    ordered = sorted(product(*(range(len(each)) for each in lists)), key=lambda places: (sum(places), places))
    return [
        SgmvCase(
            model=size.sgmv_models[model],
            group=tuple(GROUPS)[group],
            rank=size.ranks[rank],
            tokens=size.loads[load][0],
            adapters=size.loads[load][1],
        )
        for rank, load, model, group in ordered
    ]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same work on data of its own."""

    adapters: tuple[LaidAdapter, ...]
    segments: Segments
    layer: int
    x: Tensor  # [tokens, in_features]
    out: Tensor  # [tokens, sum of out_features]


@dataclass(frozen=True, kw_only=True)
class LaidCase:
    """A case in the pool: variants whose data together is beyond the cache."""

    case: SgmvCase
    form: PackedAdapter
    modules: tuple[Module, ...]
    variants: tuple[Variant, ...]


def num_variants(case: SgmvCase, size: Size) -> int:
    """As many as make three times the cache, and at least two."""
    return max(2, -(-3 * size.cache_bytes // case.floor.num_bytes))


def lay_case(case: SgmvCase, size: Size, pool: Tensor, seed: int) -> LaidCase:
    """Adapters of random pages. Raises NotRun where the pool is too small.

    A set of adapters has the modules on as many layers as are needed, and more sets are laid when layers run out.
    """
    layout = page_layout(case.model)
    wanted = num_variants(case, size)
    num_layers = min(layout.num_layers, wanted)
    form = adapter_form(case.model, layout, case.rank, case.module_ids, num_layers)
    num_sets = -(-wanted // num_layers)
    num_pages = pool.numel() // layout.page_bytes
    needed = num_sets * case.adapters * form.num_pages
    if needed > num_pages:
        raise NotRun(f"{needed} pages of adapters do not fit the {num_pages} of the pool")
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(num_pages, generator=generator)[:needed].view(num_sets, case.adapters, form.num_pages)
    variants: list[Variant] = []
    for index in range(num_sets):
        adapters = tuple(lay(pool, layout.page_bytes, form, own) for own in pages[index].tolist())
        step = segments(
            case.rows,
            [adapter.directory for adapter in adapters],
            case.rank,
            len(case.model.module_shapes),
            pool.device,
        )
        variants += [
            Variant(
                adapters=adapters,
                segments=step,
                layer=layer,
                x=_normal(case.tokens, case.in_features, pool.device),
                out=_normal(case.tokens, sum(case.out_features), pool.device),
            )
            for layer in range(min(num_layers, wanted - index * num_layers))
        ]
    geometry = module_geometry(layout, case.model.module_shapes)
    return LaidCase(
        case=case,
        form=form,
        modules=tuple(geometry[module] for module in case.module_ids),
        variants=tuple(variants),
    )


def _normal(rows: int, cols: int, device: torch.device) -> Tensor:
    return torch.randn(rows, cols, dtype=DTYPE, device=device)


def some(items: Sequence[int], most: int) -> list[int]:
    """At most so many, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    step = (len(items) - 1) / (most - 1) if most > 1 else 0
    return [items[round(index * step)] for index in range(most)]
