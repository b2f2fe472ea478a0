"""The catalogue's SQLite file: write-ahead log, a schema version with migrations, and transactions."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from lorasrv_adapters.errors import RegistryUnavailable, StorageFull

SCHEMA_VERSION = 3

_SCHEMA = """
CREATE TABLE adapters (
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, create_time REAL NOT NULL, update_time REAL NOT NULL,
    labels TEXT NOT NULL DEFAULT '{}', annotations TEXT NOT NULL DEFAULT '{}', pinned INTEGER NOT NULL DEFAULT 0,
    delete_time REAL, expire_time REAL,
    PRIMARY KEY (tenant, adapter_id)
);
CREATE TABLE versions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, digest TEXT NOT NULL,
    rank_min INTEGER NOT NULL, rank_max INTEGER NOT NULL, target_modules TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, fingerprint TEXT NOT NULL, create_time REAL NOT NULL, serving TEXT,
    quarantined INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, adapter_id, digest),
    FOREIGN KEY (tenant, adapter_id) REFERENCES adapters ON DELETE CASCADE
);
CREATE TABLE version_blobs (
    sequence INTEGER NOT NULL REFERENCES versions ON DELETE CASCADE, blob TEXT NOT NULL,
    PRIMARY KEY (sequence, blob)
);
CREATE INDEX version_blobs_by_blob ON version_blobs (blob);
CREATE INDEX versions_by_digest ON versions (digest);
CREATE TABLE tags (
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, tag TEXT NOT NULL, digest TEXT NOT NULL,
    weight INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (tenant, adapter_id, tag),
    FOREIGN KEY (tenant, adapter_id, digest) REFERENCES versions (tenant, adapter_id, digest) ON DELETE CASCADE
);
CREATE TABLE uploads (
    upload_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, state TEXT NOT NULL,
    files TEXT NOT NULL, errors TEXT NOT NULL, digest TEXT, create_time REAL NOT NULL, expire_time REAL NOT NULL,
    create_only INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE replays (
    tenant TEXT NOT NULL, request_id TEXT NOT NULL, call TEXT NOT NULL, result TEXT NOT NULL, expire_time REAL NOT NULL,
    PRIMARY KEY (tenant, request_id)
);
CREATE TABLE keys (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""
# What brings a catalogue of an older schema to the next one.
_MIGRATIONS = {
    1: "ALTER TABLE versions ADD COLUMN serving TEXT",
    2: """
ALTER TABLE adapters ADD COLUMN labels TEXT NOT NULL DEFAULT '{}';
ALTER TABLE adapters ADD COLUMN annotations TEXT NOT NULL DEFAULT '{}';
ALTER TABLE adapters ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE adapters ADD COLUMN delete_time REAL;
ALTER TABLE adapters ADD COLUMN expire_time REAL;
ALTER TABLE versions ADD COLUMN quarantined INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tags ADD COLUMN weight INTEGER NOT NULL DEFAULT 1;
ALTER TABLE uploads ADD COLUMN create_only INTEGER NOT NULL DEFAULT 0;
CREATE TABLE replays (
    tenant TEXT NOT NULL, request_id TEXT NOT NULL, call TEXT NOT NULL, result TEXT NOT NULL, expire_time REAL NOT NULL,
    PRIMARY KEY (tenant, request_id)
);
CREATE TABLE keys (name TEXT PRIMARY KEY, value BLOB NOT NULL);
""",
}


class Database:
    """One open catalogue file. Raises RegistryUnavailable when it is damaged, locked or of another schema.

    Not thread-safe: it is used under the registry's lock.
    """

    def __init__(self, path: Path) -> None:
        with _sqlite_errors():
            self._db = sqlite3.connect(path, timeout=5.0, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._migrate()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block's changes or none, durable when it is left. A transaction within one is part of it."""
        with _sqlite_errors():
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        with _sqlite_errors():
            return self._db.execute(query, parameters).fetchall()

    def _migrate(self) -> None:
        ((found,),) = self.rows("PRAGMA user_version")
        if found == 0:
            self._run([_SCHEMA])
        elif found in _MIGRATIONS:
            self._run([_MIGRATIONS[older] for older in range(found, SCHEMA_VERSION)])
        elif found != SCHEMA_VERSION:
            raise RegistryUnavailable(f"catalogue schema {found} is not {SCHEMA_VERSION}, which this build reads")
        problems = self.rows("PRAGMA quick_check(1)")
        if problems != [("ok",)]:
            raise RegistryUnavailable("catalogue is damaged: restore it from a backup or start with an empty folder")

    def _run(self, scripts: list[str]) -> None:
        with self.transaction() as db:
            for script in scripts:
                for statement in script.split(";"):
                    db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def schema_version(path: Path) -> int:
    """That of a catalogue file, which stays as it is. Raises RegistryUnavailable."""
    with _sqlite_errors(), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", timeout=1.0, uri=True)) as db:
        ((found,),) = db.execute("PRAGMA user_version").fetchall()
    return found


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name == "SQLITE_FULL":
            raise StorageFull("the registry's disk is full") from error
        raise RegistryUnavailable(f"catalogue cannot be used: {name}") from error
