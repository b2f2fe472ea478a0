"""The whole engine against PEFT: mixed batches that join and leave, through large and small pools, to the token."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from lorasrv.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.batch import ChunkInput, PageCopy, RunningStep
from lorasrv.engine.build import Assembly, assemble
from lorasrv.engine.packer import Packer
from lorasrv.engine.runner import ModelRunner
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.tensors import pack_adapter
from lorasrv.types import AdapterUse, EngineRequest
from peft_models import load_peft_folder, peft_greedy, random_adapter, random_llama
from reads_end import let_reads_end

NUM_TOKENS = 12
PROMPTS_EACH = 3
ADAPTERS: dict[str, dict[str, object]] = {
    "r1": {"rank": 1, "targets": ("q_proj", "v_proj")},
    "r3": {"rank": 3, "rslora": True},
    "r8": {"rank": 8, "targets": ("gate_proj", "up_proj", "down_proj")},
    "r13": {"rank": 13, "targets": ("k_proj", "o_proj", "down_proj")},
    "r16": {"rank": 16},
    "r64": {"rank": 64, "rslora": True},
    "r100": {"rank": 100, "targets": ("o_proj",)},
    "r128": {"rank": 128, "alpha": 64},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its adapters, prompts for each and for the base (None), and PEFT's answers."""

    folder: Path
    adapters: dict[str, Path]
    prompts: dict[str | None, list[list[int]]]
    expected: dict[str | None, list[list[int]]]

    def requests(self) -> Iterator[EngineRequest]:
        """Adapters in turn, so that every batch is mixed; the id says which answer is expected."""
        for index in range(PROMPTS_EACH):
            for name in self.prompts:
                adapter = AdapterUse(digest=name) if name else None
                yield EngineRequest(
                    request_id=f"{name or ''}/{index}",
                    token_ids=tuple(self.prompts[name][index]),
                    adapter=adapter,
                    max_tokens=NUM_TOKENS,
                    seed=0,
                    temperature=0.0,
                )

    def wrong(self, tokens: dict[str, list[int]]) -> set[str]:
        expected = {f"{name or ''}/{i}": row for name, rows in self.expected.items() for i, row in enumerate(rows)}
        assert tokens.keys() == expected.keys()
        return {request_id for request_id, row in expected.items() if tokens[request_id] != row}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("base")
    model = random_llama(folder, seed=5)
    adapters = {
        name: random_adapter(model, tmp_path_factory.mktemp(name), seed=index, **settings)  # type: ignore[arg-type]
        for index, (name, settings) in enumerate(ADAPTERS.items())
    }
    generator = torch.Generator().manual_seed(9)
    prompts: dict[str | None, list[list[int]]] = {
        name: [
            torch.randint(1, 100, (length,), generator=generator).tolist()
            for length in torch.randint(1, 40, (PROMPTS_EACH,), generator=generator).tolist()
        ]
        for name in (None, *adapters)
    }
    expected = {
        name: peft_greedy(model, adapters[name] if name else None, prompts[name], NUM_TOKENS) for name in prompts
    }
    base = peft_greedy(model, None, [prompts[name][0] for name in adapters], NUM_TOKENS)
    assert all(expected[name][0] != row for name, row in zip(adapters, base, strict=True)), "an adapter does nothing"
    return Case(folder=folder, adapters=adapters, prompts=prompts, expected=expected)


def make_engine(case: Case, *, num_pages: int, max_step_tokens: int = 64, run_ahead: bool = False) -> Assembly:
    def read(name: str, packer: Packer) -> PackedAdapter:
        modules = load_peft_folder(case.adapters[name])
        return pack_adapter(modules, packer.layout, packer.module_shapes)

    model = ModelConfig(path=str(case.folder))
    scheduler = SchedulerConfig(max_step_tokens=max_step_tokens, max_running=16, run_ahead=run_ahead)
    probe = assemble(EngineConfig(model=model, scheduler=scheduler), read)
    probe.core.close()
    pool = PoolConfig(pool_bytes=num_pages * probe.info.page_bytes)
    return assemble(EngineConfig(model=model, scheduler=scheduler, pool=pool), read)


