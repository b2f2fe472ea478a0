"""Adapter versions in memory: what each name means now, and what is still needed of what it meant before."""

from collections import Counter

from lorasrv.errors import InvalidRequest
from lorasrv.memory.packing import PackedAdapter


class Versions:
    """A version's image is kept while a name means it or a request uses it.

    Changed under the driver's lock alone; `image` is also asked by the host cache's worker threads.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._images: dict[str, PackedAdapter] = {}
        self._uses: Counter[str] = Counter()  # by names and requests

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._digests)

    def digest(self, name: str) -> str:
        """What a name means now; raises InvalidRequest for an unknown one."""
        if name not in self._digests:
            raise InvalidRequest("adapter", f"{name!r} is not loaded")
        return self._digests[name]

    def image(self, digest: str) -> PackedAdapter | None:
        return self._images.get(digest)

    def name(self, name: str, digest: str, image: PackedAdapter) -> str | None:
        """Let a name mean a version from now on. What it meant before is returned, for `release`."""
        before = self._digests.get(name)
        self._digests[name] = digest
        self._images.setdefault(digest, image)
        self._uses[digest] += 1
        return before

    def unname(self, name: str) -> str:
        """Take a name's meaning away, which is returned, for `release`; raises InvalidRequest for an unknown one."""
        digest = self.digest(name)
        del self._digests[name]
        return digest

    def retain(self, digest: str) -> None:
        assert digest in self._images, f"{digest} is gone"
        self._uses[digest] += 1

    def release(self, digest: str) -> bool:
        """Undo a `name` or a `retain`; True when that was the last use, and the version is gone."""
        self._uses[digest] -= 1
        if self._uses[digest]:
            return False
        del self._uses[digest], self._images[digest]
        return True

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        assert self._uses.keys() == self._images.keys(), "uses and images differ"
        named = Counter(self._digests.values())
        assert all(self._uses[digest] >= count > 0 for digest, count in named.items()), "a named version is not used"
