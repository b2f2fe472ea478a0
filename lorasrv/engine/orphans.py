"""A process that is worth nothing without its parent ends with it."""

import os
import threading
import time

_CHECK_S = 1.0
_ORPHANED = 3


def end_with_parent(parent_pid: int) -> None:
    """From now on, in a thread of its own: the parent may die while the main thread is at work."""
    threading.Thread(target=_watch, args=(parent_pid,), daemon=True).start()


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_CHECK_S)
    os._exit(_ORPHANED)
