"""The offline face, on the sample model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasrv import LLM
from lorasrv.demo.tasks import TASKS, prompt, random_words
from lorasrv.errors import ConfigurationError, InvalidRequest
from lorasrv.llm import Generation
from lorasrv.types import FinishReason, SamplingParams
from lorasrv_adapters.errors import ContentRefused

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
GREEDY = SamplingParams(temperature=0, max_tokens=32)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(SAMPLES / "base") as llm:
        for task in TASKS:
            llm.add_adapter(task.name, SAMPLES / task.name)
        yield llm


def test_adapters_side_by_side(llm: LLM) -> None:
    words = random_words(5, len(TASKS))
    outputs = llm.generate([prompt(word) for word in words], adapter=[task.name for task in TASKS], sampling=GREEDY)
    assert [output.text for output in outputs] == [
        task.transform(word) for task, word in zip(TASKS, words, strict=True)
    ]
    assert all(output.finish is FinishReason.EOS for output in outputs)
    status = llm.status()
    assert (status.pins, status.pool.sequences, status.running) == (0, 0, 0)


def test_bfloat16_is_right_to_the_letter() -> None:
    words = random_words(6, 2 * len(TASKS))
    tasks = TASKS * 2
    with LLM(SAMPLES / "base", dtype="bfloat16") as llm:
        for task in TASKS:
            llm.add_adapter(task.name, SAMPLES / task.name)
        outputs = llm.generate([prompt(word) for word in words], adapter=[task.name for task in tasks], sampling=GREEDY)
    assert [output.text for output in outputs] == [
        task.transform(word) for task, word in zip(tasks, words, strict=True)
    ]


def test_each_of_several_eos_ids_ends_a_generation(llm: LLM, tmp_path: Path) -> None:
    token_id = llm.generate(["banana>"], sampling=GREEDY)[0].token_ids[2]
    for file in (SAMPLES / "base").iterdir():
        (tmp_path / file.name).symlink_to(file)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    for eos_ids in ([*generation["eos_token_id"], token_id], [token_id, *generation["eos_token_id"]]):
        (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": eos_ids}))
        with LLM(tmp_path) as other:
            early, late = other.generate(["banana>", "abba>"], sampling=GREEDY)
        assert (early.text, early.finish, early.token_ids[-1]) == ("ba", FinishReason.EOS, token_id)
        assert (late.text, late.finish) == ("abba", FinishReason.EOS)


def test_scale_zero_is_the_base(llm: LLM) -> None:
    assert llm.generate(["banana>"], adapter="upper", scale=0.0, sampling=GREEDY)[0].text == "banana"


def test_stop_string_and_length(llm: LLM) -> None:
    stopped = llm.generate(["banana>"], sampling=SamplingParams(temperature=0, stop=("an",)))[0]
    assert (stopped.text, stopped.finish, stopped.stop) == ("b", FinishReason.STOP, "an")
    cut = llm.generate(["banana>"], sampling=SamplingParams(temperature=0, max_tokens=3))[0]
    assert (cut.text, cut.finish) == ("ban", FinishReason.LENGTH)
    assert llm.status().pool.sequences == 0


def test_seed_repeats_whatever_else_runs(llm: LLM) -> None:
    params = SamplingParams(temperature=2.0, seed=17, max_tokens=24)
    alone = llm.generate(["banana>"], adapter="reverse", sampling=params)[0]
    among = llm.generate(["apple>", "pear>", "banana>"], adapter=["upper", "base", "reverse"], sampling=params)[2]
    assert among.token_ids == alone.token_ids and among.seed == 17
    other = llm.generate(
        ["banana>"], adapter="reverse", sampling=SamplingParams(temperature=2.0, seed=18, max_tokens=24)
    )
    assert other[0].token_ids != alone.token_ids


def test_logprobs_of_prompt_and_output(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=32, logprobs=2, prompt_logprobs=0)
    output = llm.generate(["banana>"], adapter="upper", sampling=params)[0]
    plain = llm.generate(["banana>"], adapter="upper", sampling=GREEDY)[0]
    assert output.logprobs is not None and output.prompt_logprobs is not None
    assert output.token_ids == plain.token_ids == tuple(each.token_id for each in output.logprobs)
    assert all(each.top[0] == (each.token_id, each.logprob) and len(each.top) == 2 for each in output.logprobs)
    assert sum(each.logprob for each in output.logprobs) > -0.1  # it was trained to be sure
    assert len(output.prompt_logprobs) == output.prompt_tokens - 1
    assert (plain.logprobs, plain.prompt_logprobs) == (None, None)


def test_ends_and_bans(llm: LLM) -> None:
    b, a, n = (llm.generate([f"{letter}>"], sampling=GREEDY)[0].token_ids[0] for letter in "ban")

    def output(**knobs: Any) -> Generation:
        return llm.generate(["banana>"], sampling=SamplingParams(temperature=0, **knobs))[0]

    stopped = output(stop_token_ids=(n,))
    assert (stopped.text, stopped.finish, stopped.stop, stopped.token_ids) == ("ba", FinishReason.STOP, n, (b, a, n))
    assert "ana" not in output(bad_words=((a, n, a),), max_tokens=12).text
    assert "b" not in output(logit_bias={b: -100.0}, max_tokens=12).text
    assert output(ignore_eos=True, max_tokens=12).finish is FinishReason.LENGTH
    assert len(output(min_tokens=10, max_tokens=12).token_ids) > 10
    held = output(stop=("a",), min_tokens=4)
    assert (held.text, held.stop) == ("banan", "a")
    with pytest.raises(InvalidRequest, match="min_tokens"):
        output(min_tokens=13, max_tokens=12)


def test_a_name_can_be_given_anew_and_taken_away(llm: LLM) -> None:
    llm.add_adapter("mine", SAMPLES / "upper")
    llm.add_adapter("mine", SAMPLES / "reverse")
    assert llm.generate(["banana>"], adapter="mine", sampling=GREEDY)[0].text == "ananab"
    llm.remove_adapter("mine")
    with pytest.raises(InvalidRequest, match="mine"):
        llm.generate(["banana>"], adapter="mine", sampling=GREEDY)


def test_a_tokenizer_that_truncates_is_told_not_to(tmp_path: Path) -> None:
    for file in (SAMPLES / "base").iterdir():
        (tmp_path / file.name).symlink_to(file)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings | {"truncation": truncation}))
    with LLM(tmp_path) as llm:
        assert llm.generate(["banana>"], sampling=GREEDY)[0].text == "banana"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        LLM(tmp_path)


def test_a_top_k_beyond_any_vocabulary_keeps_all(llm: LLM) -> None:
    outputs = [
        llm.generate(["banana>"], sampling=SamplingParams(temperature=2.0, seed=3, top_k=top_k, max_tokens=8))[0]
        for top_k in (None, 2**80)
    ]
    assert outputs[0].token_ids == outputs[1].token_ids


def test_bad_calls_are_refused_before_anything_runs(llm: LLM, tmp_path: Path) -> None:
    steps = llm.status().counters.steps
    with pytest.raises(InvalidRequest, match="nobody"):
        llm.generate(["a>", "b>"], adapter=["base", "nobody"], sampling=GREEDY)
    with pytest.raises(InvalidRequest, match="2 prompts"):
        llm.generate(["a>", "b>"], adapter=["base"], sampling=GREEDY)
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate(["a>"], sampling=SamplingParams(temperature=float("nan")))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.generate([[10**6]], sampling=GREEDY)
    with pytest.raises(InvalidRequest, match="base"):
        llm.add_adapter("base", SAMPLES / "upper")
    with pytest.raises(ContentRefused):
        llm.add_adapter("empty", tmp_path)
    assert llm.status().counters.steps == steps
