"""Adapter versions in memory: what each name means now, and what is still needed of what it meant before."""

from collections import Counter
from dataclasses import dataclass, field

from lorasrv.engine.defaults import VersionDefaults
from lorasrv.errors import InvalidRequest
from lorasrv.memory.packing import PackedAdapter


@dataclass(frozen=True, kw_only=True)
class Version:
    digest: str
    image: PackedAdapter
    defaults: VersionDefaults = field(default_factory=VersionDefaults)


class Versions:
    """A version is kept while a name means it or a request uses it.

    Changed under the driver's lock alone; `find` is also called by the host cache's worker threads.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._versions: dict[str, Version] = {}
        self._uses: Counter[str] = Counter()  # by names and requests

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._digests)

    def meant_by(self, name: str) -> Version:
        """What a name means now; raises InvalidRequest for an unknown one."""
        if name not in self._digests:
            raise InvalidRequest("adapter", f"{name!r} is not loaded")
        return self._versions[self._digests[name]]

    def find(self, digest: str) -> Version | None:
        return self._versions.get(digest)

    def name(self, name: str, version: Version) -> str | None:
        """Let a name mean a version from now on. The digest of what it meant before is returned, for `release`."""
        before = self._digests.get(name)
        self._digests[name] = version.digest
        self._versions.setdefault(version.digest, version)
        self._uses[version.digest] += 1
        return before

    def unname(self, name: str) -> str:
        """Take a name's meaning away and return its digest, for `release`. Raises InvalidRequest for an unknown one."""
        digest = self.meant_by(name).digest
        del self._digests[name]
        return digest

    def retain(self, digest: str) -> None:
        assert digest in self._versions, f"{digest} is gone"
        self._uses[digest] += 1

    def release(self, digest: str) -> bool:
        """Undo a `name` or a `retain`; True when that was the last use, and the version is gone."""
        self._uses[digest] -= 1
        if self._uses[digest]:
            return False
        del self._uses[digest], self._versions[digest]
        return True

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self._uses.keys() == self._versions.keys(), "uses and versions differ"
        named = Counter(self._digests.values())
        assert all(self._uses[digest] >= count > 0 for digest, count in named.items()), "a named version is not used"
