"""The offline face, on the sample model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasrv import LLM
from lorasrv.demo.tasks import TASKS, prompt, random_words
from lorasrv.errors import ConfigurationError, InvalidRequest
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
