"""The catalogue's adapters, versions and tags.

Not thread-safe: its owner, the registry, calls it under one lock. Every method that changes something is one
transaction, durable when it returns, or part of the one that it is called in.
"""

import json
from collections.abc import Sequence
from typing import Any

from lorasrv_adapters.database import Database
from lorasrv_adapters.records import Adapter, AdapterFilter, Tag, Upload, UploadState, Version, VersionState

_ADAPTER_COLUMNS = "labels, annotations, pinned, create_time, update_time, delete_time, expire_time"
_VERSION_COLUMNS = (
    "digest, rank_min, rank_max, target_modules, size_bytes, fingerprint, create_time, serving, quarantined"
)


class Catalogue:
    """`fingerprint` is that of the base model served now: versions of another one are incompatible."""

    def __init__(self, database: Database, fingerprint: str) -> None:
        self._database = database
        self._fingerprint = fingerprint

    def publish(self, upload: Upload, version: Version, blobs: Sequence[str], tag: str) -> None:
        """Make `version` visible under `tag` and end its upload.

        A version that exists keeps its place in time and is in order again; a deleted adapter is undeleted.
        """
        now = version.create_time
        key = (upload.tenant, upload.adapter_id)
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO adapters (tenant, adapter_id, create_time, update_time) VALUES (?,?,?,?) "
                "ON CONFLICT (tenant, adapter_id) DO UPDATE SET update_time=excluded.update_time, "
                "delete_time=NULL, expire_time=NULL",
                (*key, now, now),
            )
            (sequence,) = db.execute(
                f"INSERT INTO versions (tenant, adapter_id, {_VERSION_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,0) "
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
            db.execute("UPDATE versions SET quarantined=0 WHERE digest=?", (version.digest,))
            db.executemany("INSERT OR IGNORE INTO version_blobs VALUES (?,?)", [(sequence, blob) for blob in blobs])
            self.set_tag(*key, Tag(tag=tag, digest=version.digest))
            db.execute(
                "UPDATE uploads SET state=?, digest=? WHERE upload_id=?",
                (UploadState.PUBLISHED.value, version.digest, upload.upload_id),
            )

    def adapter(self, tenant: str, adapter_id: str) -> Adapter | None:
        """An adapter with its tags and versions, deleted or not."""
        rows = self._database.rows(
            f"SELECT {_ADAPTER_COLUMNS} FROM adapters WHERE tenant=? AND adapter_id=?", tenant, adapter_id
        )
        if not rows:
            return None
        labels, annotations, pinned, create_time, update_time, delete_time, expire_time = rows[0]
        tags = self._database.rows("SELECT tag, digest FROM tags WHERE tenant=? AND adapter_id=?", tenant, adapter_id)
        return Adapter(
            tenant=tenant,
            adapter_id=adapter_id,
            labels=json.loads(labels),
            annotations=json.loads(annotations),
            tags=dict(tags),
            versions=tuple(version for _, version in self.versions(tenant, adapter_id)),
            pinned=bool(pinned),
            create_time=create_time,
            update_time=update_time,
            delete_time=delete_time,
            expire_time=expire_time,
        )

    def adapter_ids(self, tenant: str, wanted: AdapterFilter, after: str, limit: int) -> list[str]:
        """Up to `limit` ids greater than `after`, ascending."""
        conditions = ["tenant=?", "adapter_id>?", "substr(adapter_id, 1, ?)=?"]
        parameters: list[object] = [tenant, after, len(wanted.name_prefix), wanted.name_prefix]
        if not wanted.show_deleted:
            conditions.append("delete_time IS NULL")
        for key, value in wanted.labels.items():
            conditions.append("json_extract(labels, ?)=?")
            parameters += [f'$."{key}"', value]
        rows = self._database.rows(
            f"SELECT adapter_id FROM adapters WHERE {' AND '.join(conditions)} ORDER BY adapter_id LIMIT ?",
            *parameters,
            limit,
        )
        return [adapter_id for (adapter_id,) in rows]

    def save_adapter(self, adapter: Adapter) -> None:
        """Write all of an adapter's own fields."""
        with self._database.transaction() as db:
            db.execute(
                f"UPDATE adapters SET ({_ADAPTER_COLUMNS}) = (?,?,?,?,?,?,?) WHERE tenant=? AND adapter_id=?",
                (
                    json.dumps(dict(adapter.labels)),
                    json.dumps(dict(adapter.annotations)),
                    adapter.pinned,
                    adapter.create_time,
                    adapter.update_time,
                    adapter.delete_time,
                    adapter.expire_time,
                    adapter.tenant,
                    adapter.adapter_id,
                ),
            )

    def purge_adapter(self, tenant: str, adapter_id: str) -> None:
        with self._database.transaction() as db:
            db.execute("DELETE FROM adapters WHERE tenant=? AND adapter_id=?", (tenant, adapter_id))

    def expired_adapters(self, now: float) -> list[tuple[str, str]]:
        """(tenant, adapter id) of the deleted adapters whose time has come."""
        return self._database.rows("SELECT tenant, adapter_id FROM adapters WHERE expire_time<=?", now)  # pyright: ignore[reportReturnType]

    def num_pinned(self, tenant: str) -> int:
        return self._database.rows("SELECT count(*) FROM adapters WHERE tenant=? AND pinned", tenant)[0][0]

    def versions(
        self, tenant: str, adapter_id: str, before: int | None = None, limit: int | None = None
    ) -> list[tuple[int, Version]]:
        """Versions with their sequence numbers, newest first; `limit` of those older than number `before`."""
        rows = self._database.rows(
            f"SELECT sequence, {_VERSION_COLUMNS} FROM versions WHERE tenant=? AND adapter_id=? "
            "AND (? IS NULL OR sequence<?) ORDER BY sequence DESC LIMIT ?",
            tenant,
            adapter_id,
            before,
            before,
            -1 if limit is None else limit,
        )
        return [(sequence, self._to_version(row)) for sequence, *row in rows]

    def version(self, tenant: str, adapter_id: str, digest: str) -> Version | None:
        rows = self._database.rows(
            f"SELECT {_VERSION_COLUMNS} FROM versions WHERE tenant=? AND adapter_id=? AND digest=?",
            tenant,
            adapter_id,
            digest,
        )
        return self._to_version(rows[0]) if rows else None

    def delete_version(self, tenant: str, adapter_id: str, digest: str) -> None:
        with self._database.transaction() as db:
            db.execute(
                "DELETE FROM versions WHERE tenant=? AND adapter_id=? AND digest=?", (tenant, adapter_id, digest)
            )

    def quarantine(self, digest: str) -> None:
        """The version's blobs are damaged, whoever has it."""
        with self._database.transaction() as db:
            db.execute("UPDATE versions SET quarantined=1 WHERE digest=?", (digest,))

    def tags(self, tenant: str, adapter_id: str, after: str, limit: int) -> list[Tag]:
        """Up to `limit` tags greater than `after`, ascending."""
        rows = self._database.rows(
            "SELECT tag, digest, weight FROM tags WHERE tenant=? AND adapter_id=? AND tag>? ORDER BY tag LIMIT ?",
            tenant,
            adapter_id,
            after,
            limit,
        )
        return [Tag(tag=tag, digest=digest, weight=weight) for tag, digest, weight in rows]

    def set_tag(self, tenant: str, adapter_id: str, tag: Tag) -> None:
        with self._database.transaction() as db:
            db.execute(
                "INSERT INTO tags (tenant, adapter_id, tag, digest, weight) VALUES (?,?,?,?,?) "
                "ON CONFLICT (tenant, adapter_id, tag) DO UPDATE SET digest=excluded.digest, weight=excluded.weight",
                (tenant, adapter_id, tag.tag, tag.digest, tag.weight),
            )

    def delete_tag(self, tenant: str, adapter_id: str, tag: str) -> None:
        with self._database.transaction() as db:
            db.execute("DELETE FROM tags WHERE tenant=? AND adapter_id=? AND tag=?", (tenant, adapter_id, tag))

    def blobs_of(self, tenant: str, adapter_id: str) -> dict[str, set[str]]:
        """Version digest to the blobs that the version consists of, its manifest included."""
        rows = self._database.rows(
            "SELECT digest, blob FROM versions JOIN version_blobs USING (sequence) WHERE tenant=? AND adapter_id=?",
            tenant,
            adapter_id,
        )
        found: dict[str, set[str]] = {}
        for digest, blob in rows:
            found.setdefault(digest, set()).add(blob)
        return found

    def versions_with(self, blob: str) -> list[str]:
        """Digests of the versions that need a blob."""
        rows = self._database.rows(
            "SELECT DISTINCT digest FROM versions JOIN version_blobs USING (sequence) WHERE blob=?", blob
        )
        return [digest for (digest,) in rows]

    def owns_blob(self, tenant: str, blob: str) -> bool:
        rows = self._database.rows(
            "SELECT 1 FROM version_blobs JOIN versions USING (sequence) WHERE blob=? AND tenant=? LIMIT 1", blob, tenant
        )
        return bool(rows)

    def stored_bytes(self, tenant: str) -> int:
        """Of all the tenant's versions, each once, those of deleted adapters included."""
        query = "SELECT sum(size_bytes) FROM (SELECT DISTINCT digest, size_bytes FROM versions WHERE tenant=?)"
        return self._database.rows(query, tenant)[0][0] or 0

    def has_version(self, digest: str) -> bool:
        return bool(self._database.rows("SELECT 1 FROM versions WHERE digest=? LIMIT 1", digest))

    def has_blob(self, blob: str) -> bool:
        return bool(self._database.rows("SELECT 1 FROM version_blobs WHERE blob=? LIMIT 1", blob))

    def all_blobs(self, *, quarantined: bool = True) -> set[str]:
        """Blobs of all versions, or of those that are in order."""
        rows = self._database.rows(
            "SELECT DISTINCT blob FROM version_blobs JOIN versions USING (sequence) WHERE ? OR NOT quarantined",
            quarantined,
        )
        return {blob for (blob,) in rows}

    def check(self) -> None:
        """Raises AssertionError when a foreign key or an invariant of publishing is broken."""
        rows = self._database.rows
        assert not rows("PRAGMA foreign_key_check")
        assert not rows(
            "SELECT sequence FROM versions LEFT JOIN version_blobs USING (sequence) "
            "GROUP BY sequence HAVING count(blob) < 3"
        )
        assert not rows("SELECT 1 FROM adapters WHERE (delete_time IS NULL) != (expire_time IS NULL)")
        assert not rows("SELECT 1 FROM adapters WHERE pinned AND delete_time IS NOT NULL")

    def _to_version(self, row: Sequence[Any]) -> Version:
        digest, rank_min, rank_max, target_modules, size_bytes, fingerprint, create_time, serving, quarantined = row
        compatible = fingerprint == self._fingerprint
        return Version(
            digest=digest,
            rank_min=rank_min,
            rank_max=rank_max,
            target_modules=tuple(json.loads(target_modules)),
            size_bytes=size_bytes,
            fingerprint=fingerprint,
            create_time=create_time,
            serving=serving,
            state=VersionState.QUARANTINED
            if quarantined
            else VersionState.READY
            if compatible
            else VersionState.INCOMPATIBLE,
        )
