"""The registry's folder on disk: one process owns it at a time."""

import fcntl
from pathlib import Path
from typing import IO

from lorasrv_adapters.errors import RegistryUnavailable

CATALOGUE_FILE = "catalogue.sqlite3"
_LOCK_FILE = "owner.lock"


def own_folder(data_dir: Path) -> IO[bytes]:
    """Lock the data directory for this process; the lock ends with the file. Raises RegistryUnavailable, OSError."""
    file = (data_dir / _LOCK_FILE).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RegistryUnavailable("the registry's data directory is in use by another process") from None
    return file


def is_owned(data_dir: Path) -> bool:
    """Whether a process owns it. Asking takes the lock for a moment, in which no process can; raises OSError."""
    try:
        with (data_dir / _LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
