"""An adapter that no page could hold is refused when it is validated, not when it is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from adapter_files import ALL_TARGETS, lora_config, lora_tensors, write_adapter
from fake_engine import BASE_MODEL, FakeEngine, server_config
from lorasrv import LLM
from lorasrv.client.messages import upload_files, write_requests
from lorasrv.config import DType, EngineConfig, ModelConfig, PoolConfig
from lorasrv.engine.fitting import page_check, page_layout
from lorasrv.errors import AdapterLoadFailed, ConfigurationError
from lorasrv.memory.tensors import PackedModule, pack_adapter
from lorasrv.model.base_shapes import base_shapes
from lorasrv.model.families import read_architecture
from lorasrv.server.server import Server
from lorasrv.v1 import adapter_pb2, adapter_pb2_grpc
from lorasrv_adapters.errors import AdapterTooLarge, ContentRefused
from lorasrv_adapters.peft_format import AdapterSpec, LoraModuleSpec
from lorasrv_adapters.safetensors_header import TensorEntry
from running_server import reason_of

PAGE_BYTES = 8192  # of the base below: 4 layers, 16 tokens, one head of 16 elements, float32
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def small_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample base model with smaller heads; to be used with dummy weights."""
    folder = tmp_path_factory.mktemp("base") / "small"
    shutil.copytree(BASE_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1, "head_dim": 16}))
    return folder


@pytest.fixture(scope="module")
def adapters(small_pages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    base = base_shapes(small_pages, "float32")
    root = tmp_path_factory.mktemp("adapters")
    return {
        rank: write_adapter(root / str(rank), lora_config(r=rank, target_modules=MLP), lora_tensors(base, MLP, rank))
        for rank in (16, 256)
    }


def spec_of(folder: Path, rank: int, targets: list[str]) -> AdapterSpec:
    """A validated adapter whose tensors nobody will read."""
    base = base_shapes(folder, "float32")
    entry = TensorEntry(name="x", dtype="F32", shape=(1, 1), begin=0, end=4)
    modules = tuple(
        LoraModuleSpec(layer=layer, module=index, rank=rank, scale=1.0, a=entry, b=entry)
        for layer in range(base.num_layers)
        for index, module in enumerate(base.modules)
        if module.path.rpartition(".")[2] in targets
    )
    return AdapterSpec(rank_min=rank, rank_max=rank, target_modules=tuple(targets), modules=modules)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_tokens", [1, 4, 8, 16])
def test_the_check_refuses_exactly_what_cannot_be_packed(small_pages: Path, block_tokens: int, dtype: DType) -> None:
    architecture = read_architecture(small_pages)
    shapes = architecture.module_shapes()
    config = EngineConfig(
        model=ModelConfig(path=str(small_pages), dtype=dtype), pool=PoolConfig(block_tokens=block_tokens)
    )
    layout = page_layout(architecture, block_tokens, getattr(torch, dtype).itemsize)
    check = page_check(config)
    answers: set[bool] = set()
    for rank in (1, 2, 16, 64, 100, 256):
        for targets in (["q_proj"], MLP, list(ALL_TARGETS)):
            spec = spec_of(small_pages, rank, targets)
            modules = [
                PackedModule(
                    layer=m.layer,
                    module=m.module,
                    rank=rank,
                    scale=1.0,
                    a=torch.zeros(rank, shapes[m.module][1]),
                    b=torch.zeros(shapes[m.module][2], rank),
                )
                for m in spec.modules
            ]
            errors = check(spec)
            answers.add(bool(errors))
            if errors:
                with pytest.raises(AdapterLoadFailed):
                    pack_adapter(modules, layout, shapes)
                assert f"have {layout.page_bytes} bytes" in str(errors[0])
            else:
                pack_adapter(modules, layout, shapes)
    assert True in answers


def test_pages_that_cannot_be_aligned_are_refused_at_start(small_pages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(small_pages, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "head_dim": 10}))
    model = ModelConfig(path=str(folder))
    with pytest.raises(ConfigurationError, match="block_tokens 1 "):
        page_check(EngineConfig(model=model, pool=PoolConfig(block_tokens=1)))


def test_a_notebook_is_told_when_the_adapter_is_added(small_pages: Path, adapters: dict[int, Path]) -> None:
    with LLM(small_pages, dummy_weights=True, pool_bytes=8 << 20) as llm:
        llm.add_adapter("small", adapters[16])
        with pytest.raises(ContentRefused, match=rf"pages of 8960 bytes .* {PAGE_BYTES} bytes") as refused:
            llm.add_adapter("large", adapters[256])
        assert [type(error) for error in refused.value.errors] == [AdapterTooLarge]


async def test_an_upload_is_refused_with_both_numbers(
    small_pages: Path, adapters: dict[int, Path], tmp_path: Path
) -> None:
    config = server_config(tmp_path / "data")
    engine = replace(config.engine, model=ModelConfig(path=str(small_pages)))
    server = Server(replace(config, engine=engine), lambda config: FakeEngine())
    address = await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            for rank, folder in adapters.items():
                upload = await stub.CreateUpload(
                    adapter_pb2.CreateUploadRequest(
                        parent="tenants/default", adapter_id=f"r{rank}", files=upload_files(folder)
                    )
                )
                await stub.WriteUpload(write_requests(folder, upload))
                finish = stub.FinishUpload(adapter_pb2.FinishUploadRequest(name=upload.name))
                if rank == 16:
                    assert (await finish).state == adapter_pb2.UPLOAD_STATE_PUBLISHED
                    continue
                with pytest.raises(
                    grpc.aio.AioRpcError, match=rf"pages of 8960 bytes .* {PAGE_BYTES} bytes"
                ) as refused:
                    await finish
                assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert reason_of(refused.value) == "ADAPTER_TOO_LARGE"
    finally:
        await server.close()
