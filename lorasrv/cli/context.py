"""`lorasrv context`: servers under names, with the API keys for them; needs no server."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lorasrv.cli.config_file import Context, UserConfig, check_context, config_path, read_config, write_config
from lorasrv.cli.output import NOT_FOUND, JsonOption, fail, print_json, print_table
from lorasrv.errors import ConfigurationError
from lorasrv_adapters.reference import check_id

app = typer.Typer(help="Name servers, and say which one is meant.", no_args_is_help=True)


def complete_context(incomplete: str) -> list[str]:
    try:
        return [name for name in read_config(config_path()).contexts if name.startswith(incomplete)]
    except (ConfigurationError, OSError):
        return []


NameArgument = Annotated[str, typer.Argument(help="The context's name.", autocompletion=complete_context)]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The context's name, say prod.")],
    url: Annotated[str, typer.Argument(help="HOST:PORT, or https://HOST:PORT.")],
    api_key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Holds the API key; read whenever it is needed.")
    ] = None,
    api_key_stdin: Annotated[
        bool, typer.Option("--api-key-stdin", help="Ask for the API key, or read it from a pipe, and keep it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a context or replace it; `use` makes it the current one."""
    context = _checked(
        check_id(name, "name"),
        Context(
            url=url,
            api_key=_read_key() if api_key_stdin else None,
            api_key_file=None if api_key_file is None else str(api_key_file.absolute()),
        ),
    )
    config = read_config(config_path())
    _write(replace(config, contexts={**config.contexts, name: context}))
    print_json({"added": name, "url": url}) if as_json else print(f"added {name}: {url}")


@app.command()
def use(name: NameArgument, as_json: JsonOption = False) -> None:
    """Make a context the current one."""
    config = read_config(config_path())
    _write(replace(config, current=_known(config, name)))
    print_json({"current": name}) if as_json else print(f"using {name}: {config.contexts[name].url}")


@app.command()
def ls(as_json: JsonOption = False) -> None:
    """List the contexts; * is the current one."""
    config = read_config(config_path())
    found = sorted(config.contexts.items())
    if as_json:
        shown = [{"name": name, "url": each.url, "api_key": _key_place(each)} for name, each in found]
        print_json({"current": config.current, "contexts": shown})
        return
    table = Table("", "context", "url", "API key", box=None)
    for name, context in found:
        table.add_row("*" if name == config.current else "", name, context.url, _key_place(context) or "")
    print_table(table)


@app.command()
def rm(name: NameArgument, as_json: JsonOption = False) -> None:
    """Forget a context, and the key that is kept for it."""
    config = read_config(config_path())
    _known(config, name)
    left = {other: context for other, context in config.contexts.items() if other != name}
    _write(UserConfig(current=None if config.current == name else config.current, contexts=left))
    print_json({"removed": name}) if as_json else print(f"removed {name}")


def _read_key() -> str:
    key = typer.prompt("API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    return key.strip()


def _checked(name: str, context: Context) -> Context:
    try:
        return check_context(context)
    except ValueError as error:
        raise ConfigurationError(f"context {name!r}: {error}") from None


def _known(config: UserConfig, name: str) -> str:
    if name not in config.contexts:
        fail(f"there is no context {name!r}", NOT_FOUND)
    return name


def _write(config: UserConfig) -> None:
    write_config(config_path(), config)


def _key_place(context: Context) -> str | None:
    return context.api_key_file or (None if context.api_key is None else "kept")
