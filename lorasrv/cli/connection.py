"""Which server a verb talks to: `--url`, `--context`, LORASRV_URL, LORASRV_CONTEXT, the current context, the default.

The first of these that is there counts. The API key is the one in LORASRV_API_KEY, else, where a context was chosen,
that context's. There is no option for it: command lines are for all to see.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lorasrv.cli.config_file import Context, config_path, read_config
from lorasrv.client import AsyncClient, Client, ClientError
from lorasrv.client.messages import API_KEY_VARIABLE, DEFAULT_URL, credentials, target_of
from lorasrv.errors import ConfigurationError, LorasrvError

CONTEXT_VARIABLE = "LORASRV_CONTEXT"
URL_VARIABLE = "LORASRV_URL"

# A shell waits for what it may complete.
COMPLETION_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the command line says about the server; both None where it is silent."""

    url: str | None = None
    context: str | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A server, and what named it."""

    context: Context
    source: str


def _with_context(ctx: typer.Context, given: Target | None) -> Target:
    """`--context` stands before the verb."""
    return given or Target(context=ctx.find_root().params.get("context_name"))


UrlOption = Annotated[
    Target | None,
    typer.Option(
        "--url",
        parser=lambda url: Target(url=url),
        callback=_with_context,
        metavar="HOST:PORT",
        help=f"The server. Else --context, {URL_VARIABLE}, the current context, {DEFAULT_URL}.",
    ),
]


def resolve(target: Target | None) -> Choice:
    """The server that is meant. Raises ConfigurationError naming where a bad one comes from, and OSError."""
    target = target or Target()
    environ = os.environ
    if target.url is not None:
        return _of_url(target.url, "--url")
    if target.context is not None:
        return _of_context(target.context, "--context")
    if environ.get(URL_VARIABLE):
        return _of_url(environ[URL_VARIABLE], URL_VARIABLE)
    return _of_context(environ.get(CONTEXT_VARIABLE) or None, CONTEXT_VARIABLE)


def api_key_of(choice: Choice) -> str | None:
    """The key for a server; None without one. Raises ConfigurationError."""
    from_environment = os.environ.get(API_KEY_VARIABLE)
    if from_environment:
        return _checked_key(from_environment, API_KEY_VARIABLE)
    file = choice.context.api_key_file
    if file is None:
        return choice.context.api_key
    try:
        return _checked_key(Path(file).expanduser().read_text("utf-8").strip(), file)
    except OSError as error:
        raise ConfigurationError(f"{choice.source}: api_key_file {file}: {error.strerror}") from None


def connect(target: Target | None, timeout_s: float | None = None) -> Client:
    choice = resolve(target)
    return Client(choice.context.url, api_key=api_key_of(choice), timeout_s=timeout_s)


def connect_async(target: Target | None) -> AsyncClient:
    choice = resolve(target)
    return AsyncClient(choice.context.url, api_key=api_key_of(choice))


def complete_adapter(ctx: typer.Context, incomplete: str) -> list[str]:
    """The server's adapters; none where it cannot be asked, since nobody asked for an error."""
    target = _with_context(ctx, ctx.params.get("url"))
    try:
        with connect(target, COMPLETION_TIMEOUT_S) as client:
            return [adapter.adapter_id for adapter in client.adapters(name_prefix=incomplete)]
    except (ClientError, LorasrvError, OSError):
        return []


AdapterOption = Annotated[
    str,
    typer.Option(
        "--adapter",
        "-a",
        help="NAME, NAME@TAG, NAME@sha256:HEX, or base for the bare model.",
        autocompletion=complete_adapter,
    ),
]


def _of_url(url: str, source: str) -> Choice:
    try:
        target_of(url)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return Choice(context=Context(url=url), source=source)


def _of_context(name: str | None, source: str) -> Choice:
    """The context of that name; for None the current one, or, where there is none, the default server."""
    path = config_path()
    config = read_config(path)
    name = config.current if name is None else name
    if name is None:
        return Choice(context=Context(url=DEFAULT_URL), source="default")
    if name not in config.contexts:
        raise ConfigurationError(f"{source}: there is no context {name!r} in {path}")
    return Choice(context=config.contexts[name], source=str(path))


def _checked_key(key: str, source: str) -> str:
    try:
        credentials(key)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return key
