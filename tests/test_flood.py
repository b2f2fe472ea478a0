"""Floods of frames by a peer that keeps no rules: what it costs the server, and that a neighbour does not notice."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from http2_frames import CANCEL, PING, RST_STREAM, Connection, call_headers, frame
from keyed import TENANT_ROLES, KeyRing, keyed_server
from lorasrv.client import AsyncClient

# Of six floods: some 560 bytes a reset, less than a call keeps while it runs. The allocator takes up to 19 MiB until it
# has enough for what piles up.
MAX_GROWTH_BYTES = 32 << 20
NUM_PINGS = 100_000
NUM_RESETS = 10_000
PAGE_BYTES = 4096


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.fixture
async def flooded(tmp_path: Path) -> AsyncIterator[tuple[str, str, AsyncClient]]:
    """A server's address, a key, and a client that does no wrong."""
    ring = KeyRing(tmp_path / "keys.toml")
    key, own = ring.add("rival", TENANT_ROLES), ring.add("acme", TENANT_ROLES)
    async with (
        keyed_server(tmp_path, ring) as running,
        AsyncClient(running.address, api_key=own) as neighbour,
    ):
        yield running.address, key, neighbour
        while running.engine.running:
            await asyncio.sleep(0.005)


async def growth(flood: Callable[[], None], neighbour: AsyncClient, rounds: int = 6) -> int:
    """Bytes that as many floods leave behind, after as many that warm up, with the neighbour at work all the while.

    What is left behind stays for good; memory of calls that still pile up at a flood's end is gone at another's. Hence
    the least of each half.
    """
    expected = (await neighbour.generate("neighbour", adapter="base")).text
    sizes = []
    for _ in range(2 * rounds):
        flooding = asyncio.create_task(asyncio.to_thread(flood))
        while not flooding.done():
            assert (await neighbour.generate("neighbour", adapter="base")).text == expected
        await flooding
        sizes.append(rss_bytes())
    return min(sizes[rounds:]) - min(sizes[:rounds])


async def test_a_flood_of_pings(flooded: tuple[str, str, AsyncClient]) -> None:
    address, _, neighbour = flooded

    def flood() -> None:
        with Connection(address) as connection:
            pings = frame(PING, 0, 0, b"12345678") * NUM_PINGS
            connection.send(pings)
            connection.read(len(pings))

    assert await growth(flood, neighbour) < MAX_GROWTH_BYTES


@pytest.mark.parametrize("with_key", [False, True])
async def test_a_flood_of_calls_that_are_reset(flooded: tuple[str, str, AsyncClient], with_key: bool) -> None:
    address, key, neighbour = flooded
    metadata = {"authorization": f"Bearer {key}"} if with_key else {}

    def flood() -> None:
        path, cancel = "/lorasrv.v1.GenerationService/Generate", struct.pack(">I", CANCEL)
        with Connection(address) as connection:
            for stream in range(1, 2 * NUM_RESETS, 2):
                connection.send(call_headers(stream, path, **metadata) + frame(RST_STREAM, 0, stream, cancel))

    assert await growth(flood, neighbour) < MAX_GROWTH_BYTES
