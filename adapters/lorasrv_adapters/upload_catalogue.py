"""The catalogue's uploads. Used under the registry's lock, as `catalogue` is."""

import json
from collections.abc import Sequence
from typing import Any

from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.database import Database
from lorasrv_adapters.errors import ContentError, content_error
from lorasrv_adapters.records import Upload, UploadFile, UploadState

_COLUMNS = "tenant, upload_id, adapter_id, state, files, errors, digest, create_time, expire_time, create_only"


class UploadCatalogue:
    """Uploads by id. Publishing one is `Catalogue.publish`."""

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._database = database
        self._catalogue = catalogue

    def insert(self, upload: Upload) -> None:
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
            upload.create_only,
        )
        with self._database.transaction() as db:
            db.execute(f"INSERT INTO uploads ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)", row)

    def find(self, tenant: str, upload_id: str) -> Upload | None:
        rows = self._database.rows(f"SELECT {_COLUMNS} FROM uploads WHERE tenant=? AND upload_id=?", tenant, upload_id)
        return self._to_upload(rows[0]) if rows else None

    def receiving(self) -> list[Upload]:
        """Those that may have staged files."""
        query = f"SELECT {_COLUMNS} FROM uploads WHERE state=?"
        return [self._to_upload(row) for row in self._database.rows(query, UploadState.RECEIVING.value)]

    def num_receiving(self, tenant: str) -> int:
        query = "SELECT count(*) FROM uploads WHERE tenant=? AND state=?"
        return self._database.rows(query, tenant, UploadState.RECEIVING.value)[0][0]

    def expired(self, now: float) -> list[str]:
        rows = self._database.rows("SELECT upload_id FROM uploads WHERE expire_time<=?", now)
        return [upload_id for (upload_id,) in rows]

    def fail(self, upload_id: str, errors: Sequence[ContentError]) -> None:
        texts = json.dumps([[error.reason, str(error)] for error in errors])
        self._end(upload_id, UploadState.FAILED, texts)

    def cancel(self, upload_id: str) -> None:
        self._end(upload_id, UploadState.CANCELLED, "[]")

    def delete(self, upload_id: str) -> None:
        with self._database.transaction() as db:
            db.execute("DELETE FROM uploads WHERE upload_id=?", (upload_id,))

    def _end(self, upload_id: str, state: UploadState, errors: str) -> None:
        with self._database.transaction() as db:
            db.execute("UPDATE uploads SET state=?, errors=? WHERE upload_id=?", (state.value, errors, upload_id))

    def _to_upload(self, row: tuple[Any, ...]) -> Upload:
        tenant, upload_id, adapter_id, state, files, errors, digest, create_time, expire_time, create_only = row
        return Upload(
            tenant=tenant,
            upload_id=upload_id,
            adapter_id=adapter_id,
            state=UploadState(state),
            files=tuple(
                UploadFile(name=name, size_bytes=size, sha256=sha256) for name, size, sha256 in json.loads(files)
            ),
            errors=tuple(content_error(reason, message) for reason, message in json.loads(errors)),
            version=None if digest is None else self._catalogue.version(tenant, adapter_id, digest),
            create_time=create_time,
            expire_time=expire_time,
            create_only=bool(create_only),
        )
