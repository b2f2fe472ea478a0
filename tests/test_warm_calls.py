"""WarmAdapter and VerifyVersion over real gRPC, on a fake engine: what callers see, and that nothing is left behind."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapter_folders import write_adapter
from keyed import TENANT_ROLES, Keyed, KeyRing, keyed_server
from lorasrv.client.messages import upload_files, write_requests
from lorasrv.errors import AdapterCorrupt, AdapterLoadFailed, DeadlineExceeded, ResourceExhausted
from lorasrv.keys import Role
from lorasrv.server.adapters import MAX_VERIFYING
from lorasrv.server.frontdesk import WARM_S
from lorasrv.types import Tier
from lorasrv.v1 import adapter_pb2, generation_pb2_grpc, server_pb2
from registry_calls import TENANT, WEIGHTS, asked, innocent_neighbour, name_of, nothing_left, push, stub
from running_server import Running, refused, running_server, until

Code = grpc.StatusCode
UPPER = name_of("upper")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as found:
        yield found
        await nothing_left(found)
        assert not found.engine.warming


@pytest.fixture
def adapters(running: Running) -> Any:
    return stub(running)


@pytest.fixture
async def digest(adapters: Any, tmp_path: Path) -> str:
    return await push(adapters, write_adapter(tmp_path / "upper"), "upper")


def warm(
    adapters: Any, reference: str = "upper", tier: int = 0, timeout_s: float | None = None, parent: str = TENANT
) -> Any:
    request = adapter_pb2.WarmAdapterRequest(parent=parent, reference=reference, tier=tier)  # pyright: ignore[reportArgumentType]
    return adapters.WarmAdapter(request, timeout=timeout_s)


def verify(adapters: Any, digest: str, adapter: str = UPPER) -> Any:
    return adapters.VerifyVersion(adapter_pb2.VerifyVersionRequest(name=f"{adapter}/versions/{digest}"))


def get(adapters: Any, digest: str, adapter: str = UPPER) -> Any:
    return adapters.GetVersion(adapter_pb2.GetVersionRequest(name=f"{adapter}/versions/{digest}"))


@pytest.mark.parametrize(
    ("tier", "asked_of_engine", "told"),
    [
        (adapter_pb2.TIER_UNSPECIFIED, Tier.DEVICE, adapter_pb2.TIER_DEVICE),
        (adapter_pb2.TIER_DEVICE, Tier.DEVICE, adapter_pb2.TIER_DEVICE),
        (adapter_pb2.TIER_HOST, Tier.HOST, adapter_pb2.TIER_HOST),
    ],
)
async def test_the_answer_is_the_version_with_its_tier(
    running: Running, adapters: Any, digest: str, tier: int, asked_of_engine: Tier, told: int
) -> None:
    assert (await get(adapters, digest)).tier == adapter_pb2.TIER_DISK
    running.engine.warm_gate.clear()
    call = warm(adapters, "upper@latest", tier)
    await until(lambda: bool(running.engine.warming))
    (wanted,) = running.engine.warming
    assert wanted[:2] == (digest, asked_of_engine)
    assert running.server._registry.num_pins == 1
    running.engine.warm_gate.set()
    version = await call
    assert (version.name, version.digest, version.tier) == (f"{UPPER}/versions/{digest}", digest, told)
    assert (version.hits, version.state) == (1, adapter_pb2.VERSION_STATE_READY)
    assert version.HasField("last_use_time")
    assert (version.min_rank, version.max_rank, list(version.target_modules)) == (4, 4, ["q_proj"])
    assert version.size_bytes and version.base_fingerprint
    # Who has asked for a version is told where it is.
    assert (await get(adapters, digest)).tier == adapter_pb2.TIER_DEVICE


async def test_references_are_those_of_generations(adapters: Any, digest: str, tmp_path: Path) -> None:
    for reference in ("upper", "upper@latest", f"upper@sha256:{digest}", f"upper@sha256:{digest[:8]}"):
        assert (await warm(adapters, reference, parent="tenants/-")).digest == digest
    for reference in ("lower", "upper@prod", f"upper@sha256:{'0' * 8}"):
        await refused(warm(adapters, reference), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    for reference in ("", "Upper", "upper@sha256:0", "base@latest"):
        await refused(warm(adapters, reference), Code.INVALID_ARGUMENT, "INVALID_REFERENCE")
    await refused(warm(adapters, "base"), Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    await refused(warm(adapters, parent="tenants/other"), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    for tier in (adapter_pb2.TIER_DISK, adapter_pb2.TIER_READING, adapter_pb2.TIER_FAILED, 17):
        await refused(warm(adapters, tier=tier), Code.INVALID_ARGUMENT, "INVALID_REQUEST")


async def test_a_call_waits_within_its_deadline_and_without_one_within_the_servers(
    running: Running, adapters: Any, digest: str, tmp_path: Path
) -> None:
    async with innocent_neighbour(running, tmp_path):
        running.engine.warm_gate.clear()
        for timeout_s, expected_s in ((None, WARM_S), (1000.0, 1000.0)):
            call = warm(adapters, timeout_s=timeout_s)
            await until(lambda: bool(running.engine.warming))
            (wanted,) = running.engine.warming
            # gRPC rounds what it sends.
            assert abs(time.monotonic() + expected_s - wanted[2]) < 20
            call.cancel()
            await until(lambda: not running.engine.warming)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await warm(adapters, timeout_s=0.2)
        assert late.value.code() is Code.DEADLINE_EXCEEDED
        # The neighbour's pin is left.
        await until(lambda: not running.engine.warming and running.server._registry.num_pins == 1)
        running.engine.warm_gate.set()
        running.engine.warm_error = DeadlineExceeded("the call's deadline has passed")
        await refused(warm(adapters), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ResourceExhausted("the adapter needs 20 pages"), Code.RESOURCE_EXHAUSTED),
        (AdapterLoadFailed("version x: unreadable"), Code.UNAVAILABLE),
        (AdapterCorrupt("version x: damaged"), Code.DATA_LOSS),
    ],
)
async def test_what_the_engine_says_is_answered(
    running: Running, adapters: Any, digest: str, tmp_path: Path, error: Any, code: grpc.StatusCode
) -> None:
    async with innocent_neighbour(running, tmp_path):
        running.engine.warm_error = error
        said = await refused(warm(adapters), code, error.reason)
        assert said.details() == str(error)
        # Said to be damaged, found in order: not quarantined.
        assert (await get(adapters, digest)).state == adapter_pb2.VERSION_STATE_READY


async def test_a_warm_that_finds_damage_has_it_quarantined(
    running: Running, adapters: Any, digest: str, tmp_path: Path
) -> None:
    async with innocent_neighbour(running, tmp_path):
        damage(running, tmp_path / "upper")
        running.engine.warm_error = AdapterCorrupt("version x: damaged")
        await refused(warm(adapters), Code.DATA_LOSS, "ADAPTER_CORRUPT")
        running.engine.warm_error = None
        await refused(warm(adapters), Code.DATA_LOSS, "VERSION_QUARANTINED")
        assert (await get(adapters, digest)).state == adapter_pb2.VERSION_STATE_QUARANTINED


def damage(running: Running, folder: Path) -> Path:
    blob = running.server._registry.blobs.path(hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
    blob.write_bytes(bytes([blob.read_bytes()[0] ^ 1]) + blob.read_bytes()[1:])
    return blob


async def test_a_server_that_stops_takes_no_warms(running: Running, adapters: Any, digest: str) -> None:
    await running.server.begin_drain()
    await refused(warm(adapters), Code.UNAVAILABLE, "DRAINING")


async def test_without_an_engine_nothing_is_warm(running: Running, adapters: Any, digest: str) -> None:
    running.engine.set_state("unavailable")
    await refused(warm(adapters), Code.UNAVAILABLE, "ENGINE_UNAVAILABLE")


async def test_an_adapter_deleted_meanwhile_is_kept_until_it_is_warm(
    running: Running, adapters: Any, digest: str
) -> None:
    running.engine.warm_gate.clear()
    call = warm(adapters)
    await until(lambda: bool(running.engine.warming))
    await adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=UPPER, purge=True))
    assert running.server._registry.num_pins == 1
    running.engine.warm_gate.set()
    await refused(call, Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


# Verify


async def test_stored_bytes_are_read_again(running: Running, adapters: Any, digest: str, tmp_path: Path) -> None:
    async with innocent_neighbour(running, tmp_path):
        found = await verify(adapters, digest)
        assert (found.version.digest, found.version.state) == (digest, adapter_pb2.VERSION_STATE_READY)
        assert {(each.name, each.size_bytes, each.sha256) for each in found.files} == {
            (each.name, each.size_bytes, each.sha256) for each in upload_files(tmp_path / "upper")
        }
        await refused(verify(adapters, "0" * 64), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
        await refused(verify(adapters, "0"), Code.INVALID_ARGUMENT, "INVALID_REFERENCE")
        damage(running, tmp_path / "upper")
        error = await refused(verify(adapters, digest), Code.DATA_LOSS, "CORRUPT_BLOB")
        assert str(tmp_path) not in str(error.details())
        assert (await get(adapters, digest)).state == adapter_pb2.VERSION_STATE_QUARANTINED
        await refused(warm(adapters), Code.DATA_LOSS, "VERSION_QUARANTINED")
        # The same content again repairs it.
        assert await push(adapters, tmp_path / "upper", "upper") == digest
        assert (await verify(adapters, digest)).version.state == adapter_pb2.VERSION_STATE_READY


async def test_verifying_leaves_threads_for_all_else(
    running: Running, adapters: Any, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that are cancelled keep their place for as long as they keep their thread."""
    registry, loop = running.server._registry, asyncio.get_running_loop()
    gate, begun = asyncio.Event(), list[str]()

    def slow(tenant: str, adapter_id: str, found: str) -> Any:
        begun.append(found)
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(30)
        return actual(tenant, adapter_id, found)

    actual = registry.verify
    monkeypatch.setattr(registry, "verify", slow)
    calls = [verify(adapters, digest) for _ in range(8)]
    await until(lambda: len(begun) == MAX_VERIFYING)
    for call in calls[:4]:
        call.cancel()
    await get(adapters, digest)
    assert len(begun) == MAX_VERIFYING
    gate.set()
    for call in calls[4:]:
        await call
    assert (await verify(adapters, digest)).version.digest == digest


