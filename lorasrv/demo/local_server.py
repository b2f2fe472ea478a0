"""A server of one's own: `lorasrv serve` as a child process on a free port."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lorasrv.errors import EngineUnavailable

STOP_S = 20.0


class LocalServer:
    """Started when the block is entered, stopped when it is left unless `keep` was called.

    Raises EngineUnavailable when the server ends before it is ready; its own words are on stderr then.
    """

    def __init__(self, model: Path, data_dir: Path, log: Path, options: Sequence[str] = ()) -> None:
        arguments = ("serve", "--model", str(model), "--data-dir", str(data_dir), "--listen", "127.0.0.1:0", "--json")
        self._command = [sys.executable, "-m", "lorasrv.cli", *arguments, *options]
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._keep = False
        self.url = ""

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def keep(self) -> None:
        """Leave the server running when the block is left."""
        self._keep = True

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C is for us, and we stop the server in turn.
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = self._log.read_text().strip().splitlines()[-1:]
            raise EngineUnavailable(f"the server did not start: {' '.join(last) or 'it said nothing'}")
        self.url = json.loads(line)["address"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        if self._keep:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
