"""`lorasrv adapters`: push, list, show, remove, and check a folder without a server."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.table import Table

from lorasrv.cli.connection import UrlOption, connect
from lorasrv.cli.output import JsonOption, message_dict, print_json, print_table, progress, reported_errors
from lorasrv.config import DType, EngineConfig, ModelConfig
from lorasrv.v1 import adapter_pb2

app = typer.Typer(help="Push adapters to a server and look at those it has.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A PEFT adapter folder.")]
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]


@app.command()
def push(
    folder: FolderArgument,
    name: Annotated[str | None, typer.Option(help="The adapter's name; else the folder's.")] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a PEFT folder and publish it as the adapter's newest version."""
    adapter_id = folder.resolve().name if name is None else name
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with (
        reported_errors(),
        connect(url) as client,
        progress(*columns) as bar,
    ):
        task = bar.add_task(adapter_id, total=None)
        version = client.push(folder, adapter_id, lambda sent, total: bar.update(task, completed=sent, total=total))
    if as_json:
        print_json({"adapter_id": adapter_id, "version": message_dict(version)})
    else:
        print(f"{adapter_id}@sha256:{version.digest}")


@app.command()
def ls(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """List the adapters that the server has."""
    with reported_errors(), connect(url) as client:
        found = client.adapters()
    if as_json:
        print_json({"adapters": [message_dict(adapter) for adapter in found]})
        return
    table = Table("adapter", "latest", "versions", "rank", "modules", "tier", box=None)
    for adapter in found:
        version = next((each for each in adapter.versions if each.digest == adapter.tags.get("latest")), None)
        row = ("", "", "", "") if version is None else _row(version)
        table.add_row(adapter.adapter_id, row[0], str(len(adapter.versions)), *row[1:])
    print_table(table)


@app.command()
def show(name: NameArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Show an adapter's tags and versions."""
    with reported_errors(), connect(url) as client:
        adapter = client.adapter(name)
    if as_json:
        print_json(message_dict(adapter))
        return
    print(adapter.name)
    for tag, digest in sorted(adapter.tags.items()):
        print(f"{tag}: sha256:{digest}")
    table = Table("version", "rank", "modules", "tier", "bytes", "created", box=None)
    for version in adapter.versions:
        table.add_row(*_row(version), str(version.size_bytes), version.create_time.ToJsonString())
    print_table(table)


@app.command()
def rm(name: NameArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Delete an adapter with all its versions; running generations finish with theirs."""
    with reported_errors(), connect(url) as client:
        client.delete_adapter(name)
    print_json({"deleted": name}) if as_json else print(f"deleted {name}")


@app.command()
def check(
    folder: FolderArgument,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The base model's folder.")],
    max_rank: Annotated[int, typer.Option(min=1, help="The server's maximum rank.")] = 256,
    dtype: Annotated[DType, typer.Option(help="The server's dtype.")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Validate a PEFT folder against a base model, as the server would; needs no server."""
    with reported_errors():
        # Needs numpy, which the client alone does not install.
        from lorasrv.engine.defaults import adapter_check
        from lorasrv.model.base_shapes import base_shapes
        from lorasrv_adapters.peft_format import validate_folder

        accepts = adapter_check(EngineConfig(model=ModelConfig(path=str(model), dtype=dtype)))
        spec = validate_folder(folder, base_shapes(model, dtype), max_rank, accepts)
    if as_json:
        ranks = {"min_rank": spec.rank_min, "max_rank": spec.rank_max}
        print_json({"ok": True, **ranks, "target_modules": list(spec.target_modules)})
    else:
        print(f"ok: rank {_ranks(spec.rank_min, spec.rank_max)}, {', '.join(spec.target_modules)}")


def _row(version: adapter_pb2.Version) -> tuple[str, str, str, str]:
    tier = adapter_pb2.Tier.Name(version.tier).removeprefix("TIER_").lower()
    ranks = _ranks(version.min_rank, version.max_rank)
    return version.digest[:12], ranks, ",".join(version.target_modules), tier


def _ranks(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
