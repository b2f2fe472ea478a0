"""LoRA's products against their floor, and against other projects' kernels, all on the same adapters and tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lorasrv_bench.gpu_kernels import sgmv, shrunk
from lorasrv_bench.gpu_peers import Peer, PeerLoad, find_peers
from lorasrv_bench.gpu_pool import WEIGHT_STD, dense_matrices, fill_random, page_layout
from lorasrv_bench.gpu_records import timed
from lorasrv_bench.gpu_section import Section, WrongOutput, check, distance
from lorasrv_bench.gpu_sgmv_cases import LaidCase, SgmvCase, Variant, lay_case, sgmv_cases, some
from lorasrv_bench.gpu_timing import Round, Timing, free_memory
from lorasrv_kernels import reference
from lorasrv_kernels.tiles import Segments

Item = TypeVar("Item")

# bf16 weights and products of two roundings: a wrong adapter is at about 1.4.
LIMIT = 2e-2
_CHECKED_ADAPTERS = 8
# Twice the largest case's adapters, which are 2.4 GB.
_POOL_BYTES = 8 << 30
# What a case takes at least, with its laying out and captures.
_ESTIMATE_S = 1.0


def run(section: Section) -> None:
    peers, missing = find_peers(section.peers, section.device)
    for name, why in missing.items():
        section.skip({"peer": name}, why)
    pool = torch.empty(min(section.size.pool_bytes, _POOL_BYTES), dtype=torch.uint8, device=section.device)
    cases = {str(index): case for index, case in enumerate(sgmv_cases(section.size))}
    section.each(
        {key: case.labels for key, case in cases.items()},
        lambda key: _run_and_free(section, cases[key], peers, pool),
        _ESTIMATE_S,
    )


def _run_and_free(section: Section, case: SgmvCase, peers: Sequence[Peer], pool: Tensor) -> None:
    try:
        _run_case(section, case, peers, pool)
    finally:
        free_memory(section.device)


def _run_case(section: Section, case: SgmvCase, peers: Sequence[Peer], pool: Tensor) -> None:
    ceilings = section.ceilings
    # Directories of the case before must not stay as weights: some of their bytes read as NaN.
    fill_random(pool, WEIGHT_STD, section.seed)
    laid = lay_case(case, section.size, pool, section.seed)
    device = section.device
    expected = [_Expected(laid, variant, pool) for variant in _ends(laid.variants)]
    calls = _our_calls(laid, pool, device)
    error = _check(expected, _ends(calls), "the products")
    ready = Round(calls, device)
    ours, again = ready.time(section.size.case_s), ready.time(section.size.case_s)
    floor_s = case.floor.seconds(ceilings)
    labels = {"peer": "ours"} | case.labels
    section.add(timed(section.name, labels, ours, again=again, floor_s=floor_s, error=error))
    del ready, calls
    if peers:
        loads = _peer_loads(laid, pool)
        for peer in peers:
            with section.case({"peer": peer.name} | case.labels):
                _run_peer(section, laid, peer, loads, expected, ours)
            free_memory(device)


def _run_peer(
    section: Section,
    laid: LaidCase,
    peer: Peer,
    loads: Sequence[PeerLoad],
    expected: Sequence["_Expected"],
    ours: Timing,
) -> None:
    calls = peer.prepare(loads)
    error = _check(expected, _ends(calls), f"what {peer.name} computes")
    timing = Round(calls, section.device).time(section.size.case_s)
    section.add(
        timed(
            section.name,
            {"peer": peer.name} | laid.case.labels,
            timing,
            floor_s=laid.case.floor.seconds(section.ceilings),
            error=error,
            values={"over_ours": timing.median_s / ours.median_s},
        )
    )


def _our_calls(laid: LaidCase, pool: Tensor, device: torch.device) -> list[Callable[[], None]]:
    shrink, expand = sgmv(device)
    h = shrunk(laid.modules, laid.case.tokens, laid.case.rank, device)

    def call(variant: Variant) -> Callable[[], None]:
        def run() -> None:
            shrink(variant.x, pool, variant.segments, variant.layer, laid.modules, h)
            expand(h, pool, variant.segments, variant.layer, laid.modules, variant.out)

        return run

    return [call(variant) for variant in laid.variants]


class _Expected:
    """What some adapters' rows of a variant gain, by the fp32 oracle."""

    def __init__(self, laid: LaidCase, variant: Variant, pool: Tensor) -> None:
        self.variant = variant
        chosen = some(range(laid.case.adapters), _CHECKED_ADAPTERS)
        segments = variant.segments
        part = _only(segments, chosen)
        rows = [range(s, e) for s, e in zip(part.starts.tolist(), part.ends.tolist(), strict=True)]
        self.rows = torch.tensor([row for each in rows for row in each], device=pool.device)
        h = shrunk(laid.modules, laid.case.tokens, laid.case.rank, pool.device)
        gained = torch.zeros_like(variant.out)
        reference.sgmv_shrink(variant.x, pool, part, variant.layer, laid.modules, h)
        reference.sgmv_expand(h, pool, part, variant.layer, laid.modules, gained)
        self.gained = gained[self.rows].float()

    def error(self, call: Callable[[], None]) -> float:
        """Of what a call adds to the variant's output, which is given values too small to hide an error in rounding."""
        out = self.variant.out
        out.normal_(0.0, 0.1 * self.gained.std().item())
        base = out[self.rows].float()
        call()
        if not bool(out.isfinite().all()):
            raise WrongOutput("some output is not finite")
        return distance(out[self.rows].float() - base, self.gained)


def _check(expected: Sequence[_Expected], calls: Sequence[Callable[[], None]], what: str) -> float:
    return max(check(each.error(call), LIMIT, what) for each, call in zip(expected, calls, strict=True))


def _ends(items: Sequence[Item]) -> list[Item]:
    return [items[0], items[-1]]


def _only(segments: Segments, chosen: Sequence[int]) -> Segments:
    """Some of the segments. Oracles do not look at their work."""
    places = torch.tensor(chosen, device=segments.starts.device)
    return replace(
        segments,
        **{name: getattr(segments, name)[places] for name in ("starts", "ends", "directories", "scales")},
    )


def _peer_loads(laid: LaidCase, pool: Tensor) -> list[PeerLoad]:
    case = laid.case
    page_bytes = page_layout(case.model).page_bytes

    def load(variant: Variant) -> PeerLoad:
        dense = [
            dense_matrices(
                pool, page_bytes, laid.form, variant.adapters, variant.layer, module, case.model.module_shapes
            )
            for module in case.module_ids
        ]
        return PeerLoad(
            x=variant.x,
            out=variant.out,
            a=tuple(a for a, _ in dense),
            b=tuple(b.transpose(1, 2).contiguous() for _, b in dense),
            rows=case.rows,
        )

    return [load(variant) for variant in laid.variants]
