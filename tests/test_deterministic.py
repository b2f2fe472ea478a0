"""The `deterministic` option through the whole engine: a request's bits, whatever becomes of it and beside it."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasrv import LLM
from lorasrv.config import DType, EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.demo.tasks import TASKS, prompt, random_words
from lorasrv.engine.build import assemble
from lorasrv.engine.fitting import page_layout
from lorasrv.engine.packer import Packer
from lorasrv.errors import ConfigurationError
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.tensors import pack_adapter
from lorasrv.model.families import read_architecture
from lorasrv.types import AdapterUse, EngineCounters, EngineRequest, PositionLogprobs, SamplingParams
from lorasrv_kernels import fixed
from peft_models import load_peft_folder, random_adapter, random_model

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
ADAPTERS: dict[str, dict[str, Any]] = {
    "r1": {"rank": 1, "targets": ("q_proj", "v_proj")},
    "r3": {"rank": 3, "rslora": True},
    "r13": {"rank": 13, "targets": ("k_proj", "o_proj", "down_proj")},
    "r40": {"rank": 40, "targets": ("q_proj", "down_proj")},
}
NUM_REQUESTS = 32
NUM_TOKENS = 10
BLOCK_TOKENS = 16
# Wide enough that some row's arithmetic does change with its batch where nothing prevents it.
MODEL: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 208, "initializer_range": 0.15}


@dataclass
class Answer:
    """All that a request gives; equal when every number's bits are."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])


