"""The `lorasrv` command of this tree in processes of its own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

from running_server import subprocess_env


def command_folder(folder: Path) -> Path:
    """A folder for PATH with `lorasrv` and `python`, which import what this process does."""
    folder.mkdir()
    for name, arguments in (("lorasrv", "-m lorasrv.cli "), ("python", "")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
        script.chmod(0o755)
    return folder


def command_env(bin_folder: Path, home: Path, **variables: str) -> dict[str, str]:
    """An environment with those commands, and a user who has configured nothing."""
    inherited = {key: value for key, value in subprocess_env().items() if not key.startswith(("LORASRV_", "XDG_"))}
    # Entries of PYTHONPATH are for other folders than this one too.
    inherited["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
    return {**inherited, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HOME": str(home), **variables}


def bash(script: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "--norc", "-c", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
