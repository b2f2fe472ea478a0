"""What the memory economy is asked, and against what: arms that differ in where adapters are, and nothing else.

Thousands: the same requests, once to adapters drawn from all that are registered, once in turn to as many as the pool
holds. Lengths are all alike, so that requests end in the order in which they began: those under way are neighbours in
that order, and name different adapters in both arms. A request's adapter has the same rank in both.

Storm: a steady stream beside adapters that nobody has asked for, all at once; and again when these are resident.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from lorasrv_bench.load import Call
from lorasrv_bench.workloads import Arrival, Workload


def even_arrivals(adapters: Sequence[int], prompt_tokens: int, output_tokens: int) -> list[Arrival]:
    """Requests of one size, for a closed loop."""
    return [
        Arrival(at_s=0.0, adapter=adapter, tenant=0, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        for adapter in adapters
    ]


def among_all(requests: int, num_adapters: int, num_ranks: int, seeds: Sequence[int]) -> list[int]:
    """Adapters drawn alike from all whose rank the request has: request i that of adapter i modulo `num_ranks`."""
    drawn = np.random.default_rng(seeds).integers(0, num_adapters // num_ranks, requests)
    return [int(place) * num_ranks + index % num_ranks for index, place in enumerate(drawn)]


def in_turn(requests: int, num_adapters: int) -> list[int]:
    return [index % num_adapters for index in range(requests)]


def storm_on(workload: Workload, first: int) -> list[Arrival]:
    """A cold storm whose cold adapters are numbered from `first` on, beside the hot ones from 0 on."""
    hot = len(workload.resident)
    return [
        replace(arrival, adapter=first + arrival.adapter - hot)
        if arrival.adapter is not None and arrival.adapter >= hot
        else arrival
        for arrival in workload.arrivals
    ]


def distinct_adapters(calls: Sequence[Call]) -> float:
    """How many different adapters were under way at a time, on the mean over time."""
    changes = sorted(
        change for call in calls for change in ((call.sent_s, 1, call.adapter), (call.ended_s, -1, call.adapter))
    )
    open_of: dict[int | None, int] = {}
    area = 0.0
    for (at_s, step, adapter), (next_s, _, _) in pairwise([*changes, changes[-1]]):
        open_of[adapter] = open_of.get(adapter, 0) + step
        area += sum(count > 0 for count in open_of.values()) * (next_s - at_s)
    return area / (changes[-1][0] - changes[0][0])


def gaps_in_storm(calls: Sequence[Call], hot: int) -> list[float]:
    """Gaps between the hot streams' tokens while requests of the storm were under way."""
    storm = [call for call in calls if call.adapter is not None and call.adapter >= hot]
    begun_s, ended_s = min(call.sent_s for call in storm), max(call.ended_s for call in storm)
    return [
        b - a for call in calls if call not in storm for a, b in pairwise(call.piece_s) if a < ended_s and b > begun_s
    ]
