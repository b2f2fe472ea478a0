"""Greedy tokens equal PEFT's for mixed batches of adapters and base rows, and the comparison sees every mutation."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drawing import run_greedy
from lorasrv.config import EngineConfig, ModelConfig, PoolConfig
from lorasrv.engine.batch import ChunkInput
from lorasrv.engine.runner import ModelRunner, build_runner
from lorasrv.errors import ConfigurationError
from lorasrv.memory.layout import ALIGN_BYTES
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import PackedModule, pack_adapter
from lorasrv.model.decoder import Decoder
from lorasrv.model.families import Architecture
from peft_models import load_peft_folder, peft_greedy, random_adapter, random_llama

NUM_TOKENS = 8
ADAPTERS: dict[str, dict[str, Any]] = {
    "r1": {"rank": 1},
    "r3": {"rank": 3, "targets": ("q_proj", "v_proj"), "delta": 2.0},
    "r8_rslora": {"rank": 8, "rslora": True},
    "r16": {"rank": 16, "targets": ("gate_proj", "up_proj", "down_proj")},
    "r64": {"rank": 64, "targets": ("o_proj", "down_proj")},
    "r128": {"rank": 128},
    "r13_rslora": {"rank": 13, "targets": ("k_proj", "o_proj", "up_proj"), "rslora": True, "alpha": 5},
    "r100": {"rank": 100, "targets": ("v_proj", "gate_proj")},
}
Modules = dict[str, list[PackedModule]]


@dataclass(frozen=True, kw_only=True)
class Request:
    adapter: str | None
    prompt: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on disk, its adapters, requests, and what transformers and PEFT answer."""

    folder: Path
    modules: Modules
    requests: tuple[Request, ...]
    want: tuple[list[int], ...]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("parity")
    model = random_llama(folder / "model")
    rng = random.Random(3)
    prompts = [rng.choices(range(101), k=length) for length in (5, 17, 30)]
    base = peft_greedy(model, None, prompts, NUM_TOKENS)
    requests: list[Request] = []
    want: list[list[int]] = []
    modules: Modules = {}
    for seed, name in enumerate([*ADAPTERS, None]):
        path = None
        if name is not None:
            path = random_adapter(model, folder / name, seed=seed, **ADAPTERS[name])
            modules[name] = load_peft_folder(path)
        requests += [Request(adapter=name, prompt=tuple(prompt)) for prompt in prompts]
        want += base if path is None else peft_greedy(model, path, prompts, NUM_TOKENS)
        assert path is None or all(a != b for a, b in zip(want[-3:], base, strict=True)), f"{name} changes nothing"
    order = rng.sample(range(len(requests)), len(requests))
    return Case(
        folder=folder / "model",
        modules=modules,
        requests=tuple(requests[i] for i in order),
        want=tuple(want[i] for i in order),
    )


