"""Results of writes by request id: a write that is sent again with the same id is not made again."""

import hashlib
import re
from collections.abc import Callable
from typing import TypeVar

from lorasrv_adapters.database import Database
from lorasrv_adapters.errors import InvalidField, RequestIdReused, quote

REPLAY_TTL_S = 24 * 3600.0
_REQUEST_ID_PATTERN = r"[A-Za-z0-9._:-]{1,128}"
T = TypeVar("T")


class Replays:
    """Used under the registry's lock. The result is recorded in the transaction that makes the change."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def once(
        self,
        tenant: str,
        request_id: str | None,
        call: tuple[object, ...],
        run: Callable[[], T],
        *,
        save: Callable[[T], str],
        load: Callable[[str], T],
    ) -> T:
        """What `run` returns, or what it returned when the tenant's `request_id` was used in the last 24 hours.

        `call` says what is asked for. Raises RequestIdReused when the id was used for something else, InvalidField for
        one that is none, and what `run` raises, which records nothing.
        """
        if request_id is None:
            with self._database.transaction():
                return run()
        with self._database.transaction() as db:
            result = self.find(tenant, request_id, call)
            if result is not None:
                return load(result)
            made = run()
            row = (tenant, request_id, _fingerprint(call), save(made), self._clock() + REPLAY_TTL_S)
            db.execute("INSERT OR REPLACE INTO replays VALUES (?,?,?,?,?)", row)
            return made

    def find(self, tenant: str, request_id: str, call: tuple[object, ...]) -> str | None:
        """The saved result of an earlier call; raises as `once` does."""
        if not re.fullmatch(_REQUEST_ID_PATTERN, request_id):
            raise InvalidField(f"request_id {quote(request_id)} does not match {_REQUEST_ID_PATTERN}")
        rows = self._database.rows(
            "SELECT call, result FROM replays WHERE tenant=? AND request_id=? AND expire_time>?",
            tenant,
            request_id,
            self._clock(),
        )
        if not rows:
            return None
        ((recorded, result),) = rows
        if recorded != _fingerprint(call):
            raise RequestIdReused(f"request_id {quote(request_id)} was used for another request")
        return result

    def forget(self, result: str) -> None:
        """What this result named is gone: its request may be made anew."""
        with self._database.transaction() as db:
            db.execute("DELETE FROM replays WHERE result=?", (result,))

    def reap(self) -> None:
        with self._database.transaction() as db:
            db.execute("DELETE FROM replays WHERE expire_time<=?", (self._clock(),))


def _fingerprint(call: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(call).encode()).hexdigest()
