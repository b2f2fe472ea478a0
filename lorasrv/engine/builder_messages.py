"""What the engine and its builder processes say to each other: lines of JSON, a message's name and its fields.

Standard library alone, and no pickle: builders start fast, and a bare GPU box has what they need.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Measure:
    """To a builder: how large is this version's image? If it fits into these pages, put it there: the first of them
    hold it then."""

    digest: str
    places: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Build:
    """To a builder: put this version's image into these pages of the arena, which are yours until you answer."""

    digest: str
    places: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A builder is ready for its first message."""

    pid: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`built` where the image is in the pages that were given."""

    digest: str
    num_pages: int
    num_tiles: int
    max_rank: int
    built: bool = False


@dataclass(frozen=True, kw_only=True)
class Built:
    digest: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    """`corrupt`: stored bytes are missing or damaged. `message` is safe to show to clients."""

    digest: str
    corrupt: bool
    message: str


Message = Measure | Build | Started | Measured | Built | Failed
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Measure, Build, Started, Measured, Built, Failed)}


def encode(message: Message) -> bytes:
    return json.dumps([type(message).__name__, asdict(message)]).encode() + b"\n"


class Decoder:
    """Messages out of a stream of bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            name, fields = json.loads(line)
            yield _KINDS[name](**fields)