class Server:
    """The smallest serving loop: pages given once, everyone's chunk each step, members joining and leaving."""

    def __init__(self, folder: Path, modules: Modules, pool_bytes: int = 16 << 20) -> None:
        config = EngineConfig(model=ModelConfig(path=str(folder)), pool=PoolConfig(pool_bytes=pool_bytes))
        self.runner: ModelRunner
        self.storage: PageStorage
        self.architecture: Architecture
        self.runner, self.storage, self.architecture, self.info = build_runner(config)
        self.storage.bytes.view(torch.float32).fill_(float("nan"))
        self._free = random.Random(1).sample(range(self.info.num_pages), self.info.num_pages)
        self.pages: dict[str, list[int]] = {}
        self.adapters = {name: self._load(name, found) for name, found in modules.items()}

    def _load(self, name: str, modules: list[PackedModule]) -> AdapterInput:
        packed = pack_adapter(modules, self.storage.layout, self.architecture.module_shapes())
        self.pages[name] = [self._free.pop() for _ in range(packed.num_pages)]
        directory = self.storage.write_adapter(packed, self.pages[name], wait_for_steps=False).directory
        return AdapterInput(directory=directory, max_rank=packed.max_rank, scale=1.0)

    def greedy(self, requests: Iterable[Request], max_members: int, chunk_tokens: int) -> list[list[int] | None]:
        """Tokens of every request, None for one whose logits were not finite. At most `max_members` run at a time."""
        waiting = [(index, Sequence.of(request, self)) for index, request in enumerate(requests)]
        answers: list[list[int] | None] = [None] * len(waiting)
        running: list[tuple[int, Sequence]] = []
        while waiting or running:
            while waiting and len(running) < max_members:
                running.append(waiting.pop(0))
            chunks = tuple(sequence.next_chunk(chunk_tokens) for _, sequence in running)
            drawing = [number for number, (_, sequence) in enumerate(running) if sequence.ends_with(chunks[number])]
            tokens = dict(zip(drawing, run_greedy(self.runner, chunks, drawing).tokens, strict=True))
            for number, (index, sequence) in enumerate(list(running)):
                alive = sequence.apply(chunks[number], number in drawing, tokens.get(number))
                if not alive or len(sequence.tokens) == sequence.num_prompt + NUM_TOKENS:
                    answers[index] = sequence.tokens[sequence.num_prompt :] if alive else None
                    running.remove((index, sequence))
        return answers

    def take_pages(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._free.pop() for _ in range(self.storage.layout.pages_for_tokens(num_tokens)))


class Sequence:
    def __init__(self, tokens: list[int], table: tuple[int, ...], adapter: AdapterInput | None) -> None:
        self.tokens = tokens
        self.num_prompt = len(tokens)
        self._table = table
        self._adapter = adapter
        self._done = 0

    @classmethod
    def of(cls, request: Request, server: Server) -> "Sequence":
        table = server.take_pages(len(request.prompt) + NUM_TOKENS)
        return cls(list(request.prompt), table, server.adapters[request.adapter] if request.adapter else None)

    def next_chunk(self, chunk_tokens: int) -> ChunkInput:
        end = min(self._done + chunk_tokens, len(self.tokens))
        return ChunkInput(
            token_ids=tuple(self.tokens[self._done : end]),
            start=self._done,
            block_table=self._table,
            adapter=self._adapter,
        )

    def ends_with(self, chunk: ChunkInput) -> bool:
        return chunk.start + chunk.num_tokens == len(self.tokens)

    def apply(self, chunk: ChunkInput, drew: bool, token: int | None) -> bool:
        """False when the chunk drew and its logits were not finite."""
        self._done += len(chunk.token_ids)
        if token is not None:
            self.tokens.append(token)
        return not drew or token is not None


def differing(case: Case, modules: Modules, max_members: int = 24, chunk_tokens: int = 7) -> set[str | None]:
    """The comparison: adapters (None for the base) with a request whose tokens are not PEFT's."""
    got = Server(case.folder, modules).greedy(case.requests, max_members, chunk_tokens)
    return {r.adapter for r, mine, theirs in zip(case.requests, got, case.want, strict=True) if mine != theirs}


@pytest.mark.parametrize(("max_members", "chunk_tokens"), [(27, 64), (24, 7), (5, 16)])
def test_greedy_tokens_equal_peft(case: Case, max_members: int, chunk_tokens: int) -> None:
    assert len(case.requests) == 27
    assert differing(case, case.modules, max_members, chunk_tokens) == set()


def drop_module(modules: Modules, name: str, index: int) -> Modules:
    return modules | {name: modules[name][:index] + modules[name][index + 1 :]}


def test_dropping_any_module_of_an_adapter_is_seen(case: Case) -> None:
    kept = [i for i, request in enumerate(case.requests) if request.adapter in ("r128", "r1")]
    case = replace(case, requests=tuple(case.requests[i] for i in kept), want=tuple(case.want[i] for i in kept))
    for index in range(len(case.modules["r128"])):
        assert differing(case, drop_module(case.modules, "r128", index)) == {"r128"}, case.modules["r128"][index]


