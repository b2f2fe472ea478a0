"""Page tokens: where the next page of one tenant's one list begins, signed with a key that the catalogue keeps."""

import base64
import binascii
import hashlib
import hmac
import secrets

from lorasrv_adapters.database import Database
from lorasrv_adapters.errors import InvalidPage, quote

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_MAC_BYTES = 16


class PageTokens:
    """A token holds for the tenant, list and filter that it was given out for, and for nothing else."""

    def __init__(self, database: Database) -> None:
        with database.transaction() as db:
            db.execute("INSERT OR IGNORE INTO keys VALUES ('page_tokens', ?)", (secrets.token_bytes(32),))
        ((self._key,),) = database.rows("SELECT value FROM keys WHERE name='page_tokens'")

    def give(self, position: str, *listed: object) -> str:
        """`listed` names the list: tenant, kind, filter."""
        return base64.urlsafe_b64encode(self._mac(position, listed) + position.encode()).decode()

    def read(self, token: str, *listed: object) -> str:
        """The position; raises InvalidPage for a token that was not given out for this list."""
        try:
            data = base64.b64decode(token, altchars=b"-_", validate=True)
            position = data[_MAC_BYTES:].decode()
        except (binascii.Error, ValueError):
            data, position = b"", ""
        if not hmac.compare_digest(data[:_MAC_BYTES], self._mac(position, listed)):
            raise InvalidPage(f"page_token {quote(token)} was not given out for this list")
        return position

    def _mac(self, position: str, listed: tuple[object, ...]) -> bytes:
        return hmac.digest(self._key, repr((position, listed)).encode(), hashlib.sha256)[:_MAC_BYTES]


def page_limit(page_size: int) -> int:
    """`page_size` 0 means 100, more than 1000 gives 1000; raises InvalidPage when negative."""
    if page_size < 0:
        raise InvalidPage(f"page_size {page_size} is negative")
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
