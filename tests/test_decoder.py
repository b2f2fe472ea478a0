"""Logits against transformers, whatever the chunking and the company in the batch."""

import random
from pathlib import Path

import pytest
import torch
from peft_models import random_llama
from transformers import LlamaForCausalLM

from lorasrv.memory.packing import module_geometry
from lorasrv.memory.storage import PageStorage
from lorasrv.model.decoder import Decoder, ForwardBatch
from lorasrv.engine.batch import ChunkInput, SampleInput
from lorasrv.engine.runner import ModelRunner, page_layout
from lorasrv.model.families import read_architecture
from lorasrv.model.loader import load_weights

GREEDY = SampleInput(temperature=0.0, top_p=1.0, top_k=None, seed=0, position=0)
CONFIGS: dict[str, dict[str, object]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32, "num_key_value_heads": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


class Rig:
    """A decoder with a pool whose pages go to sequences in a shuffled order."""

    def __init__(self, folder: Path, num_pages: int = 64, block_tokens: int = 8) -> None:
        cpu = torch.device("cpu")
        architecture = read_architecture(folder)
        layout = page_layout(architecture, block_tokens, 4)
        self.storage = PageStorage(layout, num_pages, torch.float32, cpu)
        self.storage.bytes.view(torch.float32).fill_(float("nan"))  # nothing may be read before it is written
        weights = load_weights(folder, architecture, torch.float32, cpu)
        self.decoder = Decoder(architecture, weights, module_geometry(layout, architecture.module_shapes()))
        self.runner = ModelRunner(self.decoder, self.storage)
        self._free = random.Random(0).sample(range(num_pages), num_pages)

    def table(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._free.pop() for _ in range(self.storage.layout.pages_for_tokens(num_tokens)))

    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        return self.decoder.forward(batch, self.storage.bytes, self.storage.kv)


def chunk(tokens: list[int], start: int, end: int, table: tuple[int, ...]) -> ChunkInput:
    return ChunkInput(token_ids=tuple(tokens[start:end]), start=start, block_table=table, adapter=None, sample=GREEDY)


def expected(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(101), k=length)


@pytest.mark.parametrize("size", [1, 7, 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_in_any_chunking(tmp_path: Path, name: str, size: int) -> None:
    model = random_llama(tmp_path, **CONFIGS[name])
    rig, tokens = Rig(tmp_path), prompt(1, 30)
    table, want = rig.table(30), expected(model, tokens)
    for start in range(0, 30, size):
        end = min(start + size, 30)
        got = rig.logits(rig.runner.build_batch([chunk(tokens, start, end, table)]))
        torch.testing.assert_close(got, want[end - 1 : end], atol=1e-4, rtol=0)
