"""`lorasrv adapters`: what the registry holds, and the ways in and out of it; `check` needs no server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, TextColumn
from rich.table import Table

from lorasrv.cli.connection import UrlOption, complete_adapter, connect
from lorasrv.cli.output import (
    REFUSED,
    JsonOption,
    fail,
    message_dict,
    print_json,
    print_table,
    progress,
)
from lorasrv.client.messages import WarmTier
from lorasrv.client.transfer import default_id, differing_files
from lorasrv.config import DType, EngineConfig, ModelConfig
from lorasrv.v1 import adapter_pb2

app = typer.Typer(help="Push adapters to a server and look at those it has.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A PEFT adapter folder.")]
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.", autocompletion=complete_adapter)]
ReferenceArgument = Annotated[
    str, typer.Argument(help="NAME, NAME@TAG or NAME@sha256:HEX.", autocompletion=complete_adapter)
]
TagArgument = Annotated[str, typer.Argument(help="The tag, prod for example.")]


@app.command()
def push(
    folder: FolderArgument,
    name: Annotated[str | None, typer.Option(help="The adapter's name; else the folder's.")] = None,
    create_only: Annotated[bool, typer.Option("--create-only", help="Refuse a name that is taken.")] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a PEFT folder and publish it as the adapter's newest version."""
    adapter_id = default_id(folder) if name is None else name
    with connect(url) as client, _transfer(adapter_id) as report:
        version = client.push(folder, adapter_id, report, create_only=create_only)
    _print_version(adapter_id, version, as_json)