@dataclass(frozen=True, kw_only=True)
class Run:
    answers: dict[str, Answer]
    counters: EngineCounters


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its adapters, and requests for all of them and the base in turn."""

    folder: Path
    adapters: dict[str, Path]
    requests: tuple[EngineRequest, ...]

    def serve(
        self,
        requests: Iterable[EngineRequest],
        *,
        together: int = NUM_REQUESTS,
        deterministic: bool = True,
        dtype: DType = "bfloat16",
        num_pages: int = 600,
        max_step_tokens: int = 512,
        prefix_cache: bool = False,
        run_ahead: bool = False,
        rounds: int = 1,
        sample: int = 0,
    ) -> Run:
        """Answers of one sample each in the last of `rounds`, up to `together` requests at a time, on one engine."""

        def read(name: str, packer: Packer) -> PackedAdapter:
            return pack_adapter(load_peft_folder(self.adapters[name]), packer.layout, packer.module_shapes)

        scheduler = SchedulerConfig(
            max_step_tokens=max_step_tokens,
            max_running=min(together, max_step_tokens),
            prefix_cache=prefix_cache,
            run_ahead=run_ahead,
        )
        model = ModelConfig(path=str(self.folder), dtype=dtype, deterministic=deterministic)
        layout = page_layout(read_architecture(self.folder), BLOCK_TOKENS, getattr(torch, dtype).itemsize)
        pool = PoolConfig(pool_bytes=num_pages * layout.page_bytes, block_tokens=BLOCK_TOKENS)
        core = assemble(EngineConfig(model=model, scheduler=scheduler, pool=pool), read).core
        answers: dict[str, Answer] = {}
        for _ in range(rounds):
            waiting = list(requests)
            answers = {request.request_id: Answer() for request in waiting}
            while waiting or core.has_work():
                status = core.status()
                for _ in range(min(len(waiting), together - status.running - status.waiting)):
                    core.add(waiting.pop(0))
                for delta in core.step():
                    assert delta.failure is None, delta.failure
                    if delta.sample != sample:
                        continue
                    answer = answers[delta.request_id]
                    answer.token_ids += delta.token_ids
                    answer.logprobs += delta.logprobs
                    answer.prompt_logprobs += delta.prompt_logprobs
        core.check()
        counters = core.status().counters
        core.close()
        return Run(answers=answers, counters=counters)


def make_case(folder: Path, model_type: str, seed: int, **settings: Any) -> Case:
    model = random_model(folder / "base", model_type, seed=seed, **(MODEL | settings))
    adapters = {
        name: random_adapter(model, folder / name, seed=index, **each)
        for index, (name, each) in enumerate(ADAPTERS.items())
    }
    rng = random.Random(seed)
    names = (None, *adapters)
    requests = tuple(
        EngineRequest(
            request_id=f"{names[index % 5]}/{index}",
            token_ids=tuple(rng.choices(range(1, 101), k=100 if index < 5 else rng.randint(1, 40))),
            adapter=AdapterUse(digest=name, scale=rng.choice((1.0, 0.5))) if (name := names[index % 5]) else None,
            max_tokens=NUM_TOKENS,
            seed=index,
            temperature=0.0 if index % 2 else 1.0,
            top_p=0.9,
            logprobs=3,
            prompt_logprobs=2,
        )
        for index in range(NUM_REQUESTS)
    )
    return Case(folder=folder / "base", adapters=adapters, requests=requests)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("llama"), "llama", 3)


@pytest.fixture(scope="module")
def batch(case: Case) -> Run:
    """All requests in one batch, prompts in one go."""
    return case.serve(case.requests)


def test_the_batch_is_a_batch(case: Case, batch: Run) -> None:
    # One at a time they would take NUM_TOKENS each; how many join late depends on how long their adapters take to read.
    assert batch.counters.steps < 3 * NUM_TOKENS
    for request in case.requests:
        answer = batch.answers[request.request_id]
        assert len(answer.token_ids) == len(answer.logprobs) == NUM_TOKENS
        assert len(answer.prompt_logprobs) == len(request.token_ids) - 1


def test_alone_and_in_any_chunks(case: Case, batch: Run) -> None:
    """The five that have long prompts, one of each adapter and the base."""
    for size in (1, 7, 64, 512):
        alone = case.serve(case.requests[:5], together=1, max_step_tokens=size)
        assert alone.counters.prompt_tokens == 500
        assert alone.answers == {name: batch.answers[name] for name in alone.answers}


def test_all_alone(case: Case, batch: Run) -> None:
    assert case.serve(case.requests, together=1).answers == batch.answers


def test_a_few_at_a_time(case: Case, batch: Run) -> None:
    """Prompts are cut where the budget ends, beside decodes."""
    for together, budget in ((3, 5), (20, 33)):
        assert case.serve(case.requests, together=together, max_step_tokens=budget).answers == batch.answers


def test_preempted_and_recomputed(case: Case) -> None:
    """Decoded tokens come back as prefill, some of their blocks from the cache."""
    asked = [replace(request, max_tokens=50) for request in case.requests[5:21]]
    roomy, small = case.serve(asked), case.serve(asked, num_pages=80, prefix_cache=True)
    assert roomy.counters.preemptions == 0 < small.counters.preemptions
    assert small.counters.prompt_tokens > roomy.counters.prompt_tokens
    assert small.answers == roomy.answers


def test_cached_prompts(case: Case, batch: Run) -> None:
    asked = [replace(request, prompt_logprobs=None) for request in case.requests]
    again = case.serve(asked, prefix_cache=True, rounds=2)
    assert again.counters.cached_prompt_tokens > 500, again.counters
    assert {name: (a.token_ids, a.logprobs) for name, a in again.answers.items()} == {
        name: (a.token_ids, a.logprobs) for name, a in batch.answers.items()
    }


def test_one_step_in_flight(case: Case, batch: Run) -> None:
    assert case.serve(case.requests, run_ahead=True, together=20, max_step_tokens=50).answers == batch.answers


def test_samples_that_share_their_prompt(case: Case, batch: Run) -> None:
    """The others copy a page of the first one's, and compute the prompt's last token again, beside whatever runs."""
    several = [replace(request, n=3, temperature=1.0) for request in case.requests]
    first, last = (case.serve(several, sample=sample) for sample in (0, 2))
    drawing = {request.request_id for request in case.requests if request.temperature == 1.0}
    assert all(first.answers[name] == batch.answers[name] for name in drawing)
    alone = case.serve(several[:5], together=1, sample=2, run_ahead=True, max_step_tokens=64, prefix_cache=True)
    assert alone.answers == {name: last.answers[name] for name in alone.answers}
    assert all(last.answers[name].token_ids != first.answers[name].token_ids for name in alone.answers)


def test_fp32(case: Case) -> None:
    batch = case.serve(case.requests, dtype="float32")
    alone = case.serve(case.requests[:5], dtype="float32", together=1, max_step_tokens=7)
    assert alone.answers == {name: batch.answers[name] for name in alone.answers}


def test_without_the_option_a_batch_changes_bits(case: Case) -> None:
    """Else the tests above could not fail. In bfloat16 rounding may hide it."""
    batch = case.serve(case.requests, deterministic=False, dtype="float32").answers
    alone = case.serve(case.requests[:5], deterministic=False, dtype="float32", together=1).answers
    assert all(alone[name] != batch[name] for name in alone)


def test_without_onednn_it_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "is_available", lambda device, dtype: False)
    with pytest.raises(ConfigurationError, match="deterministic in bfloat16"):
        case.serve(case.requests)
    assert case.serve(case.requests[:1], deterministic=False).answers


def test_offline() -> None:
    words = random_words(7, len(TASKS))
    asked = {task.name: prompt(word) for task, word in zip(TASKS, words, strict=True)}
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=12, logprobs=2, prompt_logprobs=0)
    with LLM(SAMPLES / "base", dtype="bfloat16", deterministic=True) as llm:
        for name in asked:
            llm.add_adapter(name, SAMPLES / name)
        alone = [llm.generate([text], adapter=name, sampling=sampling)[0] for name, text in asked.items()]
        assert llm.generate([*asked.values()], adapter=[*asked], sampling=sampling) == alone


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_any_engine_gives_the_same_bits(tmp_path: Path, seed: int) -> None:
    """Random families, shapes, dtypes and engines, each against the requests alone."""
    rng = random.Random(seed)
    model_type, settings = rng.choice(
        (
            ("llama", {"attention_bias": True, "num_key_value_heads": 6}),
            ("mistral", {"sliding_window": rng.choice((1, 9, 40))}),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
            ("qwen3", {"head_dim": 32, "tie_word_embeddings": True, "num_key_value_heads": 1}),
        )
    )
    case = make_case(tmp_path, model_type, seed, intermediate_size=rng.choice((81, 160, 333)), **settings)
    dtype: DType = rng.choice(("bfloat16", "float32"))
    alone = case.serve(case.requests, dtype=dtype, together=1)
    for _ in range(4):
        engine = {
            "together": rng.randint(2, NUM_REQUESTS),
            "max_step_tokens": rng.choice((32, 50, 512)),
            "num_pages": rng.choice((100, 130, 600)),
            "prefix_cache": rng.random() < 0.5,
        }
        assert case.serve(rng.sample(case.requests, NUM_REQUESTS), dtype=dtype, **engine).answers == alone.answers, (
            engine
        )
