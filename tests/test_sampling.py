"""What a request's own tokens do to its next one, against transformers; the whole engine with every knob on."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from drawing import sample_tokens
from lorasrv.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine import runner
from lorasrv.engine.batch import SampleInput
from lorasrv.engine.build import assemble
from lorasrv.engine.sampling import logit_edits
from lorasrv.types import EngineRequest, FinishReason, LogitRules, PositionLogprobs
from peft_models import random_llama

VOCAB = 101
EOS = frozenset({3, 40})
BAD_WORDS = ((17,), (5, 6), (6, 5), (1, 2, 3, 4), (7, 7, 7))


def request(prompt: Sequence[int] = (1, 2, 3), request_id: str = "r", **settings: Any) -> EngineRequest:
    defaults: dict[str, Any] = {"adapter": None, "max_tokens": 24, "seed": 0, "temperature": 0.0}
    return EngineRequest(request_id=request_id, token_ids=tuple(prompt), **(defaults | settings))


def edited(asked: EngineRequest, tokens: Sequence[int], logits: Tensor) -> Tensor:
    """The logits that the request draws from behind `tokens`."""
    changed = logits.clone().unsqueeze(0)
    edits = logit_edits(asked, list(tokens), EOS)
    params = SampleInput(temperature=0.0, top_p=1.0, top_k=None, seed=0, position=0, edits=edits)
    sample_tokens(changed, [params])
    return changed[0]


def random_sequences(count: int) -> list[tuple[list[int], int]]:
    """Sequences of few distinct tokens, so that they repeat, and how many of each are the prompt."""
    rng = random.Random(4)
    sequences = [rng.choices(range(1, 8), k=rng.randint(1, 30)) for _ in range(count)]
    return [(tokens, rng.randint(1, len(tokens))) for tokens in sequences]


@pytest.mark.parametrize("penalty", [0.6, 1.3, 3.0])
def test_repetition_penalty_bad_words_bias_and_min_tokens_are_transformers(penalty: float) -> None:
    bias = {9: 1.5, 2: -4.0}
    generator = torch.Generator().manual_seed(1)
    bad_words = [list(word) for word in BAD_WORDS]
    changed = 0
    for tokens, num_prompt in random_sequences(200):
        logits = torch.randn(VOCAB, generator=generator) * 3
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(penalty),
                SequenceBiasLogitsProcessor([[[token], amount] for token, amount in bias.items()]),
                NoBadWordsLogitsProcessor(bad_words),
                MinNewTokensLengthLogitsProcessor(num_prompt, 6, sorted(EOS), device="cpu"),
            ]
        )
        want = processors(torch.tensor([tokens]), logits.unsqueeze(0).clone())[0]
        rules = LogitRules(repetition_penalty=penalty, logit_bias=tuple(bias.items()), bad_words=BAD_WORDS)
        got = edited(request(tokens[:num_prompt], rules=rules, min_tokens=6), tokens, logits)
        torch.testing.assert_close(got, want)
        changed += not torch.equal(got.isinf().nonzero(), torch.tensor([[17]]))
    assert changed > 100


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-1.5, 2.0)])
def test_presence_and_frequency_penalty_count_the_output_only(presence: float, frequency: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    for tokens, num_prompt in random_sequences(50):
        counts = Counter(tokens[num_prompt:])
        want = [
            logit - counts[token] * frequency - (counts[token] > 0) * presence
            for token, logit in enumerate(logits.tolist())
        ]
        rules = LogitRules(presence_penalty=presence, frequency_penalty=frequency)
        torch.testing.assert_close(
            edited(request(tokens[:num_prompt], rules=rules), tokens, logits), torch.tensor(want)
        )


def test_a_request_without_rules_asks_for_nothing() -> None:
    assert logit_edits(request(), [1, 2, 3, 4], EOS) is None
    assert logit_edits(request(min_tokens=1), [1, 2, 3, 4], EOS) is None


def test_what_min_tokens_holds_back() -> None:
    def masked(tokens: list[int], **settings: Any) -> set[int]:
        edits = logit_edits(request(min_tokens=2, **settings), tokens, EOS)
        return set(edits.masked) if edits else set()

    assert masked([1, 2, 3, 4]) == EOS
    assert masked([1, 2, 3, 4], stop_token_ids=(8,)) == EOS | {8}
    assert masked([1, 2, 3, 4], stop_token_ids=(8,), ignore_eos=True) == {8}
    assert masked([1, 2, 3, 4, 5], stop_token_ids=(8,)) == set()


# The whole engine


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list[PositionLogprobs])
    finish: FinishReason | None = None


@dataclass(frozen=True)
class Model:
    folder: Path
    model: LlamaForCausalLM

    def logits(self, tokens: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)])).logits[0]

    def serve(
        self, requests: Sequence[EngineRequest], *, num_pages: int = 400, max_running: int = 16, step_tokens: int = 512
    ) -> tuple[dict[str, Answer], int]:
        """All answers, and how often a request was preempted."""
        scheduler = SchedulerConfig(max_step_tokens=step_tokens, max_running=max_running)
        model, block_tokens = ModelConfig(path=str(self.folder)), 4
        page_bytes = 2 * 2 * block_tokens * 2 * 8 * 4  # layers, key and value, tokens, kv heads, head_dim, fp32
        pool = PoolConfig(pool_bytes=num_pages * page_bytes, block_tokens=block_tokens)
        engine = assemble(EngineConfig(model=model, scheduler=scheduler, pool=pool), _no_adapters)
        assert engine.info.num_pages == num_pages
        answers = {each.request_id: Answer() for each in requests}
        for each in requests:
            engine.core.add(each)
        while engine.core.has_work():
            for delta in engine.core.step():
                assert delta.failure is None, delta.failure
                answer = answers[delta.request_id]
                answer.tokens += delta.token_ids
                answer.logprobs += delta.logprobs
                answer.prompt_logprobs += delta.prompt_logprobs
                answer.finish = delta.finish
            engine.core.check()
        preemptions = engine.core.status().counters.preemptions
        engine.core.close()
        return answers, preemptions


def _no_adapters(digest: str, packer: object) -> Any:
    raise AssertionError(f"no adapter {digest}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    return Model(folder=folder, model=random_llama(folder, seed=3, eos_token_id=sorted(EOS)))


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


ALL_RULES = LogitRules(
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    logit_bias=((11, 2.0), (12, -3.0)),
    bad_words=((20,), (21, 22)),
)


def assert_logprobs(model: Model, asked: EngineRequest, answer: Answer) -> None:
    """All of them within 1e-4 of transformers', over prompt and output at once."""
    tokens = [*asked.token_ids, *answer.tokens]
    want = model.logits(tokens).double().log_softmax(-1)
    for start, found, num_top in (
        (1, answer.prompt_logprobs, asked.prompt_logprobs),
        (len(asked.token_ids), answer.logprobs, asked.logprobs),
    ):
        end = len(asked.token_ids) if start == 1 else len(tokens)
        assert [each.token_id for each in found] == ([] if num_top is None else tokens[start:end])
        for position, each in enumerate(found, start):
            assert each.logprob == pytest.approx(want[position - 1, each.token_id].item(), abs=1e-4)
            assert len(each.top) == num_top
            best = want[position - 1].topk(len(each.top)).values.tolist()
            assert [logprob for _, logprob in each.top] == pytest.approx(best, abs=1e-4)
            assert all(want[position - 1, token].item() == pytest.approx(p, abs=1e-4) for token, p in each.top)


