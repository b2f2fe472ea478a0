"""Which server a verb talks to: `--url`, else LORASRV_URL, else the user config's current context, else the default.

The API key is the one in LORASRV_API_KEY, else, for the server of the current context alone, in the context's
`api_key_file`. There is no option for it: command lines are for all to see.
"""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import typer

from lorasrv.client import AsyncClient, Client
from lorasrv.client.messages import API_KEY_VARIABLE, DEFAULT_URL, credentials, target_of
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
    return _checked(_of_context(path).get("url", DEFAULT_URL), str(path)) if path.is_file() else DEFAULT_URL


def resolve_api_key(url: str | None) -> str | None:
    """The key for the server that `resolve_url` names; None without one. Raises ConfigurationError."""
    from_environment = os.environ.get(API_KEY_VARIABLE)
    if from_environment:
        return _checked_key(from_environment, API_KEY_VARIABLE)
    path = config_path()
    if url is not None or os.environ.get("LORASRV_URL") or not path.is_file():
        return None
    file = _of_context(path).get("api_key_file")
    if file is None:
        return None
    try:
        return _checked_key(Path(file).expanduser().read_text("utf-8").strip(), file)
    except OSError as error:
        raise ConfigurationError(f"{path}: api_key_file {file}: {error.strerror}") from None


def connect(url: str | None) -> Client:
    return Client(resolve_url(url), api_key=resolve_api_key(url))


def connect_async(url: str | None) -> AsyncClient:
    return AsyncClient(resolve_url(url), api_key=resolve_api_key(url))


def _of_context(path: Path) -> dict[str, str]:
    """`[contexts.NAME] url = …, api_key_file = …` of the one that `current-context` names; empty if it names none."""
    try:
        config: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    name = config.get("current-context")
    if name is None:
        return {}
    contexts = config.get("contexts", {})
    context = contexts.get(name) if isinstance(contexts, dict) else None
    if not isinstance(context, dict) or not isinstance(context.get("url"), str):
        raise ConfigurationError(f"{path}: current-context is {name!r}, but there is no url in [contexts.{name}]")
    if not isinstance(context.get("api_key_file", ""), str):
        raise ConfigurationError(f"{path}: api_key_file in [contexts.{name}] is no string")
    return context


def _checked_key(key: str, source: str) -> str:
    try:
        credentials(key)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return key


def _checked(url: str, source: str) -> str:
    try:
        target_of(url)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from None
    return url