@app.command()
def pull(
    reference: ReferenceArgument,
    folder: Annotated[Path, typer.Argument(file_okay=False, help="Where its files go; made if it is not there.")],
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a version's files, checked to the last byte."""
    with connect(url) as client, _transfer(reference) as report:
        version = client.pull(reference, folder, report)
    _print_version(reference.partition("@")[0], version, as_json)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A folder below this tenant's import folder on the server.")],
    name: NameArgument,
    create_only: Annotated[bool, typer.Option("--create-only", help="Refuse a name that is taken.")] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a PEFT folder that is on the server's own disk."""
    with connect(url) as client:
        version = client.import_adapter(source, name, create_only=create_only)
    _print_version(name, version, as_json)


@app.command()
def ls(
    prefix: Annotated[str, typer.Option(help="Those whose names begin so.")] = "",
    deleted: Annotated[bool, typer.Option("--deleted", help="Also those that `restore` can bring back.")] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the adapters that the server has."""
    with connect(url) as client:
        found = client.adapters(name_prefix=prefix, show_deleted=deleted)
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
    with connect(url) as client:
        adapter = client.adapter(name)
    if as_json:
        print_json(message_dict(adapter))
        return
    print(adapter.name)
    for tag, digest in sorted(adapter.tags.items()):
        print(f"{tag}: sha256:{digest}")
    table = Table("version", "rank", "modules", "tier", "state", "bytes", "hits", "last use", "created", box=None)
    for version in adapter.versions:
        last_use = version.last_use_time.ToJsonString() if version.HasField("last_use_time") else "never"
        counts = (_state(version), str(version.size_bytes), str(version.hits), last_use)
        table.add_row(*_row(version), *counts, version.create_time.ToJsonString())
    print_table(table)
    for version in adapter.versions:
        if version.failure:
            print(f"{version.digest[:12]}: the last load failed: {version.failure}")


@app.command()
def rm(
    reference: Annotated[
        str,
        typer.Argument(help="NAME, or one untagged version: NAME@sha256:HEX.", autocompletion=complete_adapter),
    ],
    purge: Annotated[bool, typer.Option("--purge", help="For good: `restore` cannot bring it back.")] = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete an adapter with all its versions, or one version for good; running generations finish with theirs."""
    with connect(url) as client:
        if "@" in reference:
            client.delete_version(reference)
        else:
            client.delete_adapter(reference, purge=purge)
    print_json({"deleted": reference}) if as_json else print(f"deleted {reference}")


@app.command()
def restore(name: NameArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Bring a deleted adapter back."""
    with connect(url) as client:
        adapter = client.undelete_adapter(name)
    print_json(message_dict(adapter)) if as_json else print(f"restored {name}")


@app.command()
def tag(reference: ReferenceArgument, tag: TagArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Point a tag at a version; streams that run stay on the version they began with."""
    with connect(url) as client:
        made = client.set_tag(reference, tag)
    name = reference.partition("@")[0]
    print_json(message_dict(made)) if as_json else print(f"{name}@{tag}: sha256:{made.versions[0].digest}")


@app.command()
def untag(name: NameArgument, tag: TagArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Take a tag away; its version stays."""
    with connect(url) as client:
        client.delete_tag(name, tag)
    print_json({"untagged": f"{name}@{tag}"}) if as_json else print(f"untagged {name}@{tag}")


@app.command()
def pin(name: NameArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Keep an adapter from deletion."""
    with connect(url) as client:
        adapter = client.pin_adapter(name)
    print_json(message_dict(adapter)) if as_json else print(f"pinned {name}")


@app.command()
def unpin(name: NameArgument, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Let an adapter be deleted again."""
    with connect(url) as client:
        adapter = client.unpin_adapter(name)
    print_json(message_dict(adapter)) if as_json else print(f"unpinned {name}")


@app.command()
def warm(
    references: Annotated[list[str], typer.Argument(help="NAME, NAME@TAG or NAME@sha256:HEX, one or more.")],
    tier: Annotated[WarmTier, typer.Option(help="Where its weights are to be.")] = "device",
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds for each; else 60.")] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have adapters in memory before generations ask for them; nothing keeps them there."""
    with connect(url) as client:
        for reference in references:
            version = client.warm(reference, tier, timeout_s=timeout)
            adapter_id = reference.partition("@")[0]
            if as_json:
                print_json({"adapter_id": adapter_id, "version": message_dict(version)})
            else:
                print(f"{adapter_id}@sha256:{version.digest}: {_tier(version)}", flush=True)


@app.command()
def verify(
    reference: ReferenceArgument,
    folder: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Also compare with this PEFT folder.")
    ] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have the server read a version's stored bytes again: are they what its digest says? (`check` is for folders that
    no server has yet.)"""
    with connect(url) as client:
        found = client.verify(reference)
        differing = [] if folder is None else differing_files(folder, found.files)
    name = f"{reference.partition('@')[0]}@sha256:{found.version.digest}"
    if differing:
        fail(f"{folder} is not {name}: {', '.join(differing)} differ", REFUSED)
    if as_json:
        print_json({"ok": True, "version": message_dict(found.version)})
    else:
        print(f"{name}: {_state(found.version)}, {found.version.size_bytes} bytes as stored")


@app.command()
def check(
    folder: FolderArgument,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The base model's folder.")],
    max_rank: Annotated[int, typer.Option(min=1, help="The server's maximum rank.")] = 256,
    dtype: Annotated[DType, typer.Option(help="The server's dtype.")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Validate a PEFT folder against a base model, as the server would; needs no server. (`verify` is for versions that
    a server has.)"""
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


@contextmanager
def _transfer(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of the bytes that have passed."""
    with progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn()) as bar:
        task = bar.add_task(name, total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)


def _print_version(adapter_id: str, version: adapter_pb2.Version, as_json: bool) -> None:
    if as_json:
        print_json({"adapter_id": adapter_id, "version": message_dict(version)})
    else:
        print(f"{adapter_id}@sha256:{version.digest}")


def _row(version: adapter_pb2.Version) -> tuple[str, str, str, str]:
    ranks = _ranks(version.min_rank, version.max_rank)
    return version.digest[:12], ranks, ",".join(version.target_modules), _tier(version)


def _tier(version: adapter_pb2.Version) -> str:
    return adapter_pb2.Tier.Name(version.tier).removeprefix("TIER_").lower()


def _state(version: adapter_pb2.Version) -> str:
    return adapter_pb2.VersionState.Name(version.state).removeprefix("VERSION_STATE_").lower()


def _ranks(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
