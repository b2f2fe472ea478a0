"""A client process of the streaming benchmark: streams at once, each kept whole, timed from the word go."""

import asyncio
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lorasrv.client import AsyncClient

PROMPT = "go"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Streams to open at once, one for each seed."""

    address: str
    seeds: Sequence[int]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What came: per seed its tokens and text; the monotonic time at the end; messages read; CPU seconds used."""

    tokens: dict[int, tuple[int, ...]]
    texts: dict[int, str]
    ended_s: float
    num_messages: int
    cpu_s: float


def serve_load(orders: Connection) -> None:
    """The process: does each Work that comes and answers with its Streamed, until None."""
    while (work := orders.recv()) is not None:
        orders.send(asyncio.run(_load(work)))


async def _load(work: Work) -> Streamed:
    used_s = _cpu_s()
    async with AsyncClient(work.address) as client:
        events = await asyncio.gather(*(_read(client, seed, work.max_tokens) for seed in work.seeds))
    ended_s, cpu_s = time.monotonic(), _cpu_s() - used_s
    deltas = {
        seed: [event for event in of_seed if event.DESCRIPTOR.name == "Delta"]
        for seed, of_seed in zip(work.seeds, events, strict=True)
    }
    return Streamed(
        tokens={seed: tuple(token for delta in each for token in delta.token_ids) for seed, each in deltas.items()},
        texts={seed: "".join(delta.text for delta in each) for seed, each in deltas.items()},
        ended_s=ended_s,
        num_messages=sum(map(len, events)),
        cpu_s=cpu_s,
    )


async def _read(client: AsyncClient, seed: int, max_tokens: int) -> list[Any]:
    sampling = {"seed": seed, "max_tokens": max_tokens, "ignore_eos": True}
    return [event async for event in client.stream(PROMPT, adapter="base", **sampling)]


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
