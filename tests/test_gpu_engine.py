"""The engine on a CUDA device against the engine on the CPU. Needs torch, numpy, safetensors and transformers alone."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorasrv.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.build import assemble
from lorasrv.engine.packer import Packer
from lorasrv.memory.arena import map_pages
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.storage import PinnedArena
from lorasrv.memory.tensors import PackedModule, pack_adapter
from lorasrv.types import AdapterUse, EngineRequest

RANKS = {"r1": 1, "r3": 3, "r16": 16, "r64": 64}
NUM_TOKENS = 12


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def pack(name: str, packer: Packer) -> PackedAdapter:
    rank = RANKS[name]
    generator = torch.Generator().manual_seed(rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (0.15 / rank**0.5) ** 0.5

    modules = [
        PackedModule(layer=layer, module=index, rank=rank, scale=2.0, a=normal(rank, num_in), b=normal(num_out, rank))
        for layer in range(packer.layout.num_layers)
        for index, (_, num_in, num_out) in enumerate(packer.module_shapes)
    ]
    return pack_adapter(modules, packer.layout, packer.module_shapes)


def generate(folder: Path, device: str, run_ahead: bool) -> tuple[dict[str, list[int]], int]:
    """Tokens by request through a pool in which the adapters do not fit together, and how many were evicted."""
    config = EngineConfig(
        model=ModelConfig(path=str(folder), device=device),
        pool=PoolConfig(pool_bytes=76 * 8192),
        scheduler=SchedulerConfig(max_step_tokens=32, max_running=8, run_ahead=run_ahead),
    )
    core = assemble(config, pack).core
    tokens: dict[str, list[int]] = {}
    for index in range(3):
        for name in (None, *RANKS):
            request_id = f"{name}/{index}"
            tokens[request_id] = []
            core.add(
                EngineRequest(
                    request_id=request_id,
                    token_ids=tuple((7 * index + 3 * place) % 100 for place in range(5 + 9 * index)),
                    adapter=AdapterUse(digest=name) if name else None,
                    max_tokens=NUM_TOKENS,
                    seed=index,
                    temperature=0.0 if index < 2 else 0.8,
                )
            )
    while core.has_work():
        for delta in core.step():
            assert delta.failure is None, delta.failure
            tokens[delta.request_id] += delta.token_ids
        core.check()
    core.close()
    return tokens, core.status().counters.adapter_evictions


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_step_in_flight_gives_the_tokens_of_one_at_a_time(tmp_path: Path, device: str) -> None:
    save_model(tmp_path)
    expected, _ = generate(tmp_path, "cpu", run_ahead=False)
    tokens, evictions = generate(tmp_path, device, run_ahead=True)
    assert tokens == expected
    assert evictions > 0
    assert len({tuple(row) for row in tokens.values()}) == len(tokens), "an adapter changes nothing"


@pytest.mark.gpu
def test_an_arena_that_other_processes_write_to_is_copied_from_beside_steps() -> None:
    arena = PinnedArena(8, 4096)
    pages = map_pages(arena.descriptor, 8, 4096)  # as a builder has it
    pages[3] = 7
    host = torch.from_numpy(arena.pages)  # pyright: ignore[reportUnknownMemberType]
    assert host.is_pinned()
    device = torch.empty(4096, dtype=torch.uint8, device="cuda")
    device.copy_(host[3], non_blocking=True)
    assert bool((device == 7).all())
    arena.close()
