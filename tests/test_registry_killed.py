"""Killed with SIGKILL before or after any call that changes the disk: each change is made or not, never in part."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_files import llama_shapes, small_adapter, upload_files
from lorasrv_adapters.published import open_version
from lorasrv_adapters.records import AdapterFilter, Tag, Version
from lorasrv_adapters.registry import Registry

BASE = llama_shapes()

# Runs one of the scripts below and kills itself before or after its n-th call that changes the disk.
PROLOGUE = """
import os, signal, sqlite3, sys
from pathlib import Path
from lorasrv_adapters.registry import Registry
from adapter_files import llama_shapes, upload_files
from lorasrv_adapters.records import Tag

data, folder, fatal = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
steps = 0

def step():
    global steps
    steps += 1
    if steps == fatal:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(function):
    def call(*args, **kwargs):
        step()
        result = function(*args, **kwargs)
        step()
        return result
    return call

class Connection(sqlite3.Connection):
    execute = counted(sqlite3.Connection.execute)

connect = sqlite3.connect
registry = Registry(data, llama_shapes())
registry.close()
sqlite3.connect = lambda *args, **kwargs: connect(*args, **kwargs, factory=Connection)
for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
registry = Registry(data, llama_shapes())
"""
PUBLISH = """
upload = registry.uploads.create("acme", "upper", upload_files(folder))
for file in upload.files:
    writer = registry.uploads.open_writer("acme", upload.upload_id, file.name)
    writer.write(writer.offset, (folder / file.name).read_bytes()[writer.offset:])
registry.uploads.finish("acme", upload.upload_id)
print("acknowledged", steps, flush=True)
"""
# The old version has the tag `prod`; every line is one change.
MANAGE = """
adapters = registry.adapters
adapter = adapters.get("acme", "upper")
old, new = adapter.tags["prod"], adapter.tags["latest"]
upload = registry.uploads.create("acme", "other", upload_files(folder))
print("acknowledged", steps, flush=True)
for change in (
    lambda: adapters.set_tag("acme", "upper", Tag(tag="prod", digest=new), request_id="r-1"),
    lambda: adapters.update("acme", "upper", labels={"a": "b"}, request_id="r-2"),
    lambda: adapters.delete_version("acme", "upper", old),
    lambda: registry.uploads.cancel("acme", upload.upload_id),
    lambda: adapters.delete("acme", "upper"),
    lambda: adapters.undelete("acme", "upper"),
    lambda: adapters.delete("acme", "upper", purge=True),
):
    change()
    print("acknowledged", steps, flush=True)
"""


def run_killed(script: str, data: Path, folder: Path, fatal: int) -> list[str]:
    """What the script printed; `fatal` 0 lets it live."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROLOGUE + script, str(data), str(folder), str(fatal)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode in (0, -9), result.stderr
    return result.stdout.splitlines()


def push(registry: Registry, folder: Path) -> str:
    upload = registry.uploads.create("acme", "upper", upload_files(folder))
    for file in upload.files:
        writer = registry.uploads.open_writer("acme", upload.upload_id, file.name)
        writer.write(writer.offset, (folder / file.name).read_bytes()[writer.offset :])
    version = registry.uploads.finish("acme", upload.upload_id).version
    assert version is not None
    registry.check()
    return version.digest


def num_modules(registry: Registry, digest: str) -> int:
    return len(open_version(registry.blobs, digest, BASE, 256).spec.modules)


def prepared(tmp_path: Path, *folders: Path) -> list[str]:
    """The digests of the versions in `tmp_path / "prepared"`."""
    registry = Registry(tmp_path / "prepared", BASE)
    digests = [push(registry, folder) for folder in folders]
    registry.adapters.set_tag("acme", "upper", Tag(tag="prod", digest=digests[0]))
    registry.close()
    return digests


@pytest.mark.row(31)
def test_killed_while_publishing_leaves_a_whole_version_or_a_resumable_upload(tmp_path: Path) -> None:
    old, new = (small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in (0, 1))
    (before,) = prepared(tmp_path, old)
    shutil.copytree(tmp_path / "prepared", tmp_path / "dry")
    num_steps = int(run_killed(PUBLISH, tmp_path / "dry", new, 0)[-1].split()[1])
    assert num_steps > 60
    outcomes = {"old": 0, "new": 0}
    for fatal in sorted({*range(1, num_steps, 6), *range(num_steps - 8, num_steps + 1)}):
        data = shutil.copytree(tmp_path / "prepared", tmp_path / f"data{fatal}")
        assert run_killed(PUBLISH, data, new, fatal) == []
        registry = Registry(data, BASE)
        registry.check()
        digest = registry.resolve("acme", "upper").digest
        assert num_modules(registry, digest) == num_modules(registry, before) == 4
        outcomes["old" if digest == before else "new"] += 1
        assert push(registry, new) != before
        registry.close()
    assert outcomes["old"] > 0
    assert outcomes["new"] > 0


def test_killed_while_changing_leaves_each_change_made_or_not(tmp_path: Path) -> None:
    folders = [small_adapter(tmp_path / str(seed), BASE, seed=seed) for seed in (0, 1)]
    old, new = prepared(tmp_path, *folders)
    other = small_adapter(tmp_path / "2", BASE, seed=2)

    def num_changes(registry: Registry) -> int:
        """How many of the changes of MANAGE have been made."""
        adapters = registry.adapters.list("acme", AdapterFilter(show_deleted=True)).adapters
        if not adapters:
            return 7
        (adapter,) = adapters
        cancelled = not registry._uploads.receiving()
        deleted = adapter.delete_time is not None
        marks = (adapter.tags["prod"] == new, bool(adapter.labels), len(adapter.versions) == 1, cancelled)
        made = sum(marks)
        assert marks == tuple(index < made for index in range(4))
        # Undeleted is the fourth state again, but for the time of the change.
        return made + deleted

    shutil.copytree(tmp_path / "prepared", tmp_path / "dry")
    lines = run_killed(MANAGE, tmp_path / "dry", other, 0)
    assert len(lines) == 8
    first, last = (int(line.split()[1]) for line in (lines[0], lines[-1]))
    seen: set[int] = set()
    for fatal in range(first + 1, last + 1, 5):
        data = shutil.copytree(tmp_path / "prepared", tmp_path / f"data{fatal}")
        acknowledged = len(run_killed(MANAGE, data, other, fatal)) - 1
        registry = Registry(data, BASE)
        registry.check()
        if acknowledged >= 0:
            made = num_changes(registry)
            possible = {0: {0, 1}, 1: {1, 2}, 2: {2, 3}, 3: {3, 4}, 4: {4, 5}, 5: {5, 4}, 6: {4, 7}}[acknowledged]
            assert made in possible, (fatal, acknowledged, made)
            seen.add(made)
            for digest in {old, new} & {version.digest for version in versions_of(registry)}:
                assert num_modules(registry, digest) == 4
        # A change whose answer was lost is asked for again, and not made twice.
        if versions_of(registry) and acknowledged < 4:
            for _ in range(2):
                registry.adapters.set_tag("acme", "upper", Tag(tag="prod", digest=new), request_id="r-1")
                assert registry.adapters.get("acme", "upper").tags["prod"] == new
        registry.check()
        registry.close()
    assert seen >= {1, 2, 3, 4, 5}


def versions_of(registry: Registry) -> tuple[Version, ...]:
    adapters = registry.adapters.list("acme").adapters
    return adapters[0].versions if adapters else ()
