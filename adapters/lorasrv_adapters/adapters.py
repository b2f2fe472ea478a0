"""Adapters, versions and tags as resources: read, listed, changed and deleted, each tenant's own."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

from lorasrv_adapters.blobs import storage_errors
from lorasrv_adapters.catalogue import Catalogue
from lorasrv_adapters.errors import (
    AdapterExists,
    AdapterNotFound,
    AdapterPinned,
    InvalidField,
    QuotaExceeded,
    StaleEtag,
    VersionTagged,
    listing,
    quote,
)
from lorasrv_adapters.limits import RegistryLimits
from lorasrv_adapters.metadata import check_annotations, check_labels
from lorasrv_adapters.page_tokens import PageTokens, page_limit
from lorasrv_adapters.pins import PinnedBlobs
from lorasrv_adapters.records import Adapter, AdapterFilter, AdapterPage, Tag, TagPage, Version, VersionPage
from lorasrv_adapters.reference import check_id
from lorasrv_adapters.replays import Replays

_NO_FILTER = AdapterFilter()


class Adapters:
    """The adapter half of the registry. Thread-safe: takes the registry's `lock`, for milliseconds.

    What another tenant has, and what is deleted, is not found. Every change answers with the adapter as it is then,
    and again so when its `request_id` is sent again within 24 hours; with an `etag` that is not the adapter's it raises
    StaleEtag.
    """

    def __init__(
        self,
        *,
        limits: RegistryLimits,
        clock: Callable[[], float],
        lock: threading.RLock,
        catalogue: Catalogue,
        pins: PinnedBlobs,
        replays: Replays,
        tokens: PageTokens,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = lock
        self._catalogue = catalogue
        self._pins = pins
        self._replays = replays
        self._tokens = tokens

    def get(self, tenant: str, adapter_id: str, *, show_deleted: bool = False) -> Adapter:
        """Raises AdapterNotFound."""
        with self._lock:
            adapter = self._catalogue.adapter(tenant, adapter_id)
        if adapter is None or (adapter.delete_time is not None and not show_deleted):
            raise AdapterNotFound(f"adapter {quote(adapter_id)} not found")
        return adapter

    def list(
        self, tenant: str, wanted: AdapterFilter = _NO_FILTER, page_size: int = 0, page_token: str | None = None
    ) -> AdapterPage:
        """Adapters by id. Raises InvalidPage, InvalidField."""
        check_labels(wanted.labels)
        limit = page_limit(page_size)
        listed = ("adapters", tenant, wanted.name_prefix, sorted(wanted.labels.items()), wanted.show_deleted)
        after = self._tokens.read(page_token, *listed) if page_token else ""
        with self._lock:
            ids = self._catalogue.adapter_ids(tenant, wanted, after, limit + 1)
            adapters = tuple(self.get(tenant, adapter_id, show_deleted=True) for adapter_id in ids[:limit])
        more = len(ids) > limit
        return AdapterPage(
            adapters=adapters, next_page_token=self._tokens.give(ids[limit - 1], *listed) if more else None
        )

    def update(
        self,
        tenant: str,
        adapter_id: str,
        *,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        etag: str | None = None,
        request_id: str | None = None,
    ) -> Adapter:
        """Replace labels, annotations or both. Raises AdapterNotFound, InvalidField."""
        check_labels(labels or {})
        check_annotations(annotations or {})

        def change(adapter: Adapter) -> Adapter:
            return replace(
                adapter,
                labels=adapter.labels if labels is None else dict(labels),
                annotations=adapter.annotations if annotations is None else dict(annotations),
            )

        given = tuple(None if each is None else sorted(each.items()) for each in (labels, annotations))
        return self._change(tenant, adapter_id, ("update", given, etag), change, etag=etag, request_id=request_id)

    def delete(
        self,
        tenant: str,
        adapter_id: str,
        *,
        purge: bool = False,
        etag: str | None = None,
        request_id: str | None = None,
    ) -> Adapter:
        """Hide an adapter until it is undeleted or its retention ends; `purge` forgets it now, deleted before or not.

        Streams that run keep their version's blobs. Raises AdapterNotFound, AdapterPinned.
        """
        freed: dict[str, set[str]] = {}

        def change(adapter: Adapter) -> Adapter:
            if adapter.pinned:
                raise AdapterPinned(f"adapter {quote(adapter_id)} is pinned; unpin it first")
            now = self._clock()
            if purge:
                freed.update(self._catalogue.blobs_of(tenant, adapter_id))
                self._catalogue.purge_adapter(tenant, adapter_id)
            return replace(adapter, delete_time=now, expire_time=now if purge else now + self._limits.retention_s)

        call = ("delete", purge, etag)
        with self._lock, storage_errors():
            adapter = self._change(
                tenant, adapter_id, call, change, etag=etag, request_id=request_id, show_deleted=purge
            )
            for digest, blobs in freed.items():
                self._pins.release(digest, blobs)
        return adapter

    def undelete(self, tenant: str, adapter_id: str, *, request_id: str | None = None) -> Adapter:
        """Raises AdapterNotFound, AdapterExists when it is not deleted."""

        def change(adapter: Adapter) -> Adapter:
            if adapter.delete_time is None:
                raise AdapterExists(f"adapter {quote(adapter_id)} is not deleted")
            return replace(adapter, delete_time=None, expire_time=None)

        return self._change(tenant, adapter_id, ("undelete",), change, request_id=request_id, show_deleted=True)

    def pin(self, tenant: str, adapter_id: str, *, request_id: str | None = None) -> Adapter:
        """Keep an adapter from deletion until `unpin`. Raises AdapterNotFound, QuotaExceeded."""

        def change(adapter: Adapter) -> Adapter:
            limit = self._limits.pinned_adapters
            if not adapter.pinned and self._catalogue.num_pinned(tenant) >= limit:
                raise QuotaExceeded(f"{limit} adapters are pinned, which is the limit")
            return replace(adapter, pinned=True)

        return self._change(tenant, adapter_id, ("pin",), change, request_id=request_id)

    def unpin(self, tenant: str, adapter_id: str, *, request_id: str | None = None) -> Adapter:
        """Raises AdapterNotFound."""
        return self._change(
            tenant, adapter_id, ("unpin",), lambda adapter: replace(adapter, pinned=False), request_id=request_id
        )

    def version(self, tenant: str, adapter_id: str, digest: str) -> Version:
        """Raises AdapterNotFound."""
        with self._lock:
            self.get(tenant, adapter_id)
            found = self._catalogue.version(tenant, adapter_id, digest)
        if found is None:
            raise AdapterNotFound(f"adapter version {quote(adapter_id)}@sha256:{digest} not found")
        return found

    def versions(self, tenant: str, adapter_id: str, page_size: int = 0, page_token: str | None = None) -> VersionPage:
        """Newest first. Raises AdapterNotFound, InvalidPage."""
        limit = page_limit(page_size)
        listed = ("versions", tenant, adapter_id)
        before = int(self._tokens.read(page_token, *listed)) if page_token else None
        with self._lock:
            self.get(tenant, adapter_id)
            found = self._catalogue.versions(tenant, adapter_id, before, limit + 1)
        more = len(found) > limit
        return VersionPage(
            versions=tuple(version for _, version in found[:limit]),
            next_page_token=self._tokens.give(str(found[limit - 1][0]), *listed) if more else None,
        )

    def delete_version(self, tenant: str, adapter_id: str, digest: str, *, request_id: str | None = None) -> Adapter:
        """Forget a version for good; streams that run keep its blobs. Raises AdapterNotFound, VersionTagged."""
        freed: set[str] = set()

        def change(adapter: Adapter) -> Adapter:
            self.version(tenant, adapter_id, digest)
            tags = sorted(tag for tag, tagged in adapter.tags.items() if tagged == digest)
            if tags:
                raise VersionTagged(f"version {digest} has the tags {listing(tags)}; move or delete them first")
            freed.update(self._catalogue.blobs_of(tenant, adapter_id)[digest])
            self._catalogue.delete_version(tenant, adapter_id, digest)
            return adapter

        with self._lock, storage_errors():
            adapter = self._change(tenant, adapter_id, ("delete_version", digest), change, request_id=request_id)
            if freed:
                self._pins.release(digest, freed)
        return adapter

    def set_tag(
        self,
        tenant: str,
        adapter_id: str,
        tag: Tag,
        *,
        etag: str | None = None,
        request_id: str | None = None,
    ) -> Adapter:
        """Point a tag at a version, new or not. Raises AdapterNotFound, InvalidReference, InvalidField."""
        check_id(tag.tag, "tag")
        if tag.weight < 1:
            raise InvalidField(f"weight {tag.weight} of tag {tag.tag} is below 1")

        def change(adapter: Adapter) -> Adapter:
            self.version(tenant, adapter_id, tag.digest)
            self._catalogue.set_tag(tenant, adapter_id, tag)
            return adapter

        return self._change(tenant, adapter_id, ("set_tag", tag, etag), change, etag=etag, request_id=request_id)

    def delete_tag(self, tenant: str, adapter_id: str, tag: str, *, request_id: str | None = None) -> Adapter:
        """The version that the tag points at stays. Raises AdapterNotFound."""

        def change(adapter: Adapter) -> Adapter:
            if tag not in adapter.tags:
                raise AdapterNotFound(f"tag {quote(adapter_id)}@{tag} not found")
            self._catalogue.delete_tag(tenant, adapter_id, tag)
            return adapter

        return self._change(tenant, adapter_id, ("delete_tag", tag), change, request_id=request_id)

    def tags(self, tenant: str, adapter_id: str, page_size: int = 0, page_token: str | None = None) -> TagPage:
        """By name. Raises AdapterNotFound, InvalidPage."""
        limit = page_limit(page_size)
        listed = ("tags", tenant, adapter_id)
        after = self._tokens.read(page_token, *listed) if page_token else ""
        with self._lock:
            self.get(tenant, adapter_id)
            found = self._catalogue.tags(tenant, adapter_id, after, limit + 1)
        more = len(found) > limit
        return TagPage(
            tags=tuple(found[:limit]),
            next_page_token=self._tokens.give(found[limit - 1].tag, *listed) if more else None,
        )

    def reap(self) -> int:
        """Forget the deleted adapters whose retention has ended; returns how many."""
        with self._lock, storage_errors():
            expired = self._catalogue.expired_adapters(self._clock())
            for tenant, adapter_id in expired:
                freed = self._catalogue.blobs_of(tenant, adapter_id)
                self._catalogue.purge_adapter(tenant, adapter_id)
                for digest, blobs in freed.items():
                    self._pins.release(digest, blobs)
        return len(expired)

    def _change(
        self,
        tenant: str,
        adapter_id: str,
        call: tuple[object, ...],
        change: Callable[[Adapter], Adapter],
        *,
        etag: str | None = None,
        request_id: str | None = None,
        show_deleted: bool = False,
    ) -> Adapter:
        """Make one change in one transaction, once for each request id; `change` returns the fields to be kept."""

        def run() -> Adapter:
            adapter = self.get(tenant, adapter_id, show_deleted=show_deleted)
            if etag is not None and etag != adapter.etag:
                raise StaleEtag(f"etag {quote(etag)} is not {adapter.etag}, which adapter {quote(adapter_id)} has now")
            changed = replace(change(adapter), update_time=self._clock())
            self._catalogue.save_adapter(changed)
            return self._catalogue.adapter(tenant, adapter_id) or changed

        with self._lock:
            return self._replays.once(
                tenant, request_id, (adapter_id, *call), run, save=Adapter.to_json, load=Adapter.from_json
            )