def test_dropping_one_module_of_every_adapter_is_seen_in_each(case: Case) -> None:
    mutated = {name: found[1:] for name, found in case.modules.items()}
    assert differing(case, mutated) == set(ADAPTERS)


def test_swapping_two_adapters_is_seen(case: Case) -> None:
    swapped = case.modules | {"r3": case.modules["r8_rslora"], "r8_rslora": case.modules["r3"]}
    assert differing(case, swapped) == {"r3", "r8_rslora"}


def test_skipping_a_scale_is_seen(case: Case) -> None:
    unscaled = {name: [replace(m, scale=1.0) for m in found] for name, found in case.modules.items()}
    assert differing(case, unscaled) == set(ADAPTERS)


def test_a_missing_row_of_rank_is_seen(case: Case) -> None:
    def without_last(m: PackedModule) -> PackedModule:
        return replace(m, a=m.a.clone().index_fill_(0, torch.tensor([m.rank - 1]), 0.0))

    cut = {name: [without_last(m) for m in found] for name, found in case.modules.items()}
    assert {"r1", "r3", "r8_rslora"} <= differing(case, cut)


def test_a_requests_own_scale_multiplies_the_adapters(case: Case) -> None:
    """Scale 0 is the base; half the scale on doubled weights is the adapter."""
    doubled = {name: [replace(m, b=2 * m.b) for m in found] for name, found in case.modules.items()}
    server = Server(case.folder, doubled)
    server.adapters = {name: replace(found, scale=0.5) for name, found in server.adapters.items()}
    assert tuple(server.greedy(case.requests, 24, 7)) == case.want
    server = Server(case.folder, case.modules)
    bases = [Request(adapter=None, prompt=request.prompt) for request in case.requests]
    want = server.greedy(bases, 24, 7)
    server = Server(case.folder, case.modules)
    server.adapters = {name: replace(found, scale=0.0) for name, found in server.adapters.items()}
    assert server.greedy(case.requests, 24, 7) == want


def test_one_forward_per_step_with_eight_adapters(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        return forward(self, *arguments)

    monkeypatch.setattr(Decoder, "forward", counted)
    server = Server(case.folder, case.modules)
    chunks = tuple(Sequence.of(request, server).next_chunk(64) for request in case.requests)
    assert len({chunk.adapter for chunk in chunks}) == 9
    tokens = run_greedy(server.runner, chunks).tokens
    assert tokens == tuple(want[0] for want in case.want)
    assert len(calls) == server.runner.num_forwards == 1


@pytest.mark.parametrize("name", ["r1", "r16", "r128"])
def test_nan_in_an_adapters_pages_turns_only_its_rows_nan(case: Case, name: str) -> None:
    server = Server(case.folder, case.modules)
    packed = pack_adapter(case.modules[name], server.storage.layout, server.architecture.module_shapes())
    pages = server.pages[name]
    for address in packed.tile_addresses.tolist():
        page, offset = divmod(address * ALIGN_BYTES, server.storage.layout.page_bytes)
        server.storage.pages[pages[page], offset : offset + 4].view(torch.float32).fill_(float("nan"))
    got = server.greedy(case.requests, 27, 7)
    for request, mine, theirs in zip(case.requests, got, case.want, strict=True):
        assert mine == (None if request.adapter == name else theirs)


def test_a_pool_of_less_than_two_pages_is_refused_with_both_numbers(case: Case) -> None:
    with pytest.raises(ConfigurationError, match=r"pool_bytes 5000 holds 1 pages of 4096 bytes.*8192"):
        Server(case.folder, {}, pool_bytes=5000)


def test_start_up_says_what_it_found(case: Case) -> None:
    info = Server(case.folder, {}, pool_bytes=10_000).info
    assert (info.num_pages, info.page_bytes, info.block_tokens) == (2, 4096, 16)
    assert (info.vocab_size, info.context_tokens, info.dtype, info.device) == (101, 256, "float32", "cpu")
