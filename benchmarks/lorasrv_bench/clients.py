"""Client processes: each sends its share of a workload and hands back what it has measured."""

import asyncio
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lorasrv_bench.asks import Ask
from lorasrv_bench.backends import Server
from lorasrv_bench.load import Call, CallFailed, Sent, send

_SPAWN = multiprocessing.get_context("spawn")
# From the word go, told to processes that are ready, to the first request.
LEAD_S = 0.2
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process sends, where to, and how many of it at once."""

    server: Server
    asks: tuple[Ask, ...]
    concurrency: int | None


class Clients:
    """Processes that stay for several runs, so that a run begins with connections of its own but no imports."""

    def __init__(self, count: int) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for _ in range(count):
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

    async def send(
        self,
        server: Server,
        asks: Sequence[Ask],
        concurrency: int | None,
        advance: Callable[[bool], None] = lambda failed: None,
    ) -> tuple[list[Sent], float]:
        """Send all requests, each process every n-th of them; what each has measured, and when the word go was.

        `advance` is told of each request that ends whether it failed. A closed loop's places are split between the
        processes.
        """
        count = len(self._pipes)
        for index, pipe in enumerate(self._pipes):
            places = None if concurrency is None else max(1, (concurrency + count - 1 - index) // count)
            pipe.send(Share(server=server, asks=tuple(asks[index::count]), concurrency=places))
        for pipe in self._pipes:
            await _received(pipe)
        start_s = asyncio.get_running_loop().time() + LEAD_S
        for pipe in self._pipes:
            pipe.send(start_s)
        return list(await asyncio.gather(*(_followed(pipe, advance) for pipe in self._pipes))), start_s


async def _received(pipe: Connection) -> Any:
    while not await asyncio.to_thread(pipe.poll, POLL_S):
        pass
    try:
        told = pipe.recv()
    except EOFError:
        raise CallFailed("a client process died") from None
    if isinstance(told, BaseException):
        raise told
    return told


async def _followed(pipe: Connection, advance: Callable[[bool], None]) -> Sent:
    while not isinstance(told := await _received(pipe), Sent):
        for failed in told:
            advance(failed)
    return told


def _serve(orders: Connection) -> None:
    while True:
        try:
            share: Share = orders.recv()
        except EOFError:
            return
        try:
            result: object = asyncio.run(_send(share, orders))
        except Exception as error:
            result = error
        orders.send(result)


async def _send(share: Share, orders: Connection) -> Sent:
    backend = share.server.connect()
    ended: list[bool] = []

    def advance(call: Call) -> None:
        ended.append(call.error is not None)

    async def tell() -> None:
        while True:
            await asyncio.sleep(0.25)
            if ended:
                orders.send(tuple(ended))
                ended.clear()

    orders.send("ready")
    start_s = await asyncio.to_thread(orders.recv)
    telling = asyncio.create_task(tell())
    try:
        return await send(share.asks, backend, start_s=start_s, concurrency=share.concurrency, advance=advance)
    finally:
        telling.cancel()
        await backend.close()
