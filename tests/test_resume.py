"""Pushes whose client and server are killed in turn, at random offsets: they resume and publish the right bytes."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_files import ALL_TARGETS, lora_config, lora_tensors, upload_files, write_adapter
from fake_engine import BASE_MODEL
from lorasrv.client import Client
from lorasrv.client.messages import CHUNK_BYTES
from lorasrv.model.base_shapes import base_shapes
from lorasrv_adapters.manifest import ManifestFile, make_manifest
from relay import Relay
from running_server import subprocess_env

SERVE = """
import asyncio, sys
from pathlib import Path
from fake_engine import FakeEngine, server_config
from lorasrv.server.server import Server
from lorasrv_adapters.upload_writer import UploadWriter

write = UploadWriter.write

def counted(self, offset, data):
    with open(sys.argv[3], "a") as log:
        print(len(data), file=log)
    return write(self, offset, data)

UploadWriter.write = counted

async def main():
    server = Server(server_config(Path(sys.argv[1]), listen=sys.argv[2]), lambda _: FakeEngine())
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
PUSH = "import sys; from lorasrv.client import Client; print(Client(sys.argv[1]).push(sys.argv[2]).digest)"


class ServerProcess:
    """A server on one port and one data folder, which can be killed and started again; it counts what it is sent."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self._log = folder / "received"
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.data), self.address, str(self._log)]
        self._process = subprocess.Popen(command, env=subprocess_env(), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    @property
    def received(self) -> int:
        """Bytes of files in all messages that have arrived, taken or not."""
        return sum(map(int, self._log.read_text().split()))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class PushProcess:
    """A push, by the client library or the command, which can be killed and started again."""

    def __init__(self, program: str, address: str, folder: Path) -> None:
        library = [sys.executable, "-c", PUSH, address, str(folder)]
        command = [sys.executable, "-m", "lorasrv.cli", "adapters", "push", str(folder), "--url", address]
        self._command = {"library": library, "command": command}[program]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, env=subprocess_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()
        assert self._process.returncode == -signal.SIGKILL, "it had ended before"

    def result(self) -> str:
        output, errors = self._process.communicate(timeout=100)
        assert self._process.returncode == 0, errors
        return output


def large_adapter(folder: Path) -> Path:
    """Of 13 messages."""
    tensors = lora_tensors(base_shapes(BASE_MODEL, "float32"), ALL_TARGETS, 256)
    return write_adapter(folder, lora_config(r=256, target_modules=ALL_TARGETS), tensors)


@pytest.mark.row(22)
@pytest.mark.parametrize(
    ("program", "num_kills"),
    [
        ("command", 2),
        pytest.param("command", 10, marks=pytest.mark.slow),
        pytest.param("library", 10, marks=pytest.mark.slow),
    ],
)
def test_a_push_resumes_whoever_is_killed(tmp_path: Path, program: str, num_kills: int) -> None:
    folder = large_adapter(tmp_path / "upper")
    files = upload_files(folder)
    total = sum(file.size_bytes for file in files)
    assert total > 12 * CHUNK_BYTES
    offsets = sorted(random.Random(4).sample(range(CHUNK_BYTES, total), num_kills))
    server = ServerProcess(tmp_path)
    try:
        with Relay(server.address) as relay:
            relay.stop_at(offsets[0])
            push = PushProcess(program, relay.address, folder)
            for kill, offset in enumerate(offsets):
                relay.stop_at(offset)
                relay.wait_until_stopped()
                killed = server if kill % 2 else push
                killed.kill()
                relay.drop()
                killed.start()
            relay.stop_at(None)
            manifest = make_manifest(
                [ManifestFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files]
            )
            assert manifest.digest in push.result()
        # What was committed was not sent again; what a killed server was writing may have been.
        assert total <= server.received <= total + num_kills // 2 * CHUNK_BYTES
        with Client(server.address) as client:
            assert [version.digest for version in client.versions("upper")] == [manifest.digest]
            client.pull("upper", tmp_path / "pulled")
            before = server.received
            assert client.push(folder).digest == manifest.digest
            assert server.received == before
        for file in files:
            assert (tmp_path / "pulled" / file.name).read_bytes() == (folder / file.name).read_bytes()
        assert not list((server.data / "staging").iterdir())
    finally:
        server.kill()