@pytest.mark.parametrize("step_tokens", [1, 7, 512])
def test_logprobs_are_transformers_in_any_chunks(
    model: Model, step_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_SCORED_ROWS", 5)
    plain = request(prompt(1, 40), "plain", max_tokens=8, logprobs=3, prompt_logprobs=5)
    ruled = replace(plain, request_id="ruled", temperature=1.3, min_p=0.01, rules=ALL_RULES, logprobs=0)
    silent = request(prompt(2, 20), "silent", max_tokens=4)
    answers, _ = model.serve([plain, silent, ruled], step_tokens=step_tokens, max_running=min(step_tokens, 3))
    for each in (plain, ruled, silent):
        assert_logprobs(model, each, answers[each.request_id])
    assert not answers["silent"].logprobs


def test_logprobs_come_once_and_are_right_under_preemption(model: Model) -> None:
    requests = [request(prompt(i, 30), f"r{i}", max_tokens=30, logprobs=2, prompt_logprobs=1) for i in range(6)]
    answers, preemptions = model.serve(requests, num_pages=24, step_tokens=16)
    assert preemptions > 0
    for each in requests:
        assert_logprobs(model, each, answers[each.request_id])


def greedy(model: Model, asked: EngineRequest, change: Callable[[list[int], list[float]], None]) -> list[int]:
    """Token by token with whole forwards of transformers, `change` applied to plain numbers."""
    tokens = list(asked.token_ids)
    while len(tokens) < len(asked.token_ids) + asked.max_tokens:
        logits = model.logits(tokens)[-1].tolist()
        change(tokens, logits)
        tokens.append(max(range(VOCAB), key=logits.__getitem__))
    return tokens[len(asked.token_ids) :]


def test_greedy_with_penalties_and_bias_by_the_formulas(model: Model) -> None:
    asked = request(prompt(8, 12), rules=ALL_RULES, max_tokens=40, ignore_eos=True)

    def change(tokens: list[int], logits: list[float]) -> None:
        counts = Counter(tokens[12:])
        for token in set(tokens):
            logits[token] = logits[token] / 1.2 if logits[token] > 0 else logits[token] * 1.2
        for token, count in counts.items():
            logits[token] -= 0.5 + 0.3 * count
        logits[11] += 2.0
        logits[12] -= 3.0
        logits[20] = -math.inf
        if tokens[-1] == 21:
            logits[22] = -math.inf

    answers, _ = model.serve([asked, replace(asked, request_id="plain", rules=None)])
    assert answers["r"].tokens == greedy(model, asked, change)
    assert answers["plain"].tokens == greedy(model, asked, lambda tokens, logits: None)
    assert answers["r"].tokens != answers["plain"].tokens


@pytest.mark.parametrize("min_tokens", [0, 12])
def test_greedy_generation_is_transformers(model: Model, min_tokens: int) -> None:
    ids = prompt(21, 10)
    bad_words = ((11,), (30, 31))
    settings: dict[str, Any] = {"min_new_tokens": min_tokens} if min_tokens else {}
    ends = EOS | set(range(50, 101))
    hf: Any = model.model
    out = hf.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.4,
        bad_words_ids=[list(word) for word in bad_words],
        eos_token_id=sorted(ends),
        **settings,
    )
    asked = request(
        ids,
        max_tokens=30,
        min_tokens=min_tokens,
        stop_token_ids=tuple(ends - EOS),
        rules=LogitRules(repetition_penalty=1.4, bad_words=bad_words),
    )
    answer = model.serve([asked])[0]["r"]
    assert answer.tokens == out[0, len(ids) :].tolist()
    assert (len(answer.tokens) > 12) == (min_tokens == 12), "min_tokens made no difference"
    assert answer.finish is (FinishReason.EOS if answer.tokens[-1] in EOS else FinishReason.STOP)
