"""Pushes whose client or server is killed, at random offsets: they resume, publish, and the bytes are right."""

import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_files import upload_files
from adapter_folders import write_adapter
from lorasrv.client import Client
from lorasrv_adapters.manifest import ManifestFile, make_manifest
from running_server import subprocess_env

CHUNK_BYTES = 2048

SERVE = """
import asyncio, sys
from pathlib import Path
from fake_engine import FakeEngine, server_config
from lorasrv.server.server import Server

async def main():
    server = Server(server_config(Path(sys.argv[1]), listen=sys.argv[2]), lambda _: FakeEngine())
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

# Kills itself when so many bytes have been sent.
PUSH = f"""
import os, signal, sys
from lorasrv.client import Client, messages

messages.CHUNK_BYTES = {CHUNK_BYTES}

def progress(sent, total):
    if sent >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

Client(sys.argv[1]).push(sys.argv[2], progress=progress)
"""


class ServerProcess:
    """A server on one port and one data folder, which can be killed and started again."""

    def __init__(self, data: Path) -> None:
        self._data = data
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self._data), self.address]
        self._process = subprocess.Popen(command, env=subprocess_env(), stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == self.address.encode()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.parametrize("num_kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_pushes_resume_whoever_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int) -> None:
    folder = write_adapter(tmp_path / "upper", rank=256)
    files = upload_files(folder)
    total = sum(file.size_bytes for file in files)
    offsets = sorted(random.Random(4).sample(range(4 * CHUNK_BYTES, total - 4 * CHUNK_BYTES), 2 * num_kills))
    server = ServerProcess(tmp_path / "data")
    try:
        for offset in offsets[:num_kills]:
            push = [sys.executable, "-c", PUSH, server.address, str(folder), str(offset)]
            assert subprocess.run(push, env=subprocess_env(), check=False).returncode == -signal.SIGKILL
        monkeypatch.setattr("lorasrv.client.messages.CHUNK_BYTES", CHUNK_BYTES)
        to_kill = offsets[num_kills:]
        seen: list[int] = []

        def progress(sent: int, total: int) -> None:
            seen.append(sent)
            if to_kill and sent >= to_kill[0]:
                to_kill.pop(0)
                server.kill()
                server.start()

        with Client(server.address) as client:
            version = client.push(folder, progress=progress)
            assert not to_kill
            # What the killed pushes had sent was not sent again, but for what was on its way.
            assert seen[0] > 4 * CHUNK_BYTES
            manifest = make_manifest(
                [ManifestFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files]
            )
            assert version.digest == manifest.digest
            client.pull("upper", tmp_path / "pulled")
            for file in files:
                assert (tmp_path / "pulled" / file.name).read_bytes() == (folder / file.name).read_bytes()
            assert client.push(folder).digest == version.digest
    finally:
        server.kill()
