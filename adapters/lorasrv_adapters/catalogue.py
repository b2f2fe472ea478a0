"""The catalogue: adapters, versions, tags and uploads in SQLite, with write-ahead log and a schema version.

Not thread-safe: its owner, the registry, calls it under one lock. Every method that changes something is one
transaction, durable when it returns.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasrv_adapters.errors import ContentError, RegistryUnavailable, StorageFull, content_error
from lorasrv_adapters.records import Adapter, Upload, UploadFile, UploadState, Version

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE adapters (
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, create_time REAL NOT NULL, update_time REAL NOT NULL,
    PRIMARY KEY (tenant, adapter_id)
);
CREATE TABLE versions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, digest TEXT NOT NULL,
    rank_min INTEGER NOT NULL, rank_max INTEGER NOT NULL, target_modules TEXT NOT NULL,
    size_bytes INTEGER NOT NULL, fingerprint TEXT NOT NULL, create_time REAL NOT NULL, serving TEXT,
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
    PRIMARY KEY (tenant, adapter_id, tag),
    FOREIGN KEY (tenant, adapter_id, digest) REFERENCES versions (tenant, adapter_id, digest) ON DELETE CASCADE
);
CREATE TABLE uploads (
    upload_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, adapter_id TEXT NOT NULL, state TEXT NOT NULL,
    files TEXT NOT NULL, errors TEXT NOT NULL, digest TEXT, create_time REAL NOT NULL, expire_time REAL NOT NULL
);
"""
# What brings a catalogue of an older schema to the next one.
_MIGRATIONS = {1: "ALTER TABLE versions ADD COLUMN serving TEXT"}
_VERSION_COLUMNS = "digest, rank_min, rank_max, target_modules, size_bytes, fingerprint, create_time, serving"
_UPLOAD_COLUMNS = "tenant, upload_id, adapter_id, state, files, errors, digest, create_time, expire_time"


