"""Server reflection drives calls of clients without stubs; with keys on it asks for one, as all else does."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from keyed import KeyRing, keyed_server
from lorasrv.keys import Role
from running_server import running_server

CLIENT = Path(__file__).with_name("stubless_client.py")
PAGE = Path(__file__).parent.parent / "docs" / "security.md"


async def called(*arguments: str) -> dict[str, Any]:
    """What the client found; -I keeps this tree off its path."""
    command = [sys.executable, "-I", str(CLIENT), *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def test_a_client_without_stubs_finds_services_and_gets_tokens(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:
        found = await called(running.address)
    assert found["modules_of_lorasrv"] == []
    assert {"lorasrv.v1.GenerationService", "lorasrv.v1.AdapterService", "lorasrv.v1.ServerService"} < set(
        found["services"]
    )
    assert found["model"] == "base"
    assert found["text"] == "banana"
    assert found["streamed"] == found["token_ids"] and len(found["token_ids"]) == 6


async def test_reflection_needs_a_key_where_keys_are_on(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    key = ring.add("acme", [Role.GENERATE, Role.READ])
    async with keyed_server(tmp_path, ring) as running:
        assert (await called(running.address))["code"] == "UNAUTHENTICATED"
        assert (await called(running.address, key))["text"] == "banana"
    assert "needs a key, reflection included" in " ".join(PAGE.read_text().split())
