"""Servers with API keys, and stubs that send one."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from fake_engine import server_config
from lorasrv.keys import Role, format_line, hash_key, new_key
from lorasrv.v1 import adapter_pb2_grpc, generation_pb2_grpc, server_pb2_grpc
from running_server import Running, running_server

ALL_ROLES = tuple(Role)
TENANT_ROLES = (Role.GENERATE, Role.READ, Role.PUBLISH)


class Stub:
    """A stub whose calls send metadata."""

    def __init__(self, stub: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stub, method)
        return lambda *args, **options: call(*args, metadata=self._metadata, **options)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@dataclass(frozen=True)
class Keyed:
    """A channel's services as called with `key`."""

    channel: grpc.aio.Channel
    key: str
    pushed: set[Path] = field(default_factory=set[Path])

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return bearer(self.key)

    @property
    def generation(self) -> Any:
        return Stub(generation_pb2_grpc.GenerationServiceStub(self.channel), self.metadata)

    @property
    def adapters(self) -> Any:
        return Stub(adapter_pb2_grpc.AdapterServiceStub(self.channel), self.metadata)

    @property
    def server(self) -> Any:
        return Stub(server_pb2_grpc.ServerServiceStub(self.channel), self.metadata)


class KeyRing:
    """A key file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch(0o600)

    def add(self, tenant: str, roles: Iterable[Role]) -> str:
        key = new_key()
        name = f"key{len(self.path.read_text().splitlines())}"
        with self.path.open("a") as file:
            file.write(format_line(name, tenant, tuple(roles), hash_key(key)) + "\n")
        return key


@asynccontextmanager
async def keyed_server(tmp_path: Path, ring: KeyRing, **settings: Any) -> AsyncIterator[Running]:
    config = replace(server_config(tmp_path / "data"), api_keys=str(ring.path), **settings)
    async with running_server(tmp_path / "data", config) as running:
        yield running
