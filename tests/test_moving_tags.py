"""Twenty streams of a real engine, while what they were asked by moves, and what they run on is deleted and purged."""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorasrv.client import AsyncClient, Client
from lorasrv.client.errors import NotFound
from lorasrv.demo.local_server import LocalServer
from lorasrv.v1.generation_pb2 import Delta, Started
from test_end_to_end import SAMPLES, assert_nothing_held

NUM_STREAMS = 20
# Seconds of work for all together: what is changed meanwhile takes a fraction of that.
NUM_TOKENS = 100
# Any batch gives a stream the same bits.
OPTIONS = ("--pool-mib", "24", "--deterministic")
REFERENCES = ("doomed", "doomed@prod")


@dataclass(frozen=True, kw_only=True)
class Streamed:
    digest: str
    token_ids: list[int]


class Streams:
    """Long streams, of which each waits behind its first delta until `go_on` is set."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()

    async def run(self, adapter: str, seed: int) -> Streamed:
        found = Streamed(digest="", token_ids=[])
        async with AsyncClient(self._url) as client:
            events = client.stream(
                "banana>", adapter=adapter, temperature=9, seed=seed, ignore_eos=True, max_tokens=NUM_TOKENS
            )
            async for event in events:
                match event:
                    case Started():
                        found = Streamed(digest=event.version_digest, token_ids=[])
                    case Delta() if not found.token_ids:
                        found.token_ids.extend(event.token_ids)
                        self._waiting.release()
                        await self.go_on.wait()
                    case Delta():
                        found.token_ids.extend(event.token_ids)
                    case _:
                        pass
        return found

    async def all_begun(self) -> None:
        for _ in range(NUM_STREAMS):
            await self._waiting.acquire()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    with LocalServer(SAMPLES / "base", tmp_path / "data", tmp_path / "log", OPTIONS) as server:
        yield server


def files_of(data: Path) -> set[str]:
    """Digests of the blobs there are; their bytes are what they are named by."""
    found = {path.name: path for path in (data / "blobs").rglob("*") if path.is_file()}
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == name for name, path in found.items())
    return set(found)


@pytest.mark.row(56)
async def test_streams_end_on_the_version_they_began_with(server: LocalServer, tmp_path: Path) -> None:
    with Client(server.url) as client:
        client.push(SAMPLES / "rot13", "neighbour")
        kept = files_of(tmp_path / "data")
        old = client.push(SAMPLES / "upper", "doomed").digest
        client.set_tag("doomed", "prod")
        streams = Streams(server.url)
        streams.go_on.set()
        asked = [(REFERENCES[seed % 2], seed) for seed in range(NUM_STREAMS - 1)] + [("neighbour", 99)]
        alone = await asyncio.gather(*(streams.run(*each) for each in asked))
        assert {each.digest for each in alone[:-1]} == {old}
        assert len({tuple(each.token_ids) for each in alone}) == NUM_STREAMS

        streams = Streams(server.url)
        running = [asyncio.create_task(streams.run(*each)) for each in asked]
        await streams.all_begun()
        new = client.push(SAMPLES / "reverse", "doomed").digest
        client.set_tag("doomed", "prod")
        client.delete_version(f"doomed@sha256:{old}")
        for reference in REFERENCES:
            assert client.generate("banana>", adapter=reference, max_tokens=1).started.version_digest == new
        with pytest.raises(NotFound):
            client.generate("banana>", adapter=f"doomed@sha256:{old}")
        client.delete_adapter("doomed")
        with pytest.raises(NotFound):
            client.generate("banana>", adapter="doomed")
        client.delete_adapter("doomed", purge=True)
        # All of it while some of them run, and not the neighbour alone.
        assert client.status().running_requests > 1
        assert old in files_of(tmp_path / "data")
        streams.go_on.set()
        assert await asyncio.gather(*running) == alone

        assert_nothing_held(client, 10.0)
        for reference in (*REFERENCES, f"doomed@sha256:{old}", f"doomed@sha256:{new}"):
            with pytest.raises(NotFound):
                client.generate("banana>", adapter=reference)
        assert files_of(tmp_path / "data") == kept
        assert not list((tmp_path / "data" / "staging").iterdir())
        # The name is free, and means what is published now.
        assert client.push(SAMPLES / "capital", "doomed").digest not in (old, new)
