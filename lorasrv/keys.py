"""API keys: a file of their hashes, with the tenant and the roles of each.

A key is 32 random bytes in text, so its plain SHA-256 is all that has to be kept: nothing that slows down guessing, as
for passwords, helps against guessing 256 bits, and it would slow down every call. The file is TOML, a line for each
key, under a name that appears in no reply:

    "ci" = { tenant = "acme", roles = ["generate", "publish"], sha256 = "…", expires = 2027-01-31T00:00:00Z }

All keys of a tenant have its `weight`, 1 where none is given.
"""

import hashlib
import json
import logging
import os
import secrets
import stat
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from lorasrv.errors import ConfigurationError
from lorasrv_adapters.errors import InvalidReference
from lorasrv_adapters.reference import check_digest, check_id

KEY_PREFIX = "lorasrv_"  # for people, and for scanners that look for leaked keys
KEY_BYTES = 32
MAX_WEIGHT = 1000

log = logging.getLogger(__name__)


class Role(StrEnum):
    """What a key is for; a key has one or several, and none includes another."""

    GENERATE = "generate"
    READ = "read"
    PUBLISH = "publish"
    ADMIN = "admin"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who makes a call. Tenants get service by their `weight` where they compete for it."""

    tenant: str
    roles: frozenset[Role]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class KeyEntry:
    """A line of the file. `expires` in Unix seconds; None is never."""

    caller: Caller
    sha256: str
    expires: float | None = None


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    """SHA-256 of the key's text, in hex: what `printf %s "$KEY" | sha256sum` says."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def format_line(name: str, tenant: str, roles: Collection[Role], sha256: str, expires: datetime | None = None) -> str:
    """The file's line for a key; `expires` is aware. Raises ConfigurationError, as reading it would."""
    fields = [f"tenant = {json.dumps(tenant)}", f"roles = {json.dumps(sorted(set(roles)))}", f'sha256 = "{sha256}"']
    if expires is not None:
        fields.append(f"expires = {expires.isoformat(timespec='seconds')}")
    line = f"{json.dumps(name)} = {{ {', '.join(fields)} }}"
    parse_keys(line)
    return line


def append_line(path: Path, line: str) -> None:
    """Add a key's line to the file, which is made readable for its owner alone where there is none.

    Raises ConfigurationError when the file would not be a key file with it, and OSError.
    """
    before = path.read_text("utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
        line = "\n" + line
    parse_keys(before + line)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
        file.write(line + "\n")


def parse_keys(text: str) -> dict[str, KeyEntry]:
    """The file's keys by their hash. Raises ConfigurationError naming the key's name and what is wrong."""
    try:
        lines: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"not a TOML file: {error}") from None
    found: dict[str, KeyEntry] = {}
    weights: dict[str, float] = {}
    for name, fields in lines.items():
        try:
            check_id(name, "name")
            entry = _entry(fields)
        except (InvalidReference, ValueError) as error:
            raise ConfigurationError(f"key {name!r}: {error}") from None
        if entry.sha256 in found:
            raise ConfigurationError(f"key {name!r}: another name has the same sha256")
        tenant, weight = entry.caller.tenant, entry.caller.weight
        if weights.setdefault(tenant, weight) != weight:
            raise ConfigurationError(f"key {name!r}: another key of tenant {tenant!r} has weight {weights[tenant]}")
        found[entry.sha256] = entry
    return found


class KeyFile:
    """The keys as of the file's last good reading. Belongs to the event loop. Raises ConfigurationError."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._entries: Mapping[str, KeyEntry] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again; raises ConfigurationError, and the keys stay as they were."""
        try:
            mode = self._path.stat().st_mode
            self._entries = parse_keys(self._path.read_text("utf-8"))
        except OSError as error:
            raise ConfigurationError(f"API keys: {self._path}: {error.strerror}") from None
        except (ConfigurationError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"API keys: {self._path}: {error}") from None
        if mode & (stat.S_IWGRP | stat.S_IRWXO):
            log.warning("API keys: %s is open to other users (mode %o): chmod 600", self._path, stat.S_IMODE(mode))
        tenants = {entry.caller.tenant for entry in self._entries.values()}
        log.info("API keys: %d keys of %d tenants", len(self._entries), len(tenants))

    def caller(self, key: str) -> Caller | None:
        """Whose key it is; None when it is nobody's, or has expired."""
        # What is compared is a hash, in a table with a secret hash of its own: how long that takes tells nothing of a
        # key that a caller could use.
        entry = self._entries.get(hash_key(key))
        if entry is None or (entry.expires is not None and entry.expires <= self._clock()):
            return None
        return entry.caller


def _entry(fields: Any) -> KeyEntry:
    if not isinstance(fields, dict):
        raise ValueError("is not a table { tenant = …, roles = […], sha256 = … }")
    unknown = fields.keys() - {"tenant", "roles", "weight", "sha256", "expires"}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}")
    expires = fields.get("expires")
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise ValueError(f"expires is {str(expires)!r}, not a date and time with an offset, as 2027-01-31T00:00:00Z")
    return KeyEntry(
        caller=Caller(
            tenant=check_id(_text(fields, "tenant"), "tenant"),
            roles=_roles(fields.get("roles")),
            weight=_weight(fields.get("weight", 1)),
        ),
        sha256=check_digest(_text(fields, "sha256")),
        expires=None if expires is None else expires.timestamp(),
    )


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is missing or no string")
    return value


def _weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 / MAX_WEIGHT <= value <= MAX_WEIGHT:
        raise ValueError(f"weight is {value!r}, not a number from {1 / MAX_WEIGHT} to {MAX_WEIGHT}")
    return float(value)


def _roles(value: Any) -> frozenset[Role]:
    known = ", ".join(Role)
    if not isinstance(value, list) or not value:
        raise ValueError(f"roles is missing or no list with at least one of {known}")
    wrong = next((role for role in value if role not in list(Role)), None)
    if wrong is not None:
        raise ValueError(f"role {wrong!r} is not one of {known}")
    return frozenset(map(Role, value))
