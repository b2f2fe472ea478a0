"""`lorasrv adapters`: tags, pins, deletion and back, versions, and the ways in and out."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_folders import write_adapter
from fake_engine import server_config
from lorasrv_adapters.limits import RegistryLimits
from running_server import Running, running_server
from test_cli import assert_fails, in_thread, own_config


@pytest.fixture
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    own_config(tmp_path, monkeypatch)
    (tmp_path / "import" / "default").mkdir(parents=True)
    config = server_config(tmp_path / "data")
    config = replace(config, registry=replace(RegistryLimits(), import_root=tmp_path / "import"))
    async with running_server(tmp_path / "data", config) as found:
        monkeypatch.setenv("LORASRV_URL", found.address)
        yield found


async def out(*arguments: object) -> str:
    result = await in_thread("adapters", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


async def test_tags_move_and_versions_go(running: Running, tmp_path: Path) -> None:
    first = await out("push", write_adapter(tmp_path / "upper"))
    second = await out("push", write_adapter(tmp_path / "again", rank=8), "--name", "upper")
    assert first != second
    assert await out("tag", first, "prod") == first.replace("@", "@prod: ")
    assert_fails(await in_thread("adapters", "rm", first), 5, "prod")
    assert await out("tag", "upper", "prod") == second.replace("@", "@prod: ")
    assert json.loads(await out("show", "upper", "--json"))["tags"]["prod"] == second.partition(":")[2]
    assert await out("rm", first) == f"deleted {first}"
    assert_fails(await in_thread("adapters", "tag", first, "prod"), 3, "not found")
    assert await out("untag", "upper", "prod") == "untagged upper@prod"
    assert list(json.loads(await out("show", "upper", "--json"))["tags"]) == ["latest"]


async def test_what_is_deleted_comes_back_unless_it_is_purged(running: Running, tmp_path: Path) -> None:
    await out("push", write_adapter(tmp_path / "upper"))
    await out("push", write_adapter(tmp_path / "lower", rank=8))
    assert await out("pin", "upper") == "pinned upper"
    assert_fails(await in_thread("adapters", "rm", "upper"), 5, "pinned")
    assert await out("unpin", "upper") == "unpinned upper"
    await out("rm", "upper")
    assert "upper" not in await out("ls")
    assert "upper" in await out("ls", "--deleted")
    assert "lower" not in await out("ls", "--deleted", "--prefix", "up")
    assert await out("restore", "upper") == "restored upper"
    assert "upper" in await out("ls")
    await out("rm", "upper", "--purge")
    assert_fails(await in_thread("adapters", "restore", "upper"), 3, "not found")


async def test_in_and_out(running: Running, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "upper")
    pushed = await out("push", folder, "--create-only")
    assert_fails(await in_thread("adapters", "push", folder, "--create-only"), 5, "upper")
    assert await out("pull", "upper@latest", tmp_path / "copy") == pushed
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    assert (await in_thread("adapters", "pull", "upper", tmp_path / "copy")).exit_code != 0
    write_adapter(tmp_path / "import" / "default" / "there")
    imported = json.loads(await out("import", "there", "theirs", "--json"))
    assert (imported["adapter_id"], imported["version"]["digest"]) == ("theirs", pushed.partition(":")[2])
    assert_fails(await in_thread("adapters", "import", "../../data", "theirs"), 4, "")
