"""A builder process: `python -m lorasrv.engine.builder`, started by `builder_child`, some for each engine.

It reads versions out of the registry's blobs and packs them into pages of the engine's host arena. It knows no torch,
so it starts fast and stays small, and it gives way to the engine, which has streams to serve.
"""

import argparse
import json
import logging
import os
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasrv.config import DType
from lorasrv.engine.builder_messages import Build, Built, Decoder, Failed, Measure, Measured, Message, Started, encode
from lorasrv.engine.fitting import ITEMSIZES, page_layout
from lorasrv.engine.orphans import end_with_parent
from lorasrv.engine.packer import Packer
from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.arena import map_pages
from lorasrv.model.base_shapes import base_shapes
from lorasrv.model.families import read_architecture
from lorasrv_adapters.blobs import BlobStore
from lorasrv_adapters.errors import AdapterError, CorruptBlob
from lorasrv_adapters.published import open_version

_NICE = 10
_RECEIVE_BYTES = 1 << 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuilderSettings:
    """What a builder needs to know of its engine, but the files: `num_pages` are the arena's."""

    blob_root: str
    model_path: str
    dtype: DType
    block_tokens: int
    max_rank: int
    num_pages: int

    def encode(self) -> str:
        return json.dumps(asdict(self))


class Builder:
    """Answers one message after the other."""

    def __init__(self, settings: BuilderSettings, arena: int) -> None:
        architecture = read_architecture(settings.model_path)
        layout = page_layout(architecture, settings.block_tokens, ITEMSIZES[settings.dtype])
        self._packer = Packer(layout=layout, module_shapes=architecture.module_shapes())
        self._pages = map_pages(arena, settings.num_pages, layout.page_bytes)
        self._blobs = BlobStore(Path(settings.blob_root))
        self._base = base_shapes(settings.model_path, settings.dtype)
        self._max_rank = settings.max_rank

    def answer(self, message: Message) -> Message:
        match message:
            case Measure(digest=digest) | Build(digest=digest):
                try:
                    return self._measure(message) if isinstance(message, Measure) else self._build(message)
                except CorruptBlob as error:
                    return Failed(digest=digest, corrupt=True, message=str(error))
                except (AdapterError, AdapterLoadFailed) as error:
                    return Failed(digest=digest, corrupt=False, message=str(error))
                except Exception:  # whatever goes wrong fails this adapter's requests, nothing else
                    _log.exception("version %s could not be read", digest)
                    return Failed(digest=digest, corrupt=False, message="it could not be read")
            case _:
                raise TypeError(f"{type(message).__name__} is no message to a builder")

    def _measure(self, message: Measure) -> Measured:
        """From the header alone, unless that is wrong or the image may be built: then all bytes say whether they are
        damaged."""
        digest, places = message.digest, message.places
        try:
            files = open_version(self._blobs, digest, self._base, self._max_rank, verify_weights=bool(places))
        except AdapterError:
            if places:
                raise
            files = open_version(self._blobs, digest, self._base, self._max_rank)
        plan = self._packer.plan(files.spec)
        built = plan.num_pages <= len(places)
        if built:
            self._packer.fill(files, plan, self._pages, places[: plan.num_pages])
        return Measured(
            digest=digest,
            num_pages=plan.num_pages,
            num_tiles=len(plan.placed.tiles),
            max_rank=plan.max_rank,
            built=built,
        )

    def _build(self, message: Build) -> Built:
        files = open_version(self._blobs, message.digest, self._base, self._max_rank)
        self._packer.fill(files, self._packer.plan(files.spec), self._pages, message.places)
        return Built(digest=message.digest)


def main(argv: list[str] | None = None) -> int:
    """Ends when the engine closes the channel, or is gone."""
    parser = argparse.ArgumentParser(prog="python -m lorasrv.engine.builder")
    parser.add_argument("--settings", required=True, type=_settings, help="BuilderSettings as JSON")
    parser.add_argument("--arena", required=True, type=int, help="descriptor of the arena's file")
    parser.add_argument("--channel", required=True, type=int, help="descriptor of the socket to the engine")
    parser.add_argument("--parent-pid", required=True, type=int, help="the builder ends when this process is gone")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s builder[%(process)d] %(message)s")
    end_with_parent(arguments.parent_pid)
    os.nice(_NICE)
    builder, decoder = Builder(arguments.settings, arguments.arena), Decoder()
    # With words unread on the way to it, an engine that is gone shows as an error.
    with socket.socket(fileno=arguments.channel) as channel, suppress(ConnectionResetError, BrokenPipeError):
        channel.sendall(encode(Started(pid=os.getpid())))
        while data := channel.recv(_RECEIVE_BYTES):
            for message in decoder.feed(data):
                channel.sendall(encode(builder.answer(message)))
    return 0


def _settings(text: str) -> BuilderSettings:
    fields: dict[str, Any] = json.loads(text)
    return BuilderSettings(**fields)


if __name__ == "__main__":
    sys.exit(main())
