"""Which server a verb talks to: `--url`, else LORASRV_URL, else the user config's current context, else the default."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer

from lorasrv.client import Client
from lorasrv.client.messages import DEFAULT_URL, target_of
from lorasrv.errors import ConfigurationError

UrlOption = Annotated[
    str | None,
    typer.Option("--url", help=f"Server, HOST:PORT. Else LORASRV_URL, the config's context, {DEFAULT_URL}."),
]


def config_path() -> Path:
    return Path(platformdirs.user_config_dir("lorasrv")) / "config.toml"


def resolve_url(url: str | None) -> str:
    """The server's URL; raises ConfigurationError naming where a bad one comes from."""
    if url is not None:
        return _checked(url, "--url")
    if from_environment := os.environ.get("LORASRV_URL"):
        return _checked(from_environment, "LORASRV_URL")
    path = config_path()
    return _checked(_of_context(path), str(path)) if path.is_file() else DEFAULT_URL


def connect(url: str | None) -> Client:
    return Client(resolve_url(url))


def _of_context(path: Path) -> str:
    """`[contexts.NAME] url = …` of the one that `current-context` names."""
    try:
        config: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    name = config.get("current-context")
    if name is None:
        return DEFAULT_URL
    contexts = config.get("contexts", {})
    context = contexts.get(name) if isinstance(contexts, dict) else None
    url = context.get("url") if isinstance(context, dict) else None
    if not isinstance(url, str):
        raise ConfigurationError(f"{path}: current-context is {name!r}, but there is no url in [contexts.{name}]")
    return url


def _checked(url: str, source: str) -> str:
    try:
        target_of(url)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return url
