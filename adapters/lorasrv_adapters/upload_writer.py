"""Writing an upload's files: appended at the committed offset, by the newest writer only."""

import threading
from dataclasses import dataclass, field

from lorasrv_adapters.blobs import storage_errors
from lorasrv_adapters.errors import InvalidUpload, OffsetMismatch, StorageFull, UploadNotReceiving, UploadSuperseded
from lorasrv_adapters.records import UploadFile
from lorasrv_adapters.staging import Staging
from lorasrv_adapters.tenant_bytes import TenantBytes


@dataclass
class UploadWork:
    """What goes on with one upload in this process. `lock` guards its staged files and this object.

    `validating` and `ended` are also read without the lock, to answer while a long validation holds it.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    writers: dict[str, "UploadWriter"] = field(default_factory=dict)
    validating: bool = False
    ended: bool = False


class UploadWriter:
    """One stream's hold on one file. Made under the upload's lock; used by one thread at a time."""

    def __init__(
        self,
        tenant: str,
        upload_id: str,
        file: UploadFile,
        work: UploadWork,
        staging: Staging,
        tenant_bytes: TenantBytes,
    ) -> None:
        self._tenant = tenant
        self._upload_id = upload_id
        self._file = file
        self._work = work
        self._staging = staging
        self._tenant_bytes = tenant_bytes
        work.writers[file.name] = self

    @property
    def offset(self) -> int:
        """Where the next byte goes."""
        return self._staging.size(self._upload_id, self._file.name)

    def write(self, offset: int, data: bytes) -> int:
        """Append `data`, which must begin at the committed offset; returns the new offset.

        Raises OffsetMismatch with the current offset, InvalidUpload past the announced size, UploadSuperseded,
        UploadNotReceiving, QuotaExceeded, StorageFull; what was staged of the upload is then given back to the disk,
        and it begins again.
        """
        if self._work.validating:
            raise UploadNotReceiving(f"upload {self._upload_id} is validating")
        with self._work.lock, storage_errors():
            if self._work.ended:
                raise UploadNotReceiving(f"upload {self._upload_id} has ended")
            if self._work.writers.get(self._file.name) is not self:
                raise UploadSuperseded(f"{self._file.name}: a newer writer took over")
            current = self.offset
            if offset != current:
                raise OffsetMismatch(
                    f"{self._file.name}: write at {offset}, but the next byte goes to {current}", current=current
                )
            if current + len(data) > self._file.size_bytes:
                raise InvalidUpload(
                    f"{self._file.name}: byte {current + len(data)} is past the size of {self._file.size_bytes}"
                )
            self._append(data)
            return current + len(data)

    def _append(self, data: bytes) -> None:
        upload_id, name = self._upload_id, self._file.name
        self._tenant_bytes.add(self._tenant, upload_id, name, len(data))
        try:
            with storage_errors():
                self._staging.append(upload_id, name, data)
        except StorageFull:
            self._staging.remove(upload_id)
            self._tenant_bytes.drop_upload(upload_id)
            raise
        except BaseException:
            self._tenant_bytes.take_back(upload_id, name, len(data))
            raise
