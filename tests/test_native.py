"""The native CPU code as a part that may be missing, and what a step calls of it."""

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasrv.cli.diagnosis import cpu_kernels
from lorasrv.engine.batch import ChunkInput
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.tensors import PackedModule, pack_adapter
from lorasrv_kernels import cpu, native, reference
from lorasrv_kernels.dispatch import forward_kernels, lora_kernels
from native_kernels import KINDS, kernels_of
from peft_models import random_llama
from test_decoder import Rig

CPU = torch.device("cpu")
EVERYTHING = " ".join(flag for target in native.TARGETS for flag in target.needs)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources without libraries."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


def test_without_a_library_torch_computes_and_doctor_says_so(elsewhere: Path) -> None:
    why = native.find()
    assert isinstance(why, str) and not list(elsewhere.iterdir())
    assert forward_kernels(CPU, deterministic=False) is reference
    assert lora_kernels(CPU) is reference
    finding = cpu_kernels()
    assert finding.state == "note" and why in finding.detail and finding.advice is not None


def test_a_library_that_does_not_load_is_none(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = elsewhere / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "find", lambda: broken)
    assert "broken.so" in str(cpu.load())
    assert forward_kernels(CPU, deterministic=False) is reference


@pytest.mark.skipif(not KINDS, reason="nothing is written for this machine")
def test_a_library_of_older_sources_is_none(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "nothing.cpp").touch()
    assert native.compile_all() == []
    assert "built from other sources" in str(cpu.load())
    assert forward_kernels(CPU, deterministic=False) is reference


@pytest.mark.skipif(not KINDS, reason="nothing is written for this machine")
def test_the_fastest_that_is_built_and_runs_is_taken(elsewhere: Path) -> None:
    cpuinfo = elsewhere / "cpuinfo"
    cpuinfo.write_text(f"flags : {EVERYTHING}")
    assert native.find(cpuinfo) == "not built"
    for target in reversed(native.targets()):
        target.library.write_bytes(b"")
        assert native.find(cpuinfo) == target.library
    cpuinfo.write_text("flags : fpu")
    assert not all(target.needs for target in native.targets()) or "this CPU has neither" in str(native.find(cpuinfo))


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler"])
def test_a_compiler_that_fails_leaves_no_library(elsewhere: Path, compiler: str) -> None:
    assert len(native.compile_all(compiler)) == len(native.targets())
    assert not list(elsewhere.iterdir())


def test_a_build_without_a_compiler_goes_on(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling")
    import hatch_build

    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(hatch_build, "_load", lambda package: native)
    warnings: list[str] = []
    hook: Any = SimpleNamespace(root=str(elsewhere), app=SimpleNamespace(display_warning=warnings.append))
    build_data: dict[str, Any] = {"artifacts": [], "pure_python": True}
    hatch_build.NativeBuildHook.initialize(hook, "standard", build_data)
    assert build_data == {"artifacts": [], "pure_python": True}
    assert warnings == ["lorasrv's CPU kernels are not all built: there is no C++ compiler"]


@pytest.mark.parametrize("kind", KINDS)
def test_callers_that_come_at_once_and_after_pauses_all_get_their_own(kind: str) -> None:
    """One of them has the helpers, which are asleep behind a pause; the others compute alone."""
    kernels_of(kind)

    def ask(seed: int) -> int:
        kernels, before = kernels_of(kind), torch.get_num_threads()
        torch.set_num_threads(3)
        x, weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed)), torch.ones(96)
        want = kernels.rms_norm(x, weight, 1e-6)
        wrong = 0
        for number in range(600):
            wrong += not torch.equal(kernels.rms_norm(x, weight, 1e-6), want)
            if number % 200 == 199:
                time.sleep(0.01)
        torch.set_num_threads(before)
        torch.testing.assert_close(want, reference.rms_norm(x, weight, 1e-6))
        return wrong

    with ThreadPoolExecutor(3) as callers:
        assert list(callers.map(ask, range(3))) == [0, 0, 0]


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_a_step_do_not_grow_with_its_adapters(tmp_path: Path, kind: str) -> None:
    kernels = kernels_of(kind)
    random_llama(tmp_path)
    rig = Rig(tmp_path, num_pages=600, block_tokens=64, dtype=torch.bfloat16, kernels=kernels)
    adapters = [_load(rig, rank) for rank in (1, 3, 8, 16, 5, 72, 2, 4)]
    native_calls: Counter[str] = Counter()
    for name in ("project", "shrink", "expand", "rms_norm", "add_rms_norm", "silu_mul", "rope_write_kv"):
        setattr(kernels, f"_{name}", _counting(native_calls, name, getattr(kernels, f"_{name}")))
    found: set[tuple[int, int]] = set()
    for num_adapters in (1, 2, 8):
        chunks = [
            ChunkInput(token_ids=(5,), start=0, block_table=rig.table(1), adapter=adapters[row % num_adapters])
            for row in range(8)
        ]
        batch = rig.runner.build_batch(sorted(chunks, key=lambda chunk: adapters.index(chunk.adapter)))  # type: ignore[arg-type]
        native_calls.clear()
        with _Counted() as torch_calls:
            rig.decoder.forward(batch, rig.storage.bytes, rig.storage.kv)
        assert batch.segments is not None and len(batch.segments.starts) == num_adapters
        found.add((torch_calls.calls.total(), native_calls.total()))
    assert len(found) == 1, found


def _counting(calls: Counter[str], name: str, function: Any) -> Any:
    def call(*arguments: Any) -> None:
        calls[name] += 1
        function(*arguments)

    return call


def _load(rig: Rig, rank: int) -> AdapterInput:
    architecture, layout = rig.decoder.architecture, rig.storage.layout
    shapes, generator = architecture.module_shapes(), random.Random(rank)
    modules = [
        PackedModule(
            layer=layer,
            module=index,
            rank=rank,
            scale=generator.random(),
            a=torch.randn(rank, in_features).bfloat16(),
            b=torch.randn(out_features, rank).bfloat16(),
        )
        for layer in range(architecture.num_layers)
        for index, (_, in_features, out_features) in enumerate(shapes)
    ]
    packed = pack_adapter(modules, layout, tuple(shapes))
    pages = rig.table(packed.num_pages * layout.block_tokens)
    directory = rig.storage.write_adapter(packed, pages, wait_for_steps=False).directory
    return AdapterInput(directory=directory, max_rank=packed.max_rank, scale=1.0)
