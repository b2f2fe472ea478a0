"""What the front process and the engine say to each other, and its bytes: a tag, then msgpack. No pickle.

This module, `process`, `child` and `client` need msgspec and pyzmq. The rest of the engine runs without them, so that a
bare GPU box can import it.
"""

from typing import Any

import msgspec

from lorasrv.engine.messages import (
    Cancel,
    CancelWarm,
    Configure,
    GetStatus,
    Heartbeat,
    Message,
    Ready,
    Shutdown,
    StartFailed,
    StatusReply,
    Step,
    Submit,
)
from lorasrv.types import Warm, Warmed

# So many messages of the engine wait at each end of the channel; behind them they merge (`engine.outbox`).
MESSAGES_AHEAD = 4

# A message's tag is its place here: append, never reorder.
_TYPES: tuple[type[Message], ...] = (
    Configure,
    Submit,
    Cancel,
    GetStatus,
    Shutdown,
    Ready,
    Step,
    StatusReply,
    Heartbeat,
    StartFailed,
    Warm,
    CancelWarm,
    Warmed,
)
_TAGS = {kind: bytes([tag]) for tag, kind in enumerate(_TYPES)}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: tuple[msgspec.msgpack.Decoder[Any], ...] = tuple(msgspec.msgpack.Decoder(kind) for kind in _TYPES)


class MalformedMessage(ValueError):
    """Bytes that are no message. Both ends run the same code, so this is a defect, never a client's mistake."""


def encode(message: Message) -> bytes:
    return _TAGS[type(message)] + _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Raises MalformedMessage; ConfigurationError for a Configure whose settings contradict each other."""
    if not data:
        raise MalformedMessage("an empty message")
    tag = data[0]
    if tag >= len(_TYPES):
        raise MalformedMessage(f"tag {tag}; the last known is {len(_TYPES) - 1}")
    try:
        return _DECODERS[tag].decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"{_TYPES[tag].__name__}: {error}") from error
