"""`lorasrv keys`: make API keys for a server; needs no server."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from lorasrv.cli.output import JsonOption, print_json
from lorasrv.keys import Role, append_line, format_line, hash_key, new_key

app = typer.Typer(help="Make API keys for lorasrv serve --api-keys.", no_args_is_help=True)


@app.callback()
def keys() -> None:
    """Make API keys for lorasrv serve --api-keys."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What the file calls the key, say ci.")],
    tenant: Annotated[str, typer.Option(help="Whose adapters it is for.")],
    role: Annotated[list[Role], typer.Option(help="What it may be used for; may be given again.")],
    days: Annotated[int | None, typer.Option(min=1, max=36500, help="Valid for so long; for ever by default.")] = None,
    file: Annotated[Path | None, typer.Option(dir_okay=False, help="Add the line to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a new key, this once, and the line for the server's file, or add that with --file."""
    key = new_key()
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    line = format_line(name, tenant, role, hash_key(key), expires)
    if file is not None:
        append_line(file, line)
    if as_json:
        print_json({"key": key, "line": line})
    else:
        print(key)
        if file is None:
            print(line)
