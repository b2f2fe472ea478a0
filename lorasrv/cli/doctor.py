"""`lorasrv doctor`: what this machine has, and what would keep a server from starting on it."""

from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from lorasrv.cli.diagnosis import Finding, cpu_kernels, data_dir, devices, model, port, serving, versions
from lorasrv.cli.output import OK, REFUSED, JsonOption, print_json
from lorasrv.cli.serve import default_data_dir
from lorasrv.client.messages import DEFAULT_URL

MARKS = {"ok": " ", "note": "?", "problem": "!"}


def doctor(
    data_folder: Annotated[Path | None, typer.Option("--data-dir", help="As for serve, with its default.")] = None,
    port_number: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where serve would listen.")] = int(
        DEFAULT_URL.rpartition(":")[2]
    ),
    model_folder: Annotated[Path | None, typer.Option("--model", help="A model folder to look at.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at device, versions, data directory, port and model; exit code 5 if a server could not start."""
    found = list(_findings(data_folder or default_data_dir(), port_number, model_folder))
    well = all(finding.state != "problem" for finding in found)
    if as_json:
        print_json({"ok": well, "findings": [asdict(finding) for finding in found]})
    else:
        for finding in found:
            print(f"{MARKS[finding.state]} {finding.subject:<12} {finding.detail}")
            if finding.advice is not None:
                print(f"{'':<14} {finding.advice}")
        print("a server can start" if well else "a server cannot start: see the lines with !")
    raise typer.Exit(OK if well else REFUSED)


def _findings(data_folder: Path, port_number: int, model_folder: Path | None) -> Iterator[Finding]:
    yield from versions()
    installed = serving()
    yield installed
    if installed.state == "ok":
        yield from devices(import_module("torch"))
        yield cpu_kernels()
    yield from data_dir(data_folder)
    yield port(port_number)
    if model_folder is not None:
        yield from model(model_folder)
