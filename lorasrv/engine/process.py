"""The engine process: `python -m lorasrv.engine.process`, started by `child.EngineChild`, one for each engine."""

import argparse
import gc
import importlib
import logging
import sys
import time
from collections.abc import Callable

import zmq

from lorasrv.config import EngineConfig
from lorasrv.engine.channel import MESSAGES_AHEAD, decode, encode
from lorasrv.engine.loop import Core, serve_loop
from lorasrv.engine.messages import Configure, FromEngine, Message, Ready, StartFailed, failure_of
from lorasrv.engine.orphans import end_with_parent
from lorasrv.engine.outbox import Outbox
from lorasrv.errors import InternalError, LorasrvError
from lorasrv.types import EngineInfo

CoreFactory = Callable[[EngineConfig], tuple[Core, EngineInfo]]
DEFAULT_FACTORY = "lorasrv.engine.build:build_core"

_log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 after Shutdown, 1 when start-up failed or the engine broke."""
    parser = argparse.ArgumentParser(prog="python -m lorasrv.engine.process")
    parser.add_argument("--address", required=True, help="where the parent listens, ipc://…")
    parser.add_argument("--parent-pid", required=True, type=int, help="the engine ends when this process is gone")
    parser.add_argument("--factory", default=DEFAULT_FACTORY, help="module:function that builds the core")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine[%(process)d] %(message)s")
    end_with_parent(arguments.parent_pid)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.SNDHWM, MESSAGES_AHEAD)
        socket.connect(arguments.address)
        return _serve(socket, arguments.factory)


def _serve(socket: zmq.Socket[bytes], factory: str) -> int:
    def try_send(message: FromEngine) -> bool:
        has_room = bool(socket.poll(0, zmq.POLLOUT))
        if has_room:
            socket.send(encode(message))
        return has_room

    outbox = Outbox(try_send)

    def receive(timeout_s: float) -> Message | None:
        outbox.flush()
        wanted = zmq.POLLIN if outbox.is_empty else zmq.POLLIN | zmq.POLLOUT
        return decode(socket.recv()) if socket.poll(int(timeout_s * 1000), wanted) & zmq.POLLIN else None

    try:
        core, info = _build(factory, decode(socket.recv()))
    except LorasrvError as error:
        outbox.send(StartFailed(failure_of(error)))
        return 1
    except Exception:
        _log.exception("the engine could not be built")
        outbox.send(StartFailed(failure_of(InternalError("the engine could not be built; its log says why"))))
        return 1
    spare_collections()
    try:
        outbox.send(Ready(info))
        serve_loop(core, receive, outbox.send, time.monotonic)
        socket.setsockopt(zmq.LINGER, 0)  # who says Shutdown reads no more
        return 0
    except Exception:
        _log.exception("the engine broke")
        return 1
    finally:
        core.close()


def spare_collections() -> None:
    """Serving makes many objects and few cycles: what start-up has made is not looked at again, and looking at all
    requests (tens of milliseconds with thousands of them) is left to the collections that find much."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def _build(factory: str, message: Message) -> tuple[Core, EngineInfo]:
    if not isinstance(message, Configure):
        raise TypeError(f"the first message is {type(message).__name__}, not Configure")
    module, _, name = factory.partition(":")
    build: CoreFactory = getattr(importlib.import_module(module), name)
    return build(message.config)


if __name__ == "__main__":
    sys.exit(main())
