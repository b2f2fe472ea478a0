"""Builder processes, over real blobs: what they build, and what one that hangs, dies or is deserted costs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import pytest

from adapter_files import ALL_TARGETS, lora_config, lora_tensors, write_adapter
from lorasrv.config import DType
from lorasrv.engine.builder import BuilderSettings
from lorasrv.engine.builder_child import BuilderChild
from lorasrv.engine.builder_pool import BuilderPool
from lorasrv.engine.fitting import ITEMSIZES, page_layout
from lorasrv.engine.packer import Packer
from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.arena import HostArena
from lorasrv.memory.packing import PackedAdapter
from lorasrv.model.base_shapes import base_shapes
from lorasrv.model.families import read_architecture
from lorasrv_adapters.blobs import BlobStore
from lorasrv_adapters.errors import CorruptBlob
from lorasrv_adapters.host_cache import HostCache
from lorasrv_adapters.manifest import FILE_NAMES, ManifestFile, make_manifest
from lorasrv_adapters.published import open_version
from running_server import subprocess_env
from test_house import run_without

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
WAIT_S = 60.0
BLOCK_TOKENS = 16


def publish(blobs: BlobStore, folder: Path) -> str:
    files: list[ManifestFile] = []
    for name in FILE_NAMES:
        sha256 = blobs.put_bytes((folder / name).read_bytes())
        files.append(ManifestFile(name=name, sha256=sha256, size_bytes=(folder / name).stat().st_size))
    return blobs.put_bytes(make_manifest(files).to_bytes())


@dataclass
class Rig:
    """A host cache over builder processes, small enough that images push each other out."""

    root: Path
    dtype: DType = "float32"
    num_pages: int = 64
    num_ahead: int = 16
    read_timeout_s: float = WAIT_S
    children: list[BuilderChild] = field(default_factory=list[BuilderChild])

    def __post_init__(self) -> None:
        base = SAMPLES / "base"
        architecture = read_architecture(base)
        self.base = base_shapes(base, self.dtype)
        self.blobs = BlobStore(self.root / "blobs")
        layout = page_layout(architecture, BLOCK_TOKENS, ITEMSIZES[self.dtype])
        self.packer = Packer(layout=layout, module_shapes=architecture.module_shapes())
        self.arena = HostArena(self.num_pages + self.num_ahead, layout.page_bytes)
        self.settings = BuilderSettings(
            blob_root=str(self.root / "blobs"),
            model_path=str(base),
            dtype=self.dtype,
            block_tokens=BLOCK_TOKENS,
            max_rank=256,
            num_pages=self.num_pages + self.num_ahead,
        )
        self.pool = BuilderPool(
            self.arena,
            layout.num_layers * len(self.packer.module_shapes),
            self.spawn,
            num_builders=2,
            num_ahead=self.num_ahead,
            read_timeout_s=self.read_timeout_s,
        )
        self.cache: HostCache[PackedAdapter] = HostCache(self.num_pages * layout.page_bytes, self.pool)

    def spawn(self) -> BuilderChild:
        self.children.append(BuilderChild(self.settings, self.arena.descriptor))
        return self.children[-1]

    def publish_random(self, number: int) -> str:
        rank = (1, 3, 8, 17)[number % 4]
        tensors = lora_tensors(self.base, ALL_TARGETS, rank, seed=number)
        config = lora_config(r=rank, target_modules=list(ALL_TARGETS))
        return publish(self.blobs, write_adapter(self.root / str(number), config, tensors))

    def wait(self, digest: str) -> PackedAdapter | Exception:
        deadline = time.monotonic() + WAIT_S
        while (result := self.cache.get(digest) or self.cache.failure(digest)) is None:
            self.poll()
            assert time.monotonic() < deadline, self.cache.snapshot()
        return result

    def poll(self) -> None:
        self.pool.wait(0.05)
        self.pool.deliver(self.cache)
        self.cache.poll()
        self.cache.check()
        self.pool.check()

    def read(self, digest: str) -> PackedAdapter | Exception:
        self.cache.request(digest)
        return self.wait(digest)

    def weights_of(self, digest: str) -> Path:
        weights = open_version(self.blobs, digest, self.base, 256).weights
        assert isinstance(weights, Path)
        return weights

    def assert_right(self, digest: str, image: PackedAdapter | Exception) -> None:
        """Byte for byte what this process packs, the directory included."""
        assert isinstance(image, PackedAdapter), image
        wanted = self.packer.pack(open_version(self.blobs, digest, self.base, 256))
        assert np.array_equal(image.pages[list(image.places)], wanted.pages)
        targets = list(range(7, 7 + image.num_pages))
        assert np.array_equal(image.directory(targets), wanted.directory(targets))
        assert (image.max_rank, image.nbytes) == (wanted.max_rank, wanted.nbytes)

    def close(self) -> None:
        self.cache.close()
        self.pool.close()
        assert self.arena.num_free == self.num_pages + self.num_ahead
        assert all(child.has_ended() for child in self.children)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_builders_build_what_this_process_would(tmp_path: Path, dtype: DType) -> None:
    rig = Rig(tmp_path, dtype)
    digests = [publish(rig.blobs, SAMPLES / "upper"), *(rig.publish_random(number) for number in range(4))]
    for digest in digests:
        rig.cache.request(digest)
    for digest in digests:
        rig.assert_right(digest, rig.wait(digest))
    rig.close()


def test_builders_load_no_torch_and_nothing_that_a_bare_gpu_box_lacks() -> None:
    blocked = ("torch", "msgspec", "zmq", "grpc", "transformers", "safetensors")
    loaded = run_without(blocked, ["lorasrv.engine.builder", "lorasrv.engine.builder_pool"]).split()
    assert "lorasrv.engine.builder" in loaded


def test_builders_that_are_killed_at_any_moment_cost_nothing_but_time(rig: Rig) -> None:
    """Images push each other out all the while; those that arrive are right, and no page is lost."""
    random = Random(0)
    digests = [rig.publish_random(number) for number in range(12)]
    num_failed = num_killed = 0
    for _ in range(60):
        digest = random.choice(digests)
        rig.cache.request(digest)
        rig.cache.pin(digest)
        if random.random() < 0.3:
            alive = [child for child in rig.children if not child.has_ended()]
            time.sleep(0.004 * random.random())
            if alive:
                os.kill(random.choice(alive).pid, signal.SIGKILL)
                num_killed += 1
        result = rig.wait(digest)
        if isinstance(result, Exception):
            assert "died" in str(result)
            num_failed += 1
        else:
            rig.assert_right(digest, result)
        rig.cache.unpin(digest)
        rig.cache.forget_failure(digest)
    assert num_killed > 10 and num_failed < num_killed


def test_a_read_that_hangs_fails_in_time_and_delays_no_other(tmp_path: Path) -> None:
    rig = Rig(tmp_path, read_timeout_s=3.0)
    hung, good, later = (rig.publish_random(number) for number in range(3))
    assert isinstance(rig.read(later), PackedAdapter), "builders have started"
    weights = rig.weights_of(hung)
    content = weights.read_bytes()
    weights.unlink()
    os.mkfifo(weights)
    rig.cache.request(hung)
    rig.poll()
    begun_s = time.monotonic()
    rig.assert_right(good, rig.read(good))
    assert rig.cache.failure(hung) is None, "the good one was not behind it"
    failure = rig.wait(hung)
    assert time.monotonic() - begun_s >= 2.0
    assert isinstance(failure, AdapterLoadFailed) and "3 s" in str(failure)
    weights.unlink()
    weights.write_bytes(content)
    rig.cache.forget_failure(hung)
    rig.assert_right(hung, rig.read(hung))
    rig.close()


@pytest.mark.parametrize("damage", ["header", "value", "short", "missing"])
def test_damaged_weights_are_told_as_such(rig: Rig, damage: str) -> None:
    digest, good = (rig.publish_random(number) for number in range(2))
    weights = rig.weights_of(digest)
    content = bytearray(weights.read_bytes())
    content[{"header": 3, "value": -1}.get(damage, 0)] ^= 1
    weights.unlink()
    if damage != "missing":
        weights.write_bytes(content[:-8] if damage == "short" else content)
    assert isinstance(rig.read(digest), CorruptBlob)
    rig.assert_right(good, rig.read(good))


def test_a_builder_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Killed, so that it can tell nobody, with words of its builders unread, of which one hangs in a read: they end
    without any more."""
    program = f"""
import os, select, sys, time
from pathlib import Path
from test_builders import Rig
from lorasrv.engine.builder_messages import Measure
rig = Rig(Path({str(tmp_path)!r}))
digest = rig.publish_random(0)
weights = rig.weights_of(digest)
weights.unlink()
os.mkfifo(weights)
rig.cache.request(digest)
rig.poll()
for child in rig.children:
    select.select([child], [], [])
print(*(child.pid for child in rig.children), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_env(),
        cwd=tmp_path,
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    _, complaints = parent.communicate(timeout=WAIT_S)  # they have their end of it until they end
    assert complaints == ""
    deadline = time.monotonic() + WAIT_S
    while any(runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "a builder outlives its engine"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """Whether a process is there, and is no zombie that waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