# Tenants


async def test_warming_is_a_tenants_own(tmp_path: Path) -> None:
    """Another tenant's adapter is a missing one; equal bytes show their tier to whom has asked for them."""
    ring = KeyRing(tmp_path / "keys.toml")
    keys = [ring.add(tenant, TENANT_ROLES) for tenant in ("acme", "rival")]
    folder = write_adapter(tmp_path / "upper")
    async with keyed_server(tmp_path, ring) as running:
        acme, rival = (Keyed(running.channel, key) for key in keys)
        digest = await keyed_push(acme, folder, "upper")
        assert (await warm(acme.adapters, parent="tenants/-")).tier == adapter_pb2.TIER_DEVICE
        for reference in ("upper", "upper@latest", f"upper@sha256:{digest}"):
            nobodys = reference.replace("upper", "lower")
            told = [
                (await refused(warm(rival.adapters, each, parent=parent), Code.NOT_FOUND, "ADAPTER_NOT_FOUND"))
                for each, parent in ((reference, "tenants/-"), (nobodys, "tenants/-"), (reference, "tenants/acme"))
            ]
            assert str(told[0].details()).replace("upper", "lower") == told[1].details()
            assert told[2].details() == "tenant 'acme' not found"
        names = [f"tenants/{tenant}/adapters/upper" for tenant in ("acme", "nobody", "rival", "-")]
        said = {
            str((await refused(verify(rival.adapters, digest, name), Code.NOT_FOUND, "ADAPTER_NOT_FOUND")).details())
            for name in names
        }
        assert said == {"adapter 'upper' not found"}
        await keyed_push(rival, folder, "mine")
        mine = "tenants/rival/adapters/mine"
        assert (await get(rival.adapters, digest, mine)).tier == adapter_pb2.TIER_DISK
        status = server_pb2.GetStatusRequest()
        assert not (await rival.server.GetStatus(status)).adapters
        assert (await warm(rival.adapters, "mine", parent="tenants/-")).tier == adapter_pb2.TIER_DEVICE
        assert (await get(rival.adapters, digest, mine)).tier == adapter_pb2.TIER_DEVICE
        (shown,) = (await rival.server.GetStatus(status)).adapters
        assert shown.adapter_id == "mine"
        await nothing_left(running)


