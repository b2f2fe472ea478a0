"""What a server says of itself while a run goes on: pool by owner, queues, counters, what is on the device."""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from lorasrv.client import AsyncClient, ClientError
from lorasrv.client.messages import WARM_TIERS
from lorasrv_bench.load import Call

INTERVAL_S = 0.25
OWNERS = ("free", "sequences", "prefix", "adapters")


@dataclass(frozen=True, kw_only=True)
class Look:
    """A server's state at a time of the loop's clock; pages by owner in the order of OWNERS."""

    at_s: float
    pages: tuple[int, ...]
    running: int
    waiting: int
    counters: dict[str, int]
    on_device: frozenset[str]


def look_of(at_s: float, status: Any) -> Look:
    pool, counters = status.pool, status.counters
    return Look(
        at_s=at_s,
        pages=(pool.free_pages, pool.sequence_pages, pool.prefix_pages, pool.adapter_pages),
        running=status.running_requests,
        waiting=status.waiting_requests,
        counters={field.name: getattr(counters, field.name) for field in counters.DESCRIPTOR.fields},
        on_device=frozenset(each.version_digest for each in status.adapters if each.tier == WARM_TIERS["device"]),
    )


@asynccontextmanager
async def watched(client: AsyncClient) -> AsyncIterator[list[Look]]:
    """Looks taken until the block is left, the first before it is entered and the last behind it."""
    loop = asyncio.get_running_loop()

    async def look() -> Look:
        return look_of(loop.time(), await client.status())

    looks = [await look()]

    async def go_on() -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            # A server too busy to answer says nothing of that moment; the run's own calls tell whether it failed.
            with suppress(ClientError):
                looks.append(await look())

    looking = asyncio.create_task(go_on())
    try:
        yield looks
    finally:
        looking.cancel()
    looks.append(await look())


def with_cold(calls: Sequence[Call], looks: Sequence[Look], start_s: float) -> list[Call]:
    """The calls, cold where their version was not on the device at the last look before they were sent."""
    times = [look.at_s - start_s for look in looks]

    def is_cold(call: Call) -> bool:
        before = looks[max(0, bisect_right(times, call.sent_s) - 1)]
        return bool(call.version) and call.version not in before.on_device

    return [replace(call, cold=is_cold(call)) for call in calls]


def with_first_use(calls: Sequence[Call]) -> list[Call]:
    """The calls, cold where their adapter was asked for the first time: for servers that tell nothing of memory."""
    seen: set[int | None] = {None}
    found: dict[int, bool] = {}
    for call in sorted(calls, key=lambda call: call.sent_s):
        found[call.index] = call.adapter not in seen
        seen.add(call.adapter)
    return [replace(call, cold=found[call.index]) for call in calls]