def serve(engine: Assembly, requests: Iterable[EngineRequest], joining: int, sample: int = 0) -> dict[str, list[int]]:
    """Run all requests, `joining` new ones before every step; checks the engine after each. Tokens of one sample."""
    tokens: dict[str, list[int]] = {}
    pending = list(requests)
    while pending or engine.core.has_work():
        for request in pending[:joining]:
            engine.core.add(request)
            tokens[request.request_id] = []
        del pending[:joining]
        let_reads_end(engine.core)
        for delta in engine.core.step():
            assert delta.failure is None, delta.failure
            tokens[delta.request_id] += delta.token_ids if delta.sample == sample else ()
        engine.core.check()
    return tokens


@pytest.mark.parametrize("joining", [1, 27])
@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("max_step_tokens", [16, 512])
def test_mixed_batches_equal_peft(case: Case, joining: int, run_ahead: bool, max_step_tokens: int) -> None:
    engine = make_engine(case, num_pages=500, max_step_tokens=max_step_tokens, run_ahead=run_ahead)
    assert case.wrong(serve(engine, case.requests(), joining)) == set()
    assert engine.core.status().counters.adapter_evictions == 0
    engine.core.close()


@pytest.mark.parametrize("max_step_tokens", [16, 64, 512])
def test_cache_hits_change_no_token(case: Case, max_step_tokens: int) -> None:
    engine = make_engine(case, num_pages=500, max_step_tokens=max_step_tokens)
    assert case.wrong(serve(engine, case.requests(), 27)) == set()
    assert engine.core.status().counters.cached_prompt_tokens == 0
    assert case.wrong(serve(engine, case.requests(), 3)) == set()
    assert engine.core.status().counters.cached_prompt_tokens > 100
    engine.core.close()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_preempted_requests_equal_peft(case: Case, run_ahead: bool) -> None:
    engine = make_engine(case, num_pages=196, run_ahead=run_ahead)  # the largest adapter takes 190
    assert case.wrong(serve(engine, case.requests(), 27)) == set()
    counters = engine.core.status().counters
    assert counters.preemptions > 0, counters
    engine.core.close()


def test_adapters_evicted_and_reloaded_equal_peft(case: Case) -> None:
    engine = make_engine(case, num_pages=210)  # the largest adapter takes 190
    assert case.wrong(serve(engine, case.requests(), 27)) == set()
    counters = engine.core.status().counters
    assert counters.adapter_evictions > 0 and counters.adapter_loads > len(case.adapters), counters
    engine.core.close()


def test_one_forward_per_step_with_eight_adapters(case: Case) -> None:
    engine = make_engine(case, num_pages=400, max_step_tokens=512)
    runner = engine.core._runner
    assert isinstance(runner, ModelRunner)
    distinct: set[int] = set()

    class Watching:
        runs_ahead = False

        def forward(self, chunks: tuple[ChunkInput, ...], copies: tuple[PageCopy, ...] = ()) -> RunningStep:
            before = runner.num_forwards
            step = runner.forward(chunks, copies)
            assert runner.num_forwards == before + 1
            distinct.add(len({chunk.adapter for chunk in chunks if chunk.adapter}))
            return step

    engine.core._runner = Watching()
    serve(engine, case.requests(), 27)
    assert max(distinct) == 8
    assert engine.core.status().counters.steps == runner.num_forwards
    engine.core.close()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_every_sample_equals_peft(case: Case, run_ahead: bool) -> None:
    engine = make_engine(case, num_pages=400, run_ahead=run_ahead)
    assert case.wrong(serve(engine, [replace(request, n=3) for request in case.requests()], 9, sample=2)) == set()
    engine.core.close()


def test_samples_draw_what_they_draw_alone(case: Case) -> None:
    """The first sample is the only one of a request for one; the others have numbers of their own, however they run."""
    requests = [replace(request, temperature=0.9, seed=7) for request in case.requests()]
    engine = make_engine(case, num_pages=500)
    alone = serve(engine, requests, 27)
    several = [replace(request, n=3, request_id=f"{request.request_id}x") for request in requests]
    first, second = (serve(engine, several, joining, sample) for joining, sample in ((27, 0), (27, 1)))
    assert list(first.values()) == list(alone.values())
    assert all(first[request_id] != second[request_id] for request_id in first)
    engine.core.close()
    ahead = make_engine(case, num_pages=210, run_ahead=True)
    assert serve(ahead, several, 5, sample=1) == second
    assert ahead.core.status().counters.preemptions > 0
    ahead.core.close()
