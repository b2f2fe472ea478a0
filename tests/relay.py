"""A hop between client and server that stops after so many bytes, where either of them can be killed."""

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

WAIT_S = 60.0


class Relay:
    """Passes connections to `address` on to `target`.

    When clients have sent as many bytes as `stop_at` says, counted over all connections there ever were, no more pass;
    `drop` then breaks the connections. One that the target does not take is closed at once. Each waits for `delay_s`
    before its first byte passes, as if the target were far. Belongs to one thread; its own end with the block.
    """

    def __init__(self, target: str, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s
        self._target = _pair(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._changed = threading.Condition()
        self._limit: int | None = None
        self._taken = 0
        self._passed = 0
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]

    def stop_at(self, num_bytes: int | None) -> None:
        with self._changed:
            self._limit = num_bytes
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nothing more pass from clients, as where a connection is forgotten on the way."""
        with self._changed:
            self._limit = self._taken

    def wait_until_stopped(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._passed == self._limit, WAIT_S), (self._passed, self._limit)

    def drop(self) -> None:
        """Break all connections; bytes that have not passed are lost."""
        with self._changed:
            broken, self._open = self._open, set()
            self._changed.notify_all()
        for each in broken:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        self.drop()
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            time.sleep(self._delay_s)
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._changed:
                self._open |= {client, server}
            for run in (self._up, self._down):
                thread = threading.Thread(target=run, args=(client, server))
                self._threads.append(thread)
                thread.start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                while data:
                    taken = self._take(client, len(data))
                    server.sendall(data[:taken])
                    self._count(taken)
                    data = data[taken:]
        self._close(client, server)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
        self._close(client, server)

    def _take(self, client: socket.socket, num_bytes: int) -> int:
        """How many of the bytes may pass now; waits until some may. Raises OSError when the connection is broken."""
        with self._changed:
            self._changed.wait_for(lambda: client not in self._open or self._limit != self._taken)
            if client not in self._open:
                raise ConnectionResetError
            taken = num_bytes if self._limit is None else min(num_bytes, self._limit - self._taken)
            self._taken += taken
            return taken

    def _count(self, num_bytes: int) -> None:
        with self._changed:
            self._passed += num_bytes
            self._changed.notify_all()

    def _close(self, *sockets: socket.socket) -> None:
        with self._changed:
            self._open -= {*sockets}
            self._changed.notify_all()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _pair(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
