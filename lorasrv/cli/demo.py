"""`lorasrv demo`: the sample adapters served at once, in a live table; ends by itself and says whether all is well."""

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

import lorasrv
from lorasrv.cli.output import INTERNAL
from lorasrv.cli.status import print_status
from lorasrv.client import Client
from lorasrv.demo.local_server import LocalServer
from lorasrv.demo.run import Kind, Run, draw_runs, served_tasks, stream_all
from lorasrv.errors import ConfigurationError

# Holds about half of the samples, so that adapters are evicted and loaded again while all of them stream.
POOL_MIB = 6


def demo(
    seed: Annotated[int | None, typer.Option(min=0, help="Of the words; drawn when not given.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Folder of the sample model and adapters.")] = None,
    keep: Annotated[bool, typer.Option("--keep", envvar="KEEP", help="Leave the server running.")] = False,
) -> None:
    """Start a server, push the sample adapters, stream from all and the base at once, and check every letter."""
    console = Console()
    folder = samples or Path(lorasrv.__file__).parent.parent / "adapters" / "samples"
    adapters = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if not adapters:
        raise ConfigurationError("no sample adapters found: the demo runs from a checkout, or with --samples FOLDER")
    data_dir = Path(tempfile.mkdtemp(prefix="lorasrv-demo-"))
    options = ("--pool-mib", str(POOL_MIB))
    try:
        with LocalServer(folder / "base", data_dir / "data", data_dir / "log", options) as server:
            all_well = _run(console, server.url, adapters, secrets.randbits(32) if seed is None else seed)
            if keep:
                server.keep()
                console.print(f"The server stays at {server.url}, data in {data_dir}; end it with kill {server.pid}.")
    finally:
        if not keep:
            shutil.rmtree(data_dir)
    raise typer.Exit(0 if all_well else INTERNAL)


def _run(console: Console, url: str, adapters: Sequence[Path], seed: int) -> bool:
    console.print(f"server at {url}; words drawn with seed {seed}")
    tasks = served_tasks({folder.name for folder in adapters})
    with Client(url) as client:
        _push(console, client, adapters)
        runs = draw_runs(tasks, seed)
        with Live(
            _table(runs), console=console, auto_refresh=True, refresh_per_second=12, get_renderable=lambda: _table(runs)
        ):
            asyncio.run(stream_all(url, runs))
        console.print()
        print_status(client.info(), client.status())
    all_well = all(run.as_expected for run in runs)
    num_adapters = len({run.adapter for run in runs if run.kind is Kind.ADAPTER})
    console.print(
        f"{num_adapters} adapters right, the base and the swapped adapter wrong, as they have to be"
        if all_well
        else "NOT as expected: see the table"
    )
    return all_well


def _push(console: Console, client: Client, adapters: Sequence[Path]) -> None:
    with Progress(console=console) as bar:
        for folder in adapters:
            task = bar.add_task(f"push {folder.name}", total=None)
            client.push(
                folder, folder.name, lambda sent, total, task=task: bar.update(task, completed=sent, total=total)
            )


def _table(runs: Sequence[Run]) -> Table:
    table = Table("prompt", "adapter", "asked for", "output", "", "first token")
    for run in runs:
        verdict = "…" if not run.finished else "right" if run.right else "wrong"
        colour = "" if not run.finished else "green" if run.as_expected else "red"
        first = "" if run.time_to_first_token_s is None else f"{run.time_to_first_token_s * 1000:.0f} ms"
        table.add_row(
            f"{run.word}>",
            f"{run.adapter} (swapped)" if run.kind is Kind.SWAPPED else run.adapter,
            run.expected,
            run.output,
            f"[{colour}]{verdict}[/]" if colour else verdict,
            first,
        )
    return table
