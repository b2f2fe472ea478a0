"""Just enough HTTP/2 to misbehave: frames over a socket, without a library that would keep the rules."""

import socket
import struct
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING = 0, 1, 3, 4, 6
END_STREAM, END_HEADERS = 1, 4
CANCEL = 8


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def header_block(fields: dict[str, str]) -> bytes:
    """HPACK without its table: every field a literal that is not indexed."""
    return b"".join(b"\0" + b"".join(bytes((len(text),)) + text.encode() for text in field) for field in fields.items())


def call_headers(stream: int, path: str, **metadata: str) -> bytes:
    """The frame that opens a gRPC call."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
    fields |= {"te": "trailers", "content-type": "application/grpc", **metadata}
    return frame(HEADERS, END_HEADERS, stream, header_block(fields))


def call_message(stream: int, message: bytes) -> bytes:
    """The frame that a gRPC call's only message goes in."""
    return frame(DATA, END_STREAM, stream, b"\0" + struct.pack(">I", len(message)) + message)


class Connection:
    """A socket that has said hello."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """False when the other side has closed the connection."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def read(self, num_bytes: int) -> None:
        """Read so many bytes, or until the other side closes."""
        try:
            while num_bytes > 0 and (data := self._socket.recv(1 << 16)):
                num_bytes -= len(data)
        except ConnectionResetError:
            return
