"""Adapters as resources, without a wire: deletion and its end, tags, states, quotas and bytes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_files import llama_shapes, small_adapter, upload_files
from lorasrv_adapters import errors as err
from lorasrv_adapters.limits import RegistryLimits
from lorasrv_adapters.manifest import WEIGHTS_FILE
from lorasrv_adapters.records import Adapter, AdapterFilter, Tag, VersionState
from lorasrv_adapters.registry import Registry
from test_registry import Clock, open_digest, push, send

BASE = llama_shapes()
LIMITS = RegistryLimits(retention_s=100, open_uploads=2)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    registry = Registry(tmp_path / "data", BASE, clock=clock, limits=LIMITS)
    yield registry
    registry.check()
    registry.close()


def test_deleted_adapters_come_back_until_their_time(registry: Registry, tmp_path: Path, clock: Clock) -> None:
    digest = push(registry, small_adapter(tmp_path / "a", BASE))
    registry.adapters.update("acme", "upper", labels={"a": "b"})
    for _ in range(2):
        deleted = registry.adapters.delete("acme", "upper")
        assert (deleted.delete_time, deleted.expire_time) == (clock.now, clock.now + 100)
        for call in (
            lambda: registry.adapters.get("acme", "upper"),
            lambda: registry.resolve("acme", f"upper@sha256:{digest}"),
            lambda: registry.adapters.delete("acme", "upper"),
            lambda: registry.adapters.pin("acme", "upper"),
            lambda: registry.adapters.tags("acme", "upper"),
            lambda: registry.adapters.version("acme", "upper", digest),
            lambda: registry.download("acme", "upper", digest),
        ):
            with pytest.raises(err.AdapterNotFound):
                call()
        assert registry.adapters.get("acme", "upper", show_deleted=True) == deleted
        clock.now += 99
        assert registry.reap() == 0
        back = registry.adapters.undelete("acme", "upper")
        assert (back.delete_time, back.labels, registry.resolve("acme", "upper").digest) == (None, {"a": "b"}, digest)
    registry.adapters.delete("acme", "upper")
    held = registry.blobs
    clock.now += 100
    registry.reap()
    assert not list(held.digests())
    with pytest.raises(err.AdapterNotFound):
        registry.adapters.undelete("acme", "upper")


def test_the_pin_of_a_stream_outlives_the_retention(registry: Registry, tmp_path: Path, clock: Clock) -> None:
    digest = push(registry, small_adapter(tmp_path / "a", BASE))
    registry.acquire("acme", "upper")
    registry.adapters.delete("acme", "upper")
    clock.now += 100
    assert registry.reap() > 0
    registry.check()
    assert open_digest(registry, digest) == 4
    registry.unpin(digest)
    assert not list(registry.blobs.digests())


def test_publishing_undeletes(registry: Registry, tmp_path: Path) -> None:
    first, second = (push(registry, small_adapter(tmp_path / "a", BASE, seed=seed)) for seed in (0, 1))
    registry.adapters.delete("acme", "upper")
    third = push(registry, small_adapter(tmp_path / "a", BASE, seed=2))
    adapter = registry.adapters.get("acme", "upper")
    assert [version.digest for version in adapter.versions] == [third, second, first]
    assert (adapter.delete_time, adapter.expire_time) == (None, None)


def test_an_adapter_may_lose_all_its_versions(registry: Registry, tmp_path: Path) -> None:
    digest = push(registry, small_adapter(tmp_path / "a", BASE))
    registry.adapters.delete_tag("acme", "upper", "latest")
    with pytest.raises(err.AdapterNotFound):
        registry.resolve("acme", "upper")
    registry.adapters.delete_version("acme", "upper", digest)
    assert registry.adapters.get("acme", "upper").versions == ()
    assert not list(registry.blobs.digests())
    assert push(registry, tmp_path / "a") == digest


def test_tags_point_where_they_are_set(registry: Registry, tmp_path: Path) -> None:
    first, second = (push(registry, small_adapter(tmp_path / "a", BASE, seed=seed)) for seed in (0, 1))
    for digest in (first, second, first):
        registry.adapters.set_tag("acme", "upper", Tag(tag="prod", digest=digest, weight=7))
        assert registry.resolve("acme", "upper@prod").digest == digest
    assert registry.resolve("acme", "upper").digest == second
    page = registry.adapters.tags("acme", "upper")
    assert page.tags == (Tag(tag="latest", digest=second), Tag(tag="prod", digest=first, weight=7))
    for bad in (Tag(tag="prod", digest=first, weight=0), Tag(tag="prod", digest=first, weight=-1)):
        with pytest.raises(err.InvalidField):
            registry.adapters.set_tag("acme", "upper", bad)


def test_the_etag_follows_what_is_kept_and_nothing_else(registry: Registry, tmp_path: Path, clock: Clock) -> None:
    digest = push(registry, small_adapter(tmp_path / "a", BASE))
    etags = [registry.adapters.get("acme", "upper").etag]
    registry.unpin(registry.acquire("acme", "upper").digest)
    registry.blobs.path(upload_files(tmp_path / "a")[1].sha256).unlink()
    registry.quarantine(digest)
    assert registry.adapters.get("acme", "upper").etag == etags[0]
    for change in (
        lambda: registry.adapters.update("acme", "upper", labels={"a": "b"}),
        lambda: registry.adapters.update("acme", "upper", annotations={"a": "b"}),
        lambda: registry.adapters.set_tag("acme", "upper", Tag(tag="prod", digest=digest)),
        lambda: registry.adapters.pin("acme", "upper"),
        lambda: registry.adapters.unpin("acme", "upper"),
        lambda: push(registry, small_adapter(tmp_path / "b", BASE, seed=3)),
        lambda: registry.adapters.delete("acme", "upper"),
        lambda: registry.adapters.undelete("acme", "upper"),
    ):
        clock.now += 1
        change()
        etags.append(registry.adapters.get("acme", "upper", show_deleted=True).etag)
    assert len(set(etags)) == len(etags)


def test_an_adapter_survives_its_record(registry: Registry, tmp_path: Path) -> None:
    push(registry, small_adapter(tmp_path / "a", BASE))
    registry.adapters.update("acme", "upper", labels={"a": "b"}, annotations={"note": "\u00fc"})
    adapter = registry.adapters.delete("acme", "upper")
    assert Adapter.from_json(adapter.to_json()) == adapter


def test_versions_of_another_base_are_incompatible(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "data", BASE)
    digest = push(registry, small_adapter(tmp_path / "a", BASE))
    assert registry.adapters.version("acme", "upper", digest).state is VersionState.READY
    registry.close()
    registry = Registry(tmp_path / "data", replace(BASE, fingerprint="another"))
    assert registry.adapters.version("acme", "upper", digest).state is VersionState.INCOMPATIBLE
    push(registry, tmp_path / "a")
    assert registry.adapters.version("acme", "upper", digest).state is VersionState.READY
    registry.close()


def test_uploads_under_way_are_limited_for_each_tenant(registry: Registry, tmp_path: Path) -> None:
    files = upload_files(small_adapter(tmp_path / "a", BASE))
    uploads = [registry.uploads.create("acme", "upper", files) for _ in range(2)]
    with pytest.raises(err.QuotaExceeded, match="2"):
        registry.uploads.create("acme", "upper", files)
    registry.uploads.create("rival", "upper", files)
    registry.uploads.cancel("acme", uploads[0].upload_id)
    registry.uploads.create("acme", "upper", files)


def test_bytes_are_counted_for_each_tenant_across_restarts(tmp_path: Path) -> None:
    folder, other = (small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in (0, 1))
    size = sum(file.size_bytes for file in upload_files(folder))
    limits = RegistryLimits(tenant_bytes=size + 200)
    registry = Registry(tmp_path / "data", BASE, limits=limits)
    push(registry, folder)
    push(registry, folder, tenant="rival")
    used = registry._tenant_bytes.used
    assert (used("acme"), used("rival"), used("nobody")) == (size, size, 0)
    # What the tenant has already takes no room.
    push(registry, folder, "twin")
    assert used("acme") == size
    for name in ("upper", "twin"):
        registry.adapters.delete("acme", name, purge=True)
    upload = registry.uploads.create("acme", "upper", upload_files(other))
    registry.uploads.open_writer("acme", upload.upload_id, WEIGHTS_FILE).write(0, b"x" * 100)
    assert used("acme") == 100
    registry.close()
    registry = Registry(tmp_path / "data", BASE, limits=limits)
    registry.check()
    used = registry._tenant_bytes.used
    assert used("acme") == 100
    again = registry.uploads.create("acme", "upper", upload_files(folder))
    send(registry, again, folder)
    with pytest.raises(err.QuotaExceeded, match=str(size + 200)):
        registry.uploads.open_writer("acme", upload.upload_id, WEIGHTS_FILE).write(100, b"x" * 101)
    registry.uploads.cancel("acme", upload.upload_id)
    registry.uploads.cancel("acme", again.upload_id)
    assert used("acme") == 0
    registry.check()
    registry.close()


def test_lists_are_of_one_tenant_and_one_filter(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    for name in ("a", "b", "c"):
        push(registry, folder, name)
    token = registry.adapters.list("acme", page_size=1).next_page_token
    assert [each.adapter_id for each in registry.adapters.list("acme", page_token=token).adapters] == ["b", "c"]
    with pytest.raises(err.InvalidPage):
        registry.adapters.list("rival", page_token=token)
    with pytest.raises(err.InvalidPage):
        registry.adapters.list("acme", AdapterFilter(show_deleted=True), page_token=token)
