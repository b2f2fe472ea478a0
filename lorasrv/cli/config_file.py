"""The user's `config.toml`: contexts, each a server under a name with the API key for it.

    current-context = "prod"

    [contexts.prod]
    url = "https://llm.example.com:8470"
    api_key_file = "~/.config/lorasrv/prod.key"

A key may also stand in the file itself, as `api_key`; then it has to be readable for its owner alone, as it is made.
"""

import json
import os
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from lorasrv.client.messages import credentials, target_of
from lorasrv.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Context:
    """A server, and where the key for it is, if it wants one."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    api_key_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class UserConfig:
    """What the file says; `current` names one of `contexts`, or nothing."""

    current: str | None = None
    contexts: Mapping[str, Context] = field(default_factory=dict[str, Context])


def config_path() -> Path:
    return Path(platformdirs.user_config_dir("lorasrv")) / "config.toml"


def read_config(path: Path) -> UserConfig:
    """Empty where there is no file. Raises ConfigurationError naming the file and what is wrong in it, and OSError."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            config = _config(tomllib.loads(file.read().decode()))
    except (FileNotFoundError, NotADirectoryError):  # the home of a system user may be /dev/null
        return UserConfig()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and any(each.api_key for each in config.contexts.values()):
        raise ConfigurationError(f"{path} holds an API key and is open to other users: chmod 600 {path}")
    return config


def write_config(path: Path, config: UserConfig) -> None:
    """Put `config` in the file's place, readable for its owner alone; comments in it are lost. Raises OSError."""
    lines = [] if config.current is None else [f"current-context = {_toml(config.current)}"]
    for name, context in sorted(config.contexts.items()):
        given = {each.name: getattr(context, each.name) for each in fields(context)}
        lines += ["", f"[contexts.{_toml(name)}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in given.items() if value is not None]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Made with mode 0600.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("\n".join(lines).lstrip() + "\n")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_context(context: Context) -> Context:
    """Raises ValueError, which shows no key."""
    target_of(context.url)
    if context.api_key is not None:
        if not context.api_key:
            raise ValueError("the API key is empty")
        credentials(context.api_key)
        if context.api_key_file is not None:
            raise ValueError("api_key and api_key_file exclude each other")
    return context


def _config(tables: dict[str, Any]) -> UserConfig:
    _only(tables, ("current-context", "contexts"), "the file")
    contexts, current = tables.get("contexts", {}), tables.get("current-context")
    if not isinstance(contexts, dict):
        raise ValueError("contexts is no table")
    found = {name: _context(name, context) for name, context in contexts.items()}
    if current is not None and current not in found:
        raise ValueError(f"current-context is {current!r}, but there is no [contexts.{current}]")
    return UserConfig(current=current, contexts=found)


def _context(name: str, table: Any) -> Context:
    place = f"[contexts.{name}]"
    if not isinstance(table, dict) or "url" not in table:
        raise ValueError(f"there is no url in {place}")
    _only(table, [each.name for each in fields(Context)], place)
    for key, value in table.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} in {place} is no string")
    try:
        return check_context(Context(**table))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _only(table: Mapping[str, Any], known: Any, place: str) -> None:
    if unknown := set(table) - set(known):
        raise ValueError(f"{min(unknown)!r} in {place} is not one of {', '.join(known)}")


def _toml(text: str) -> str:
    """A JSON string is a TOML string, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
