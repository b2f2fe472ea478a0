"""Which versions each tenant has asked for on this replica: what it may be told of the replica's memory."""

from collections import OrderedDict

MAX_VERSIONS = 4096


class SeenVersions:
    """Names of versions by tenant and digest, as last asked for; per tenant the latest `max_versions` are kept.

    Tenants that uploaded the same bytes share them in memory. So a version is shown in memory only to those who have
    asked for it. Belongs to the event loop.
    """

    def __init__(self, max_versions: int = MAX_VERSIONS) -> None:
        self._max_versions = max_versions
        self._names: dict[str, OrderedDict[str, str]] = {}

    def note(self, tenant: str, digest: str, adapter_id: str) -> None:
        """The tenant has asked for a version that is its own."""
        names = self._names.setdefault(tenant, OrderedDict())
        names[digest] = adapter_id
        names.move_to_end(digest)
        if len(names) > self._max_versions:
            names.popitem(last=False)

    def name(self, tenant: str, digest: str) -> str | None:
        """What the tenant calls the version; None when it has not asked for it."""
        return self._names.get(tenant, {}).get(digest)

    def any_name(self, digest: str) -> str | None:
        """What some tenant calls it: for those who run the server."""
        return next((names[digest] for names in self._names.values() if digest in names), None)
