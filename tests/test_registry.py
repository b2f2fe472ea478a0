"""The registry: publishing is atomic whatever kills it, uploads resume, tenants see only their own, pins hold."""

import errno
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from adapter_files import llama_shapes, lora_config, lora_tensors, small_adapter, upload_files, write_adapter
from lorasrv_adapters import errors as err
from lorasrv_adapters.manifest import (
    CONFIG_FILE,
    FILE_NAMES,
    SERVING_FILE,
    WEIGHTS_FILE,
    ManifestFile,
    make_manifest,
    parse_manifest,
)
from lorasrv_adapters.published import open_folder, open_version
from lorasrv_adapters.records import Tag, Upload, UploadFile, UploadState, VersionState
from lorasrv_adapters.registry import Registry

BASE = llama_shapes()
WAIT_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    registry = Registry(tmp_path / "data", BASE, clock=clock)
    yield registry
    registry.check()
    registry.close()


def send(registry: Registry, upload: Upload, folder: Path, chunk_bytes: int = 700) -> None:
    """Bring every file from its committed offset to its end, as a client does."""
    for file in registry.uploads.get(upload.tenant, upload.upload_id).files:
        writer = registry.uploads.open_writer(upload.tenant, upload.upload_id, file.name)
        data = (folder / file.name).read_bytes()
        offset = writer.offset
        while offset < len(data):
            offset = writer.write(offset, data[offset : offset + chunk_bytes])


def start(registry: Registry, folder: Path, adapter_id: str = "upper", tenant: str = "acme") -> Upload:
    upload = registry.uploads.create(tenant, adapter_id, upload_files(folder))
    send(registry, upload, folder)
    return upload


def push(registry: Registry, folder: Path, adapter_id: str = "upper", tenant: str = "acme") -> str:
    done = registry.uploads.finish(tenant, start(registry, folder, adapter_id, tenant).upload_id)
    registry.check()
    assert done.version is not None
    return done.version.digest


def open_digest(registry: Registry, digest: str) -> int:
    return len(open_version(registry.blobs, digest, BASE, 256).spec.modules)


