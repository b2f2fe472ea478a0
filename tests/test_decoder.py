"""Logits against transformers, whatever the chunking and the company in the batch."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from drawing import GREEDY, run_greedy
from lorasrv.engine.batch import ChunkInput, Draw, PageCopy
from lorasrv.engine.fitting import page_layout
from lorasrv.engine.runner import ModelRunner
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import module_geometry
from lorasrv.model.decoder import Decoder, ForwardBatch
from lorasrv.model.families import read_architecture
from lorasrv.model.loader import load_weights
from lorasrv.model.sampler import Fence
from lorasrv_kernels import fixed, reference
from lorasrv_kernels.forward import ForwardKernels
from native_kernels import KINDS, kernels_of
from peft_models import random_llama

CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide_heads": {
        "head_dim": 32,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
}


def named(kernels: str) -> ForwardKernels:
    oracles: dict[str, ForwardKernels] = {"reference": reference, "fixed": fixed}
    return oracles.get(kernels) or kernels_of(kernels)


class Rig:
    """A decoder with a pool whose pages go to sequences in a shuffled order."""

    def __init__(
        self,
        folder: Path,
        num_pages: int = 128,
        block_tokens: int = 8,
        dtype: torch.dtype = torch.float32,
        kernels: ForwardKernels = reference,
    ) -> None:
        cpu = torch.device("cpu")
        architecture = read_architecture(folder)
        layout = page_layout(architecture, block_tokens, dtype.itemsize)
        self.storage = PageStorage(layout, num_pages, dtype, cpu)
        self.storage.bytes.view(dtype).fill_(float("nan"))  # nothing may be read before it is written
        weights = load_weights(folder, architecture, dtype, cpu)
        self.decoder = Decoder(architecture, weights, module_geometry(layout, architecture.module_shapes()), kernels)
        self.runner = ModelRunner(self.decoder, self.storage)
        self._free = random.Random(0).sample(range(num_pages), num_pages)

    def table(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._free.pop() for _ in range(self.storage.layout.pages_for_tokens(num_tokens)))

    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        hidden = self.decoder.forward(batch, self.storage.bytes, self.storage.kv)
        return self.decoder.logits(hidden[batch.query_starts[1:].long() - 1])


def chunk(tokens: list[int], start: int, end: int, table: tuple[int, ...]) -> ChunkInput:
    return ChunkInput(token_ids=tuple(tokens[start:end]), start=start, block_table=table, adapter=None)


def expected(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(101), k=length)


@pytest.mark.parametrize("kernels", ["reference", "fixed", *KINDS])
@pytest.mark.parametrize("size", [1, 7, 30])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_in_any_chunking(tmp_path: Path, name: str, size: int, kernels: str) -> None:
    model = random_llama(tmp_path, **CONFIGS[name])
    rig, tokens = Rig(tmp_path, kernels=named(kernels)), prompt(1, 30)
    table, want = rig.table(30), expected(model, tokens)
    for start in range(0, 30, size):
        end = min(start + size, 30)
        got = rig.logits(rig.runner.build_batch([chunk(tokens, start, end, table)]))
        torch.testing.assert_close(got, want[end - 1 : end], atol=1e-4, rtol=0)


def test_prefill_chunks_and_decodes_share_a_batch(tmp_path: Path) -> None:
    """Four sequences at different stages of their life, three of them advanced together, step by step."""
    model, rig = random_llama(tmp_path), Rig(tmp_path)
    prompts = [prompt(seed, length) for seed, length in ((1, 40), (2, 9), (3, 23), (4, 17))]
    want = [expected(model, tokens) for tokens in prompts]
    tables = [rig.table(len(tokens)) for tokens in prompts]
    sizes = ((5, 1, 11, 2), (1, 4, 1, 7), (9, 1, 1, 1))
    done, step = [0, 0, 0, 0], 0
    while any(d < len(tokens) for d, tokens in zip(done, prompts, strict=True)):
        ends = [min(d + s, len(t)) for d, s, t in zip(done, sizes[step % 3], prompts, strict=True)]
        members = [i for i in range(4) if done[i] < ends[i] and i != step % 4]
        step += 1
        if members:
            chunks = [chunk(prompts[i], done[i], ends[i], tables[i]) for i in members]
            got = rig.logits(rig.runner.build_batch(chunks))
            for row, i in enumerate(members):
                torch.testing.assert_close(got[row], want[i][ends[i] - 1], atol=1e-4, rtol=0)
                done[i] = ends[i]


def test_only_drawing_chunks_have_tokens(tmp_path: Path) -> None:
    random_llama(tmp_path)
    rig, tokens = Rig(tmp_path), prompt(1, 12)
    table = rig.table(12)
    assert run_greedy(rig.runner, [chunk(tokens, 0, 6, table)], []).tokens == ()
    assert len(run_greedy(rig.runner, [chunk(tokens, 6, 12, table)]).tokens) == 1
    assert rig.runner.num_forwards == 2


def test_a_step_that_draws_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_llama(tmp_path)
    rig, waited = Rig(tmp_path), list[Fence]()
    monkeypatch.setattr(Fence, "wait", lambda fence: waited.append(fence))
    step = rig.runner.forward((chunk(prompt(1, 12), 0, 6, rig.table(12)),))
    step.draw(())
    assert not waited
    step.output()
    assert waited


def test_a_token_that_is_still_being_drawn_goes_into_the_next_step(tmp_path: Path) -> None:
    model, rig, tokens = random_llama(tmp_path), Rig(tmp_path), prompt(1, 12)
    other, table = rig.table(4), rig.table(13)
    first = rig.runner.forward((chunk(tokens, 0, 4, other), chunk(tokens, 0, 12, table)))
    first.draw((Draw(chunk=0, how=GREEDY), Draw(chunk=1, how=GREEDY)))
    ahead = ChunkInput(token_ids=(), start=12, block_table=table, adapter=None, drawn=1)
    second = rig.runner.forward((ahead,))
    drawn = first.output().tokens[1]
    assert drawn == int(expected(model, tokens)[-1].argmax())
    second.draw((Draw(chunk=0, how=GREEDY),))
    assert second.output().tokens == (int(expected(model, [*tokens, drawn])[-1].argmax()),)


def test_a_copied_page_is_as_good_as_the_first(tmp_path: Path) -> None:
    model, rig, tokens = random_llama(tmp_path), Rig(tmp_path), prompt(1, 12)
    table, copy = rig.table(12), rig.table(8)[:1]
    run_greedy(rig.runner, [chunk(tokens, 0, 11, table)])
    step = rig.runner.forward((chunk(tokens, 11, 12, (table[0], *copy)),), (PageCopy(source=table[1], target=copy[0]),))
    step.draw((Draw(chunk=0, how=GREEDY._replace(logprobs=0)),))
    output = step.output()
    want = expected(model, tokens)[-1].log_softmax(-1)
    assert output.tokens == (int(want.argmax()),)
    assert output.logprobs[0].logprob == pytest.approx(float(want.max()), abs=1e-4)


def test_bf16_is_as_close_to_fp32_as_transformers_is(tmp_path: Path) -> None:
    model, tokens = random_llama(tmp_path), prompt(1, 30)
    want = expected(model, tokens)
    theirs = (expected(model.bfloat16(), tokens).float() - want).square().mean()
    rig = Rig(tmp_path, dtype=torch.bfloat16)
    every_row = [chunk(tokens, 0, end, rig.table(end)) for end in range(1, 31)]
    ours = (rig.logits(rig.runner.build_batch(every_row)) - want).square().mean()
    assert 0 < ours < 1.5 * theirs


def test_llama_of_many_layers_and_a_page_per_token(tmp_path: Path) -> None:
    model = random_llama(tmp_path, num_hidden_layers=5, head_dim=16, initializer_range=0.15)
    rig, tokens = Rig(tmp_path, block_tokens=1), prompt(5, 20)
    got = rig.logits(rig.runner.build_batch([chunk(tokens, 0, 20, rig.table(20))]))
    torch.testing.assert_close(got, expected(model, tokens)[-1:], atol=1e-4, rtol=0)
