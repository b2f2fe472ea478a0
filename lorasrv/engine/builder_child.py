"""The engine's handle on one builder process. Nothing here blocks but the start, for some milliseconds."""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from itertools import chain

from lorasrv.engine.builder import BuilderSettings
from lorasrv.engine.builder_messages import Build, Decoder, Measure, Message, encode

_RECEIVE_BYTES = 1 << 16


class BuilderChild:
    """Owned by the engine's thread."""

    def __init__(self, settings: BuilderSettings, arena: int) -> None:
        """Raises OSError when no process can be started."""
        self._channel, theirs = socket.socketpair()
        self._decoder = Decoder()
        with theirs:
            arguments = {
                "--settings": settings.encode(),
                "--arena": str(arena),
                "--channel": str(theirs.fileno()),
                "--parent-pid": str(os.getpid()),
            }
            command = [sys.executable, "-P", "-m", "lorasrv.engine.builder"]
            self._process = subprocess.Popen(
                [*command, *chain.from_iterable(arguments.items())],
                stdin=subprocess.DEVNULL,
                pass_fds=(arena, theirs.fileno()),
                # A thread pool for linear algebra would only take up memory.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OPENBLAS_NUM_THREADS": "1",
                },
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._channel.fileno()

    def send(self, message: Measure | Build) -> None:
        """To a builder that has answered all before, so it reads. One that has ended says so in `receive`."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._channel.sendall(encode(message))

    def receive(self) -> list[Message] | None:
        """What has come in, or None when the process has ended."""
        messages: list[Message] = []
        while True:
            try:
                data = self._channel.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            except ConnectionResetError:
                return None
            if not data:
                return messages or None
            messages += self._decoder.feed(data)

    def close(self) -> None:
        """Let it end when it has answered, which nobody hears."""
        self._channel.close()

    def kill(self) -> None:
        self._process.kill()
        self._channel.close()

    def has_ended(self) -> bool:
        """Whether it is gone for good and writes nothing any more."""
        return self._process.poll() is not None

    def wait(self, timeout_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
