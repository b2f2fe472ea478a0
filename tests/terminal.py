"""The `lorasrv` command at a terminal of its own."""

import asyncio
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from running_server import subprocess_env, until


class Terminal:
    """The command at a terminal of its own: what is typed goes in, all that it shows gathers in `shown`."""

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        self.process = process
        self.shown = ""
        self._fd = fd
        asyncio.get_running_loop().add_reader(fd, self._read)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    async def shows(self, text: str) -> None:
        try:
            await asyncio.wait_for(until(lambda: text in self.shown), 20)
        except TimeoutError:
            raise AssertionError(f"{text!r} is not in {self.shown!r}") from None

    async def ends(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 60)

    def _read(self) -> None:
        try:
            self.shown += os.read(self._fd, 4096).decode().replace("\r\n", "\n")
        except OSError:  # its other end is closed
            self.close()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)


@asynccontextmanager
async def terminal(*arguments: str, kind: str = "dumb") -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    program = "import os, fcntl, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    program += "from lorasrv.cli.main import app; app()"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**subprocess_env(), "TERM": kind},
    )
    os.close(theirs)
    screen = Terminal(process, ours)
    try:
        yield screen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        screen.close()
        os.close(ours)
