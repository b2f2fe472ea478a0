"""The front process's handle on one engine process: start it, talk to it, notice its end, end it."""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from lorasrv.engine.channel import MESSAGES_AHEAD, decode, encode
from lorasrv.engine.messages import Message, Shutdown, ToEngine
from lorasrv.errors import ConfigurationError

_POLL_S = 0.2
_SHUTDOWN_S = 5.0
_MAX_ADDRESS_BYTES = 100  # a Unix socket's path ends at 107


class EngineLost(Exception):
    """The process ended or fell silent."""


class EngineChild:
    """One engine process with its channel. Owned by one event loop; must be closed."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        context: zmq.asyncio.Context,
        socket: zmq.asyncio.Socket,
        directory: Path,
    ) -> None:
        self._process = process
        self._context = context
        self._socket = socket
        self._directory = directory

    @classmethod
    async def spawn(cls, factory: str) -> "EngineChild":
        """Start a process that waits for Configure. It imports from where this one does."""
        directory = Path(tempfile.mkdtemp(prefix="lorasrv-"))  # mode 0700: nobody else connects
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.PAIR)
        # Requests are counted at admission already. A bound here would make Cancel wait while a step runs.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, MESSAGES_AHEAD)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            address = str(directory / "engine")
            if len(os.fsencode(address)) > _MAX_ADDRESS_BYTES:
                raise ConfigurationError(f"the temporary folder's name is too long for a socket in it: {address}")
            socket.bind(f"ipc://{address}")
            arguments = ("--address", f"ipc://{address}", "--parent-pid", str(os.getpid()), "--factory", factory)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "lorasrv.engine.process", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the parent, which drains and then says Shutdown
            )
        except BaseException:
            context.destroy()
            shutil.rmtree(directory)
            raise
        return cls(process, context, socket, directory)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Never blocks. What a process that has ended does not read is dropped with it."""
        asyncio.ensure_future(self._socket.send(encode(message))).add_done_callback(_forget)

    async def receive(self, timeout_s: float | None, clock: Callable[[], float]) -> Message:
        """The next message. Raises EngineLost when the process has ended, or said nothing for `timeout_s`."""
        started_s = clock()
        while not await self._socket.poll(int(_POLL_S * 1000)):
            if self._process.returncode is not None:
                # Its last words may still be on their way.
                if await self._socket.poll(int(_POLL_S * 1000)):
                    break
                raise EngineLost(f"the engine process ended with exit status {self._process.returncode}")
            if timeout_s is not None and clock() - started_s >= timeout_s:
                raise EngineLost(f"the engine process said nothing for {timeout_s:g} s")
        return decode(await self._socket.recv())

    async def shutdown(self) -> None:
        """Ask the process to end, and close. Kills it when it takes too long."""
        self.send(Shutdown())
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _SHUTDOWN_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """Kill the process if it runs, and free the channel. Safe to call twice."""
        try:
            if self._process.returncode is None:
                self._process.kill()
            await asyncio.shield(self._process.wait())
        finally:
            self._context.destroy()
            shutil.rmtree(self._directory, ignore_errors=True)


def _forget(sent: asyncio.Task[Any]) -> None:
    """A send that failed or was cancelled ended with its socket; the receiving side reports the loss."""
    if not sent.cancelled():
        sent.exception()