async def test_who_may_generate_may_warm_and_who_may_read_may_verify(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.toml")
    publisher = ring.add("acme", TENANT_ROLES)
    keys = {role: ring.add("acme", [role]) for role in Role}
    async with keyed_server(tmp_path, ring) as running:
        digest = await keyed_push(Keyed(running.channel, publisher), write_adapter(tmp_path / "upper"), "upper")
        for role, key in keys.items():
            caller = Keyed(running.channel, key).adapters
            for may, call in (
                (Role.GENERATE, warm(caller, parent="tenants/-")),
                (Role.READ, verify(caller, digest, "tenants/-/adapters/upper")),
            ):
                if role is may:
                    await call
                else:
                    await refused(call, Code.PERMISSION_DENIED, "PERMISSION_DENIED")


async def keyed_push(caller: Keyed, folder: Path, adapter_id: str) -> str:
    created = await caller.adapters.CreateUpload(
        adapter_pb2.CreateUploadRequest(parent="tenants/-", adapter_id=adapter_id, files=upload_files(folder))
    )
    await caller.adapters.WriteUpload(iter(list(write_requests(folder, created))))
    finished = await caller.adapters.FinishUpload(adapter_pb2.FinishUploadRequest(name=created.name))
    return finished.version.digest


async def test_generations_go_on_beside_warms(running: Running, adapters: Any, digest: str) -> None:
    generation: Any = generation_pb2_grpc.GenerationServiceStub(running.channel)
    running.engine.warm_gate.clear()
    calls = [warm(adapters) for _ in range(20)]
    await until(lambda: len(running.engine.warming) == 20)
    assert (await generation.Generate(asked("upper"))).started.version_digest == digest
    for call in calls[:10]:
        call.cancel()
    await until(lambda: len(running.engine.warming) == 10)
    running.engine.warm_gate.set()
    assert {(await call).digest for call in calls[10:]} == {digest}
