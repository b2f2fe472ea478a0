"""Who may make which call: credentials to callers, methods to roles, and the caller of the call that runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from lorasrv.errors import PermissionDenied, Unauthenticated
from lorasrv.keys import Caller, KeyFile, Role

PACKAGE_PREFIX = "/lorasrv.v1."
# Probes and load balancers have no key, and learn here only whether work is taken.
OPEN_PREFIX = "/grpc.health.v1.Health/"

# What a method asks for. One that is not here is for nobody.
METHOD_ROLES: Mapping[str, Role] = {
    f"{PACKAGE_PREFIX}{service}/{method}": role
    for service, role, methods in (
        ("GenerationService", Role.GENERATE, ("Generate", "GenerateStream", "Tokenize", "Detokenize")),
        (
            "AdapterService",
            Role.READ,
            ("GetAdapter", "ListAdapters", "GetVersion", "ListVersions", "ListTags", "DownloadVersion"),
        ),
        # Reads what a download reads, and finds what it finds.
        ("AdapterService", Role.READ, ("VerifyVersion",)),
        # What a generation of one token does to memory, without the token.
        ("AdapterService", Role.GENERATE, ("WarmAdapter",)),
        (
            "AdapterService",
            Role.PUBLISH,
            ("CreateUpload", "WriteUpload", "GetUpload", "FinishUpload", "CancelUpload", "ImportAdapter"),
        ),
        (
            "AdapterService",
            Role.PUBLISH,
            ("UpdateAdapter", "DeleteAdapter", "UndeleteAdapter", "PinAdapter", "UnpinAdapter"),
        ),
        ("AdapterService", Role.PUBLISH, ("DeleteVersion", "SetTag", "DeleteTag")),
        ("ServerService", Role.READ, ("GetServerInfo", "GetStatus", "WatchStatus")),
        ("ServerService", Role.ADMIN, ("Drain",)),
    )
    for method in methods
}

# One text for a key that is missing, malformed, wrong or expired.
UNAUTHENTICATED_MESSAGE = "no valid API key: send one as metadata, authorization: Bearer KEY"

# Of the task that runs a call, which is never another call's.
_CALLER: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that this task runs; raises LookupError outside of one."""
    return _CALLER.get()


@contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """The block is `caller`'s."""
    token = _CALLER.set(caller)
    try:
        yield
    finally:
        _CALLER.reset(token)


class Access:
    """The decision on every call. Without `keys` every caller is `tenant`, with all roles."""

    def __init__(self, keys: KeyFile | None, tenant: str) -> None:
        self._keys = keys
        self._anyone = Caller(tenant=tenant, roles=frozenset(Role))

    def authenticate(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        """Whose call it is; raises Unauthenticated."""
        if self._keys is None or method.startswith(OPEN_PREFIX):
            return self._anyone
        caller = self._keys.caller(_bearer(metadata))
        if caller is None:
            raise Unauthenticated(UNAUTHENTICATED_MESSAGE)
        return caller

    def authorise(self, method: str, caller: Caller) -> None:
        """Raises PermissionDenied when the caller has not the role that the method asks for."""
        if not method.startswith(PACKAGE_PREFIX):
            return
        role = METHOD_ROLES.get(method)
        if role not in caller.roles:
            raise PermissionDenied(f"the API key does not have the role that this method asks for: {role}")


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """The credential of the only authorization entry; empty, which is nobody's key, when there is no such."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return ""
    scheme, _, credential = values[0].partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else ""