def test_publish_and_open(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    digest = push(registry, folder)

    adapter = registry.adapters.get("acme", "upper")
    (version,) = adapter.versions
    assert adapter.tags == {"latest": digest}
    assert (version.digest, version.rank_min, version.rank_max) == (digest, 2, 2)
    assert version.target_modules == ("q_proj", "down_proj")
    assert version.size_bytes == sum((folder / name).stat().st_size for name in FILE_NAMES)
    files = open_version(registry.blobs, digest, BASE, 256)
    with files.open_weights() as weights:
        assert weights.read() == (folder / WEIGHTS_FILE).read_bytes()
    assert len(files.spec.modules) == 4


def test_digest_names_the_content(registry: Registry, tmp_path: Path) -> None:
    first, second = (small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in (0, 1))
    manifest = make_manifest(
        [ManifestFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in upload_files(first)]
    )
    assert parse_manifest(manifest.to_bytes()) == manifest
    assert push(registry, first) == manifest.digest
    assert push(registry, second) != manifest.digest


def test_the_digest_covers_the_defaults_and_is_what_it_was_without(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)

    def expected() -> str:
        files = [
            {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest(), "size_bytes": path.stat().st_size}
            for path in sorted(folder.iterdir())
        ]
        text = json.dumps({"files": files, "format": "lorasrv.adapter.v1"}, sort_keys=True, separators=(",", ":"))
        return sha256(text.encode()).hexdigest()

    digests: list[str] = []
    for content in (None, b"{}", b'{"sampling": {"top_k": 3}}', b"{ }"):
        if content is not None:
            (folder / SERVING_FILE).write_bytes(content)
        digests.append(push(registry, folder))
        assert digests[-1] == expected() == open_folder(folder, BASE, 256).digest
        assert open_digest(registry, digests[-1]) == 4
    assert len(set(digests)) == 4
    versions = registry.adapters.get("acme", "upper").versions
    assert [version.serving for version in versions] == ["{}", '{"sampling": {"top_k": 3}}', "{}", None]
    assert [registry.resolve("acme", f"upper@sha256:{digest}").serving for digest in digests] == [
        version.serving for version in reversed(versions)
    ]


def test_a_damaged_serving_file_is_found(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    (folder / SERVING_FILE).write_bytes(b"{}")
    digest = push(registry, folder)
    registry.blobs.path(sha256(b"{}").hexdigest()).write_bytes(b"[]")
    with pytest.raises(err.CorruptBlob):
        open_digest(registry, digest)


def test_new_version_moves_latest_and_keeps_the_old(registry: Registry, tmp_path: Path) -> None:
    digests = [push(registry, small_adapter(tmp_path / str(seed), BASE, seed=seed)) for seed in range(3)]
    adapter = registry.adapters.get("acme", "upper")
    assert [version.digest for version in adapter.versions] == digests[::-1]
    assert registry.resolve("acme", "upper").digest == digests[-1]
    assert registry.resolve("acme", f"upper@sha256:{digests[0][:8]}").digest == digests[0]
    assert registry.resolve("acme", f"upper@sha256:{digests[1]}").digest == digests[1]


def test_same_content_is_stored_once_and_moves_the_tag_back(registry: Registry, tmp_path: Path) -> None:
    old, new = (small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in (0, 1))
    digest = push(registry, old)
    push(registry, new)
    blobs = set(registry.blobs.digests())
    assert push(registry, old) == digest
    assert push(registry, old, tenant="other") == digest
    assert set(registry.blobs.digests()) == blobs
    assert len(registry.adapters.get("acme", "upper").versions) == 2
    assert registry.resolve("acme", "upper@latest").digest == digest


def test_finish_is_idempotent(registry: Registry, tmp_path: Path) -> None:
    upload = start(registry, small_adapter(tmp_path / "a", BASE))
    results: list[Upload] = []
    threads = [
        threading.Thread(target=lambda: results.append(registry.uploads.finish("acme", upload.upload_id)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(results) == 4
    assert len({result.version for result in results}) == 1
    assert results[0].state is UploadState.PUBLISHED
    assert registry.uploads.get("acme", upload.upload_id) == results[0]
    with pytest.raises(err.UploadNotReceiving):
        registry.uploads.open_writer("acme", upload.upload_id, CONFIG_FILE)


def test_refused_content_fails_the_upload_with_all_reasons(registry: Registry, tmp_path: Path) -> None:
    config = lora_config(use_dora=True, lora_alpha=-1)
    folder = write_adapter(tmp_path / "a", config, lora_tensors(BASE, ["q_proj", "down_proj"], 2))
    upload = start(registry, folder)
    reasons: list[list[str]] = []
    for _ in range(2):
        with pytest.raises(err.ContentRefused) as refused:
            registry.uploads.finish("acme", upload.upload_id)
        assert {type(error) for error in refused.value.errors} == {err.UnsupportedFeature, err.InvalidAdapter}
        reasons.append([str(error) for error in refused.value.errors])
        registry.check()
    failed = registry.uploads.get("acme", upload.upload_id)
    assert failed.state is UploadState.FAILED
    assert reasons == [[str(error) for error in failed.errors]] * 2
    assert not list((tmp_path / "data" / "staging").iterdir())
    with pytest.raises(err.AdapterNotFound):
        registry.adapters.get("acme", "upper")


def test_offsets(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    upload = registry.uploads.create("acme", "upper", upload_files(folder))
    writer = registry.uploads.open_writer("acme", upload.upload_id, WEIGHTS_FILE)
    data = (folder / WEIGHTS_FILE).read_bytes()
    assert writer.write(0, data[:100]) == 100
    for wrong in (0, 99, 101, 1 << 60):
        with pytest.raises(err.OffsetMismatch) as mismatch:
            writer.write(wrong, b"x")
        assert mismatch.value.current == 100
    with pytest.raises(err.InvalidUpload, match=str(len(data))):
        writer.write(100, data)
    with pytest.raises(err.UploadIncomplete, match="100 of"):
        registry.uploads.finish("acme", upload.upload_id)
    assert {f.name: f.committed_bytes for f in registry.uploads.get("acme", upload.upload_id).files} == {
        WEIGHTS_FILE: 100,
        CONFIG_FILE: 0,
    }
    with pytest.raises(err.InvalidUpload):
        registry.uploads.open_writer("acme", upload.upload_id, "../catalogue.sqlite3")


def test_digest_mismatch_returns_that_file_to_zero(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    upload = registry.uploads.create("acme", "upper", upload_files(folder))
    good = (folder / CONFIG_FILE).read_bytes()
    (folder / CONFIG_FILE).write_bytes(b"x" * len(good))
    send(registry, upload, folder)
    with pytest.raises(err.DigestMismatch, match=CONFIG_FILE):
        registry.uploads.finish("acme", upload.upload_id)
    offsets = {f.name: f.committed_bytes for f in registry.uploads.get("acme", upload.upload_id).files}
    assert offsets[CONFIG_FILE] == 0
    assert offsets[WEIGHTS_FILE] > 0
    (folder / CONFIG_FILE).write_bytes(good)
    send(registry, upload, folder)
    assert registry.uploads.finish("acme", upload.upload_id).state is UploadState.PUBLISHED


def test_the_newest_writer_wins(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    upload = registry.uploads.create("acme", "upper", upload_files(folder))
    data = (folder / WEIGHTS_FILE).read_bytes()
    old = registry.uploads.open_writer("acme", upload.upload_id, WEIGHTS_FILE)
    other = registry.uploads.open_writer("acme", upload.upload_id, CONFIG_FILE)
    old.write(0, data[:50])
    new = registry.uploads.open_writer("acme", upload.upload_id, WEIGHTS_FILE)
    assert new.offset == 50
    with pytest.raises(err.UploadSuperseded):
        old.write(50, data[50:])
    new.write(50, data[50:])
    other.write(0, (folder / CONFIG_FILE).read_bytes())
    registry.uploads.finish("acme", upload.upload_id)
    with pytest.raises(err.UploadNotReceiving):
        new.write(len(data), b"")


@pytest.mark.parametrize(
    "names",
    [
        [],
        [CONFIG_FILE],
        [*FILE_NAMES, "README.md"],
        [CONFIG_FILE, CONFIG_FILE],
        [CONFIG_FILE, "adapter_model.bin"],
        [CONFIG_FILE, "../adapter_model.safetensors"],
        [SERVING_FILE],
        [CONFIG_FILE, SERVING_FILE],
        [*FILE_NAMES, SERVING_FILE, SERVING_FILE],
    ],
)
def test_only_an_adapters_files_are_taken(registry: Registry, names: list[str]) -> None:
    with pytest.raises(err.InvalidUpload):
        registry.uploads.create("acme", "upper", [UploadFile(name=n, size_bytes=1, sha256="0" * 64) for n in names])


@pytest.mark.parametrize(
    ("size", "sha256"), [(-1, "0" * 64), (1 << 62, "0" * 64), (1, "0" * 63), (1, "A" * 64), (1, "")]
)
def test_sizes_and_digests_are_checked_when_announced(registry: Registry, size: int, sha256: str) -> None:
    files = [UploadFile(name=name, size_bytes=size, sha256=sha256) for name in FILE_NAMES]
    with pytest.raises(err.InvalidUpload):
        registry.uploads.create("acme", "upper", files)


@pytest.mark.parametrize("bad", ["", "Upper", "a\0", "x" * 64, "\u0430", "../a", "base"])
def test_bad_ids(registry: Registry, tmp_path: Path, bad: str) -> None:
    files = upload_files(small_adapter(tmp_path / "a", BASE))
    with pytest.raises(err.InvalidReference):
        registry.uploads.create("acme", bad, files)
    with pytest.raises(err.InvalidReference):
        registry.resolve("acme", bad)
    if bad != "base":
        with pytest.raises(err.InvalidReference):
            registry.uploads.create(bad, "upper", files)


def test_another_tenants_things_look_missing(registry: Registry, tmp_path: Path) -> None:
    digest = push(registry, small_adapter(tmp_path / "a", BASE))
    upload = registry.uploads.create("acme", "upper", upload_files(tmp_path / "a"))

    def texts(tenant: str, adapter_id: str, upload_id: str) -> list[str]:
        calls = [
            lambda: registry.adapters.get(tenant, adapter_id),
            lambda: registry.adapters.delete(tenant, adapter_id),
            lambda: registry.resolve(tenant, adapter_id),
            lambda: registry.resolve(tenant, f"{adapter_id}@sha256:{digest}"),
            lambda: registry.uploads.get(tenant, upload_id),
            lambda: registry.uploads.open_writer(tenant, upload_id, CONFIG_FILE),
            lambda: registry.uploads.finish(tenant, upload_id),
        ]
        found = []
        for call in calls:
            with pytest.raises((err.AdapterNotFound, err.UploadNotFound)) as missing:
                call()
            found.append(str(missing.value).replace(adapter_id, "ID").replace(upload_id, "UPLOAD"))
        return found

    assert texts("rival", "upper", upload.upload_id) == texts("rival", "nosuch", "f" * 32)
    assert registry.adapters.list("rival").adapters == ()


def test_listing_pages(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    names = [f"a{i}" for i in range(5)]
    for name in names[::-1]:
        push(registry, folder, name)
    seen: list[str] = []
    token: str | None = None
    while True:
        page = registry.adapters.list("acme", page_size=2, page_token=token)
        seen += [adapter.adapter_id for adapter in page.adapters]
        token = page.next_page_token
        if token is None:
            break
        registry.adapters.delete("acme", seen[-1])
        forged = ("x", "AAAA", "\u0430", "L2Jhc2U=", "YWNtZS8uLi8=")
        for bad in forged:
            with pytest.raises(err.InvalidPage):
                registry.adapters.list("acme", page_size=2, page_token=bad)
        with pytest.raises(err.InvalidPage):
            registry.adapters.list("rival", page_size=2, page_token=token)
    assert seen == names
    with pytest.raises(err.InvalidPage, match="-1"):
        registry.adapters.list("acme", page_size=-1)


def test_unknown_references(registry: Registry, tmp_path: Path) -> None:
    push(registry, small_adapter(tmp_path / "a", BASE))
    for reference in ("upper@prod", "upper@sha256:00000000", "lower"):
        with pytest.raises(err.AdapterNotFound):
            registry.resolve("acme", reference)


def test_delete_keeps_shared_and_pinned_blobs(registry: Registry, tmp_path: Path) -> None:
    first, second = (small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in (0, 1))
    push(registry, first)
    digest = push(registry, first, "twin")
    push(registry, second)
    registry.adapters.delete("acme", "upper", purge=True)
    registry.check()
    assert open_digest(registry, digest) == 4
    pinned = registry.acquire("acme", "twin")
    registry.pin(digest)
    registry.adapters.delete("acme", "twin", purge=True)
    registry.check()
    assert (pinned.digest, registry.num_pins) == (digest, 2)
    assert open_digest(registry, digest) == 4
    registry.unpin(digest)
    registry.pin(digest)
    registry.unpin(digest)
    assert open_digest(registry, digest) == 4
    registry.unpin(digest)
    registry.check()
    assert not list(registry.blobs.digests())
    with pytest.raises(err.AdapterNotFound):
        registry.pin(digest)


def test_published_again_while_a_deleted_one_is_pinned(registry: Registry, tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    digest = push(registry, folder)
    registry.pin(digest)
    registry.adapters.delete("acme", "upper", purge=True)
    assert push(registry, folder) == digest
    registry.unpin(digest)
    registry.check()
    assert open_digest(registry, digest) == 4


def test_expired_uploads_are_reaped(registry: Registry, tmp_path: Path, clock: Clock) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    digest = push(registry, folder)
    upload = start(registry, folder)
    writer = registry.uploads.open_writer("acme", upload.upload_id, CONFIG_FILE)
    assert registry.reap() == 0
    clock.now = upload.expire_time
    assert registry.reap() == 2
    with pytest.raises(err.UploadNotFound):
        registry.uploads.get("acme", upload.upload_id)
    with pytest.raises(err.UploadNotReceiving):
        writer.write(0, b"x")
    assert not list((tmp_path / "data" / "staging").iterdir())
    assert registry.resolve("acme", "upper").digest == digest


def test_uploads_resume_after_a_restart(tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    registry = Registry(tmp_path / "data", BASE)
    upload = registry.uploads.create("acme", "upper", upload_files(folder))
    registry.uploads.open_writer("acme", upload.upload_id, WEIGHTS_FILE).write(
        0, (folder / WEIGHTS_FILE).read_bytes()[:77]
    )
    registry.close()
    (tmp_path / "data" / "staging" / "abandoned").mkdir()
    registry = Registry(tmp_path / "data", BASE)
    registry.check()
    assert registry.uploads.open_writer("acme", upload.upload_id, WEIGHTS_FILE).offset == 77
    send(registry, upload, folder)
    assert registry.uploads.finish("acme", upload.upload_id).state is UploadState.PUBLISHED
    registry.close()


def test_corrupt_and_missing_blobs_are_found_and_repaired(registry: Registry, tmp_path: Path) -> None:
    folders = [small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in (0, 1)]
    digest, neighbour = push(registry, folders[0]), push(registry, folders[1], "lower")
    weights = next(file.sha256 for file in upload_files(folders[0]) if file.name == WEIGHTS_FILE)
    good = registry.blobs.path(weights).read_bytes()
    for damaged in (good[:-1] + bytes([good[-1] ^ 1]), good[:-1], None):
        registry.blobs.path(weights).unlink()
        if damaged is not None:
            registry.blobs.path(weights).write_bytes(damaged)
        with pytest.raises(err.CorruptBlob) as corrupt:
            open_digest(registry, digest)
        assert str(tmp_path) not in str(corrupt.value)
        assert open_digest(registry, neighbour) == 4
        push(registry, folders[0])
        assert open_digest(registry, digest) == 4


def test_another_base_refuses_to_resolve_until_published_again(tmp_path: Path) -> None:
    folder = small_adapter(tmp_path / "a", BASE)
    registry = Registry(tmp_path / "data", BASE)
    digest = push(registry, folder)
    registry.close()
    other = type(BASE)(num_layers=2, modules=BASE.modules, fingerprint="new-tokenizer", dtype="float32")
    registry = Registry(tmp_path / "data", other)
    with pytest.raises(err.BaseMismatch, match="new-tokenizer"):
        registry.resolve("acme", "upper")
    assert push(registry, folder) == digest
    assert registry.resolve("acme", "upper").digest == digest
    registry.close()


def test_a_full_disk_is_reported_and_leaves_nothing(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = start(registry, small_adapter(tmp_path / "a", BASE))
    replace, calls = os.replace, []

    def full(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(err.StorageFull) as refused:
            registry.uploads.finish("acme", upload.upload_id)
    assert str(tmp_path) not in str(refused.value)
    registry.check()
    send(registry, upload, tmp_path / "a")
    assert registry.uploads.finish("acme", upload.upload_id).state is UploadState.PUBLISHED


@pytest.mark.row(33)
def test_one_process_owns_a_data_directory(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(err.RegistryUnavailable, match="another process"):
        Registry(tmp_path / "data", BASE)


# What takes a catalogue back to an older schema.
TO_SECOND = (
    "DROP TABLE replays",
    "DROP TABLE keys",
    "ALTER TABLE uploads DROP COLUMN create_only",
    "ALTER TABLE tags DROP COLUMN weight",
    "ALTER TABLE versions DROP COLUMN quarantined",
    *(
        f"ALTER TABLE adapters DROP COLUMN {name}"
        for name in ("labels", "annotations", "pinned", "delete_time", "expire_time")
    ),
)
DOWNGRADES = {2: TO_SECOND, 1: (*TO_SECOND, "ALTER TABLE versions DROP COLUMN serving")}


@pytest.mark.parametrize("schema", [1, 2])
def test_a_catalogue_of_an_older_schema_is_brought_up_to_date(tmp_path: Path, schema: int) -> None:
    registry = Registry(tmp_path / "data", BASE)
    folder = small_adapter(tmp_path / "a", BASE)
    digest = push(registry, folder)
    upload = registry.uploads.create("acme", "other", upload_files(folder))
    registry.close()
    db = sqlite3.connect(tmp_path / "data" / "catalogue.sqlite3", isolation_level=None)
    for statement in DOWNGRADES[schema]:
        db.execute(statement)
    db.execute(f"PRAGMA user_version={schema}")
    db.close()
    for _ in range(2):
        registry = Registry(tmp_path / "data", BASE)
        (version,) = registry.adapters.get("acme", "upper").versions
        assert (version.digest, version.serving, version.state) == (digest, None, VersionState.READY)
        assert registry.adapters.tags("acme", "upper").tags == (Tag(tag="latest", digest=digest),)
        assert registry.uploads.get("acme", upload.upload_id).state is UploadState.RECEIVING
        assert open_digest(registry, digest) == 4
        registry.check()
        registry.close()


@pytest.mark.row(33)
def test_damaged_or_newer_catalogues_are_refused(tmp_path: Path) -> None:
    Registry(tmp_path / "data", BASE).close()
    catalogue = tmp_path / "data" / "catalogue.sqlite3"
    db = sqlite3.connect(catalogue)
    db.execute("PRAGMA user_version=99")
    db.close()
    for _ in range(2):
        with pytest.raises(err.RegistryUnavailable, match="schema 99"):
            Registry(tmp_path / "data", BASE)
    catalogue.write_bytes(b"not a database, " * 512)
    with pytest.raises(err.RegistryUnavailable) as refused:
        Registry(tmp_path / "data", BASE)
    assert str(tmp_path) not in str(refused.value)


def test_many_threads_publish_delete_and_pin(registry: Registry, tmp_path: Path) -> None:
    folders = [small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in range(2)]
    failures: list[Exception] = []

    def work(name: str) -> None:
        try:
            for round_ in range(6):
                registry.uploads.finish("acme", start(registry, folders[round_ % 2], name).upload_id)
                resolved = registry.acquire("acme", name)
                registry.adapters.delete("acme", name, purge=True)
                assert open_digest(registry, resolved.digest) == 4
                registry.unpin(resolved.digest)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"a{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures
    assert registry.num_pins == 0
    assert not list(registry.blobs.digests())
