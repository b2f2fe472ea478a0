"""The whole engine: a request draws the same tokens in any company, and they come as often as the model says."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from chi_squared import ACCEPTED, REJECTED, p_value
from exact_probs import Moment, exact_probs
from lorasrv.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.build import Assembly, assemble
from lorasrv.engine.packer import Packer
from lorasrv.memory.packing import PackedAdapter
from lorasrv.memory.tensors import pack_adapter
from lorasrv.types import AdapterUse, EngineRequest, LogitRules
from peft_models import load_peft_folder, random_adapter, random_llama
from reads_end import let_reads_end

VOCAB = 101
EOS = frozenset({3, 40})
ADAPTERS = {"r3": {"rank": 3, "targets": ("q_proj", "v_proj")}, "r8": {"rank": 8, "targets": ("down_proj",)}}
RULES = LogitRules(
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    logit_bias=((11, 2.0), (12, -3.0)),
    bad_words=((20,), (21, 22)),
)
KNOBS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 12},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"rules": LogitRules(repetition_penalty=1.6)},
    {"rules": LogitRules(presence_penalty=1.5, frequency_penalty=0.7)},
    {"rules": LogitRules(logit_bias=((7, 4.0), (8, -100.0)))},
    {"rules": LogitRules(bad_words=tuple((token,) for token in range(60)))},
    {"min_tokens": 10, "stop_token_ids": tuple(range(50, 90))},
    {"ignore_eos": True, "temperature": 2.5, "logprobs": 2},
    {"rules": RULES, "min_p": 0.02, "top_k": 30, "top_p": 0.95, "ignore_eos": True, "temperature": 1.3},
    {"temperature": 0.0, "prompt_logprobs": 1},
]
SEEDS = (0, 1, 2**32, 2**63, 2**64 - 1, 12345)
NUM_TOKENS = 14
NUM_SEQUENCES = 1500


@dataclass(frozen=True)
class Model:
    folder: Path
    model: LlamaForCausalLM
    adapters: dict[str, Path]

    def engine(self, *, num_pages: int = 600, block_tokens: int = 8, **scheduler: Any) -> Assembly:
        def read(name: str, packer: Packer) -> PackedAdapter:
            modules = load_peft_folder(self.adapters[name])
            return pack_adapter(modules, packer.layout, packer.module_shapes)

        page_bytes = 2 * 2 * block_tokens * 2 * 8 * 4  # layers, key and value, tokens, kv heads, head_dim, fp32
        engine = assemble(
            EngineConfig(
                model=ModelConfig(path=str(self.folder)),
                scheduler=SchedulerConfig(**scheduler),
                pool=PoolConfig(pool_bytes=num_pages * page_bytes, block_tokens=block_tokens),
            ),
            read,
        )
        assert engine.info.num_pages == num_pages
        return engine

    def probs(self, now: Moment) -> list[float]:
        with torch.no_grad():
            logits = self.model(torch.tensor([now.tokens])).logits[0, -1]
        return exact_probs(logits.tolist(), now)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    llama = random_llama(folder, seed=3, eos_token_id=sorted(EOS))
    adapters = {
        name: random_adapter(llama, tmp_path_factory.mktemp(name), seed=at, **settings)  # type: ignore[arg-type]
        for at, (name, settings) in enumerate(ADAPTERS.items())
    }
    return Model(folder, llama, adapters)


def requests() -> list[EngineRequest]:
    """Every kind of knob, on the base and on each adapter; prompts of 1 to 50 tokens that begin alike."""
    rng = random.Random(5)
    beginning = rng.choices(range(VOCAB), k=50)
    asked: list[EngineRequest] = []
    for index, knobs in enumerate(KNOBS * 2):
        adapter = (None, *ADAPTERS)[index % 3]
        length = rng.choice((1, 9, 17, 33, 50))
        asked.append(
            EngineRequest(
                request_id=f"r{index}",
                token_ids=(*beginning[: length - 1], rng.randrange(VOCAB)),
                adapter=AdapterUse(digest=adapter) if adapter else None,
                max_tokens=NUM_TOKENS,
                seed=SEEDS[index % len(SEEDS)],
                **knobs,
            )
        )
    return [*asked, replace(asked[11], request_id="twin")]


Tokens = dict[str, list[int]]


def serve(engine: Assembly, groups: Sequence[Sequence[EngineRequest]], joining: random.Random | None = None) -> Tokens:
    """A group is served to its end before the next one; `joining` lets its members come at random moments."""
    tokens: Tokens = {}
    for group in groups:
        pending = list(group)
        while pending or engine.core.has_work():
            coming = len(pending) if joining is None else joining.randint(0, 3)
            for asked in pending[:coming]:
                engine.core.add(asked)
                tokens[asked.request_id] = []
            del pending[:coming]
            let_reads_end(engine.core)
            for delta in engine.core.step():
                assert delta.failure is None, delta.failure
                tokens[delta.request_id] += delta.token_ids
            engine.core.check()
    engine.core.close()
    return tokens


@pytest.fixture(scope="module")
def alone(model: Model) -> Tokens:
    """What every request draws when it has the engine to itself, with no cache."""
    return serve(model.engine(prefix_cache=False), [[asked] for asked in requests()])


def test_the_requests_are_worth_comparing(alone: Tokens) -> None:
    assert alone["twin"] == alone["r11"]
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone) - 1
    assert {len(tokens) for tokens in alone.values()} > {NUM_TOKENS}, "none ended early"


def in_groups(seed: int) -> list[list[EngineRequest]]:
    rng, asked = random.Random(seed), requests()
    rng.shuffle(asked)
    groups: list[list[EngineRequest]] = []
    while asked:
        size = rng.randint(1, 9)
        groups.append(asked[:size])
        del asked[:size]
    return groups


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("step_tokens", [1, 7, 64, 2048])
def test_tokens_are_those_drawn_alone_in_any_batch(
    model: Model, alone: Tokens, step_tokens: int, prefix_cache: bool
) -> None:
    settings = {"max_step_tokens": step_tokens, "max_running": min(step_tokens, 32), "prefix_cache": prefix_cache}
    orders = [in_groups(step_tokens), [requests()], [requests()[::-1]]]
    for groups in orders[:1] if step_tokens == 1 else orders:  # one token a step is one request at a time
        engine = model.engine(**settings)
        assert serve(engine, groups) == alone
        # All at once, each computes its prompt before there is anything to find.
        if len(groups) > 1:
            assert (engine.core.status().counters.cached_prompt_tokens > 0) == prefix_cache


@pytest.mark.parametrize("max_running", [3, 6, 12])
def test_tokens_are_those_drawn_alone_when_others_join_and_leave(model: Model, alone: Tokens, max_running: int) -> None:
    rng = random.Random(max_running)
    engine = model.engine(max_step_tokens=48, max_running=max_running)
    assert serve(engine, [rng.sample(requests(), len(alone))], joining=rng) == alone


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_tokens_are_those_drawn_alone_under_preemption(model: Model, alone: Tokens, prefix_cache: bool) -> None:
    engine = model.engine(num_pages=18, max_step_tokens=64, max_running=16, prefix_cache=prefix_cache)
    assert serve(engine, [requests()]) == alone
    counters = engine.core.status().counters
    assert counters.preemptions > 3 and counters.adapter_evictions > 0, counters


# Settings, and what is to be told from them.
CONTINUED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top_k": ({"top_k": 4, "ignore_eos": True}, {"top_k": 4, "ignore_eos": True, "temperature": 1.3}),
    "all": (
        ALL := {
            "temperature": 2.0,
            "top_k": 6,
            "top_p": 0.9,
            "min_p": 0.05,
            "min_tokens": 3,
            "stop_token_ids": (50,),
            "rules": replace(RULES, frequency_penalty=2.0),
        },
        ALL | {"rules": replace(RULES, frequency_penalty=0.0)},
    ),
}


def sequence_probs(model: Model, now: Moment, num_tokens: int) -> dict[tuple[int, ...], float]:
    """The exact probability of everything that may be generated, from transformers' logits."""
    if len(now.generated) == num_tokens:
        return {now.generated: 1.0}
    return {
        sequence: prob * later
        for token, prob in enumerate(model.probs(now))
        if prob > 0
        for sequence, later in sequence_probs(
            model, replace(now, generated=(*now.generated, token)), num_tokens
        ).items()
    }


@pytest.mark.parametrize(("settings", "near"), CONTINUED.values(), ids=CONTINUED.keys())
def test_generated_sequences_come_as_often_as_they_should(
    model: Model, settings: dict[str, Any], near: dict[str, Any]
) -> None:
    """Three tokens, drawn one after the other: what one draws must say nothing about the next but through the model."""
    asked, wrong = (
        EngineRequest(request_id="r", token_ids=(5, 9, 14), adapter=None, max_tokens=3, seed=0, **knobs)
        for knobs in (settings, near)
    )
    engine = model.engine(num_pages=2000, max_step_tokens=4096, max_running=1000)
    drawn = serve(engine, [[replace(asked, request_id=f"r{seed}", seed=seed) for seed in range(NUM_SEQUENCES)]])
    counts = Counter(tuple(tokens) for tokens in drawn.values())

    def fit(request: EngineRequest) -> float:
        probs = sequence_probs(model, Moment(request=request, generated=(), eos=EOS), 3)
        assert len(probs) > 20
        possible = [*probs, *(counts.keys() - probs.keys())]
        return p_value([counts[each] for each in possible], [probs.get(each, 0.0) for each in possible])

    assert fit(asked) > ACCEPTED
    assert fit(wrong) < REJECTED