class Catalogue:
    """One open catalogue file. Raises RegistryUnavailable when it is damaged, locked or of another schema."""

    def __init__(self, path: Path) -> None:
        with _sqlite_errors():
            self._db = sqlite3.connect(path, timeout=5.0, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._migrate()

    def close(self) -> None:
        self._db.close()

    def insert_upload(self, upload: Upload) -> None:
        files = json.dumps([[file.name, file.size_bytes, file.sha256] for file in upload.files])
        row = (
            upload.tenant,
            upload.upload_id,
            upload.adapter_id,
            upload.state.value,
            files,
            "[]",
            None,
            upload.create_time,
            upload.expire_time,
        )
        with self._transaction() as db:
            db.execute(f"INSERT INTO uploads ({_UPLOAD_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)", row)

    def upload(self, tenant: str, upload_id: str) -> Upload | None:
        rows = self._rows(f"SELECT {_UPLOAD_COLUMNS} FROM uploads WHERE tenant=? AND upload_id=?", tenant, upload_id)
        return self._to_upload(rows[0]) if rows else None

    def uploads(self) -> list[Upload]:
        return [self._to_upload(row) for row in self._rows(f"SELECT {_UPLOAD_COLUMNS} FROM uploads")]

    def fail_upload(self, upload_id: str, errors: Sequence[ContentError]) -> None:
        texts = json.dumps([[error.reason, str(error)] for error in errors])
        with self._transaction() as db:
            db.execute(
                "UPDATE uploads SET state=?, errors=? WHERE upload_id=?", (UploadState.FAILED.value, texts, upload_id)
            )

    def delete_upload(self, upload_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM uploads WHERE upload_id=?", (upload_id,))

    def publish(self, upload: Upload, version: Version, blobs: Sequence[str], tag: str) -> None:
        """Make `version` visible under `tag` and end its upload. A version that exists keeps its place in time."""
        now = version.create_time
        key = (upload.tenant, upload.adapter_id)
        with self._transaction() as db:
            db.execute(
                "INSERT INTO adapters VALUES (?,?,?,?) "
                "ON CONFLICT (tenant, adapter_id) DO UPDATE SET update_time=excluded.update_time",
                (*key, now, now),
            )
            (sequence,) = db.execute(
                f"INSERT INTO versions (tenant, adapter_id, {_VERSION_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?) "
                "ON CONFLICT (tenant, adapter_id, digest) DO UPDATE SET fingerprint=excluded.fingerprint "
                "RETURNING sequence",
                (
                    *key,
                    version.digest,
                    version.rank_min,
                    version.rank_max,
                    json.dumps(version.target_modules),
                    version.size_bytes,
                    version.fingerprint,
                    now,
                    version.serving,
                ),
            ).fetchone()
            db.executemany("INSERT OR IGNORE INTO version_blobs VALUES (?,?)", [(sequence, blob) for blob in blobs])
            db.execute(
                "INSERT INTO tags VALUES (?,?,?,?) "
                "ON CONFLICT (tenant, adapter_id, tag) DO UPDATE SET digest=excluded.digest",
                (*key, tag, version.digest),
            )
            db.execute(
                "UPDATE uploads SET state=?, digest=? WHERE upload_id=?",
                (UploadState.PUBLISHED.value, version.digest, upload.upload_id),
            )

    def adapter(self, tenant: str, adapter_id: str) -> Adapter | None:
        rows = self._rows(
            "SELECT create_time, update_time FROM adapters WHERE tenant=? AND adapter_id=?", tenant, adapter_id
        )
        if not rows:
            return None
        tags = self._rows("SELECT tag, digest FROM tags WHERE tenant=? AND adapter_id=?", tenant, adapter_id)
        versions = self._rows(
            f"SELECT {_VERSION_COLUMNS} FROM versions WHERE tenant=? AND adapter_id=? ORDER BY sequence DESC",
            tenant,
            adapter_id,
        )
        return Adapter(
            tenant=tenant,
            adapter_id=adapter_id,
            tags=dict(tags),
            versions=tuple(map(_to_version, versions)),
            create_time=rows[0][0],
            update_time=rows[0][1],
        )

    def adapter_ids(self, tenant: str, after: str, limit: int) -> list[str]:
        """Up to `limit` ids greater than `after`, ascending."""
        rows = self._rows(
            "SELECT adapter_id FROM adapters WHERE tenant=? AND adapter_id>? ORDER BY adapter_id LIMIT ?",
            tenant,
            after,
            limit,
        )
        return [adapter_id for (adapter_id,) in rows]

    def blobs_of(self, tenant: str, adapter_id: str) -> dict[str, set[str]]:
        """Version digest to the blobs that the version consists of, its manifest included."""
        rows = self._rows(
            "SELECT digest, blob FROM versions JOIN version_blobs USING (sequence) WHERE tenant=? AND adapter_id=?",
            tenant,
            adapter_id,
        )
        found: dict[str, set[str]] = {}
        for digest, blob in rows:
            found.setdefault(digest, set()).add(blob)
        return found

    def delete_adapter(self, tenant: str, adapter_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM adapters WHERE tenant=? AND adapter_id=?", (tenant, adapter_id))

    def has_version(self, digest: str) -> bool:
        return bool(self._rows("SELECT 1 FROM versions WHERE digest=? LIMIT 1", digest))

    def has_blob(self, blob: str) -> bool:
        return bool(self._rows("SELECT 1 FROM version_blobs WHERE blob=? LIMIT 1", blob))

    def all_blobs(self) -> set[str]:
        return {blob for (blob,) in self._rows("SELECT DISTINCT blob FROM version_blobs")}

    def check(self) -> None:
        """Raises AssertionError when a foreign key or an invariant of publishing is broken."""
        assert not self._rows("PRAGMA foreign_key_check")
        assert not self._rows(
            "SELECT 1 FROM adapters LEFT JOIN versions USING (tenant, adapter_id) WHERE digest IS NULL"
        )
        assert not self._rows(
            "SELECT sequence FROM versions LEFT JOIN version_blobs USING (sequence) "
            "GROUP BY sequence HAVING count(blob) < 3"
        )

    def _migrate(self) -> None:
        ((found,),) = self._rows("PRAGMA user_version")
        if found == 0:
            with self._transaction() as db:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        elif found in _MIGRATIONS:
            with self._transaction() as db:
                for older in range(found, SCHEMA_VERSION):
                    db.execute(_MIGRATIONS[older])
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        elif found != SCHEMA_VERSION:
            raise RegistryUnavailable(f"catalogue schema {found} is not {SCHEMA_VERSION}, which this build reads")
        problems = self._rows("PRAGMA quick_check(1)")
        if problems != [("ok",)]:
            raise RegistryUnavailable("catalogue is damaged: restore it from a backup or start with an empty folder")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _sqlite_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        with _sqlite_errors():
            return self._db.execute(query, parameters).fetchall()

    def _to_upload(self, row: tuple[Any, ...]) -> Upload:
        tenant, upload_id, adapter_id, state, files, errors, digest, create_time, expire_time = row
        versions = self._rows(
            f"SELECT {_VERSION_COLUMNS} FROM versions WHERE tenant=? AND adapter_id=? AND digest=?",
            tenant,
            adapter_id,
            digest,
        )
        return Upload(
            tenant=tenant,
            upload_id=upload_id,
            adapter_id=adapter_id,
            state=UploadState(state),
            files=tuple(
                UploadFile(name=name, size_bytes=size, sha256=sha256) for name, size, sha256 in json.loads(files)
            ),
            errors=tuple(content_error(reason, message) for reason, message in json.loads(errors)),
            version=_to_version(versions[0]) if versions else None,
            create_time=create_time,
            expire_time=expire_time,
        )


def _to_version(row: tuple[Any, ...]) -> Version:
    digest, rank_min, rank_max, target_modules, size_bytes, fingerprint, create_time, serving = row
    return Version(
        digest=digest,
        rank_min=rank_min,
        rank_max=rank_max,
        target_modules=tuple(json.loads(target_modules)),
        size_bytes=size_bytes,
        fingerprint=fingerprint,
        create_time=create_time,
        serving=serving,
    )


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name == "SQLITE_FULL":
            raise StorageFull("the registry's disk is full") from error
        raise RegistryUnavailable(f"catalogue cannot be used: {name}") from error
