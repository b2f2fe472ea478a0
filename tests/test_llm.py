"""The offline face, on the sample model."""

import asyncio
import gc
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorasrv import LLM
from lorasrv.config import SchedulerConfig
from lorasrv.demo.tasks import TASKS, prompt, random_words
from lorasrv.errors import ConfigurationError, EngineUnavailable, InvalidRequest
from lorasrv.llm import Generation
from lorasrv.offline.interrupts import interrupts_deferred
from lorasrv.types import FinishReason, SamplingParams, TokenDelta
from lorasrv_adapters.errors import ContentRefused

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
GREEDY = SamplingParams(temperature=0, max_tokens=32)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(SAMPLES / "base") as llm:
        for task in TASKS:
            llm.add_adapter(task.name, SAMPLES / task.name)
        yield llm
        assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    llm.check()
    status = llm.status()
    assert (status.running, status.waiting, status.pins, status.pool.sequences) == (0, 0, 0, 0)


def test_adapters_side_by_side(llm: LLM) -> None:
    words = random_words(5, len(TASKS))
    outputs = llm.generate([prompt(word) for word in words], adapter=[task.name for task in TASKS], sampling=GREEDY)
    assert [output.text for output in outputs] == [
        task.transform(word) for task, word in zip(TASKS, words, strict=True)
    ]
    assert all(output.finish is FinishReason.EOS for output in outputs)
    assert_idle(llm)


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
    before = llm.status().counters.finished_requests
    stopped = llm.generate(["banana>"], sampling=SamplingParams(temperature=0, stop=("an",)))[0]
    assert (stopped.text, stopped.finish, stopped.stop) == ("b", FinishReason.STOP, "an")
    cut = llm.generate(["banana>"], sampling=SamplingParams(temperature=0, max_tokens=3))[0]
    assert (cut.text, cut.finish) == ("ban", FinishReason.LENGTH)
    assert llm.status().pool.sequences == 0
    assert llm.status().counters.finished_requests == before + 2


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
    with pytest.raises(InvalidRequest, match="list of 1") as refused:
        llm.generate(["a>", "b>"], sampling=[GREEDY])
    with pytest.raises(InvalidRequest, match="scale"):
        llm.generate(["a>", "b>"], scale=[1.0, 2.0, 3.0])
    with pytest.raises(InvalidRequest, match="int is neither"):
        llm.generate([3, 4], sampling=GREEDY)
    with pytest.raises(InvalidRequest, match="is empty") as refused:
        llm.generate(["a>", "b>", ""], sampling=GREEDY)
    assert refused.value.__notes__ == ["This is about prompt number 2."]
    with pytest.raises(InvalidRequest, match="nobody"):
        llm.stream("a>", adapter="nobody")
    assert llm.status().counters.steps == steps


def test_each_prompt_has_its_own_settings(llm: LLM) -> None:
    outputs = llm.generate(
        ["banana>", "banana>", "banana>"],
        adapter=["upper", "upper", "reverse"],
        scale=[None, 0.0, 1.0],
        sampling=[GREEDY, GREEDY, SamplingParams(temperature=0, max_tokens=2)],
    )
    assert [output.text for output in outputs] == ["BANANA", "banana", "an"]
    assert [output.text for output in llm.generate("banana>", adapter="upper", sampling=GREEDY)] == ["BANANA"]
    assert llm.generate([], sampling=GREEDY) == []


def test_more_prompts_than_run_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = random_words(7, 60)
    adapters = [TASKS[index % 3].name for index in range(len(words))]
    with LLM(SAMPLES / "base", scheduler=SchedulerConfig(max_running=8, lookahead=4, max_waiting=6)) as llm:
        for task in TASKS[:3]:
            llm.add_adapter(task.name, SAMPLES / task.name)
        outputs = llm.generate([prompt(word) for word in words], adapter=adapters, sampling=GREEDY, progress=True)
        assert_idle(llm)
    assert [output.text for output in outputs] == [TASKS[i % 3].transform(word) for i, word in enumerate(words)]
    shown = capsys.readouterr().err
    assert "60/60" in shown and "tokens/s" in shown


def test_streams_run_side_by_side(llm: LLM) -> None:
    words = random_words(8, len(TASKS))
    streams = [
        llm.stream(prompt(word), adapter=task.name, sampling=GREEDY) for task, word in zip(TASKS, words, strict=True)
    ]
    texts, open_streams = [""] * len(streams), set(range(len(streams)))
    while open_streams:
        for index in sorted(open_streams):
            delta = next(streams[index], None)
            if delta is None:
                open_streams.remove(index)
            else:
                texts[index] += delta.text
    assert texts == [task.transform(word) for task, word in zip(TASKS, words, strict=True)]
    assert [stream.result().text for stream in streams] == texts
    assert_idle(llm)


def test_a_stream_says_the_same_as_generate(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=24, stop=("z",), logprobs=1, prompt_logprobs=0)
    (output,) = llm.generate(["banana>"], adapter="rot13", sampling=params)
    stream = llm.stream("banana>", adapter="rot13", sampling=params)
    deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == output.text
    assert tuple(token for delta in deltas for token in delta.token_ids) == output.token_ids
    assert tuple(each for delta in deltas for each in delta.logprobs) == output.logprobs
    assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + [output.finish]
    assert stream.result() == output


def test_a_stream_given_up_gives_everything_back(llm: LLM) -> None:
    forever = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    with llm.stream("banana>", adapter="upper", sampling=forever) as stream:
        next(stream)
        assert llm.status().running == 1
    assert_idle(llm)
    assert (list(stream), "closed" in repr(stream)) == ([], True)
    with pytest.raises(InvalidRequest, match="closed"):
        stream.result()
    stream = llm.stream("banana>", adapter="upper", sampling=forever)
    next(stream)
    del stream
    assert_idle(llm)
    cycle: list[object] = [llm.stream("banana>", adapter="upper", sampling=forever)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert_idle(llm)


class Interrupted:
    """Sends SIGINT in the middle of a core's step, as Ctrl-C would."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        core = llm._driver._core
        self._step = core.step
        self._left = step
        self.ended = 0
        monkeypatch.setattr(core, "step", self.step)

    def step(self) -> tuple[TokenDelta, ...]:
        self._left -= 1
        if not self._left:
            signal.raise_signal(signal.SIGINT)
        deltas = self._step()
        self.ended += 1
        return deltas


@pytest.mark.parametrize("step", [1, 2, 6])
def test_ctrl_c_ends_a_call_between_two_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    words = random_words(9, 6)
    with llm.stream("banana>", adapter="reverse", sampling=GREEDY) as stream:
        with monkeypatch.context() as patch:
            interrupted = Interrupted(llm, patch, step)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([prompt(word) for word in words], adapter="upper", sampling=GREEDY)
            assert interrupted.ended == step
        llm.check()
        assert (llm.status().running, llm.status().waiting) == (1, 0)
        assert stream.result().text == "ananab"
    assert llm.generate(["banana>"], adapter="upper", sampling=GREEDY)[0].text == "BANANA"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_are_left_alone_where_they_do_nothing() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_deferred():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

    def in_a_thread() -> object:
        with interrupts_deferred():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(in_a_thread).result() is before


def test_threads_share_one_batch(llm: LLM) -> None:
    words = random_words(10, 12)

    def call(index: int) -> list[str]:
        task = TASKS[index % len(TASKS)]
        outputs = llm.generate([prompt(word) for word in words], adapter=task.name, sampling=GREEDY)
        assert [output.text for output in outputs] == [task.transform(word) for word in words]
        return [delta.text for delta in llm.stream(prompt(words[0]), adapter=task.name, sampling=GREEDY)]

    with ThreadPoolExecutor(4) as threads:
        for index, texts in enumerate(threads.map(call, range(8))):
            assert "".join(texts) == TASKS[index % len(TASKS)].transform(words[0])
    assert_idle(llm)


async def test_works_where_a_loop_runs(llm: LLM) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    assert llm.generate(["banana>"], adapter="upper", sampling=GREEDY)[0].text == "BANANA"
    await asyncio.sleep(0.01)
    assert ticks > 1
    task.cancel()


def test_after_close_calls_say_so() -> None:
    llm = LLM(SAMPLES / "base")
    stream = llm.stream("banana>", sampling=GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate(["a>"]), lambda: next(stream), llm.status, lambda: llm.remove_adapter("upper")):
        with pytest.raises(EngineUnavailable, match="closed"):
            call()
    stream.close()


def test_a_failure_of_the_engine_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> tuple[TokenDelta, ...]:
        raise MemoryError("no more")

    with LLM(SAMPLES / "base") as llm:
        monkeypatch.setattr(llm._driver._core, "step", step)
        with pytest.raises(MemoryError):
            llm.generate(["a>"])
        with pytest.raises(EngineUnavailable, match="MemoryError: no more"):
            llm.generate(["a>"])


def test_an_unclosed_one_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    llm = LLM(SAMPLES / "base")
    llm.add_adapter("upper", SAMPLES / "upper")
    assert llm.generate(["banana>"], adapter="upper", sampling=GREEDY)[0].text == "BANANA"
    assert set(threading.enumerate()) > before
    gc.disable()  # it holds no cycle: with the last name all goes
    try:
        del llm
        until = time.monotonic() + 10.0
        while set(threading.enumerate()) > before and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        gc.enable()
    assert set(threading.enumerate()) <= before


def test_what_a_notebook_shows(llm: LLM) -> None:
    assert repr(llm) == "LLM('base', float32 on cpu, 7 adapters)"
    (output,) = llm.generate(["banana>"], adapter="upper", sampling=GREEDY)
    assert repr(output) == f"Generation('BANANA', eos, {len(output.token_ids)} tokens)"
    stream = llm.stream("banana>", adapter="upper", sampling=GREEDY)
    next(stream)
    assert repr(stream) == "Stream('B', running)"
    stream.result()
    assert repr(stream) == "Stream('BANANA', ended)"


CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content | lower }}{% endfor %}>"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The sample model with a template that asks for what all messages say together."""
    folder = tmp_path_factory.mktemp("chatty")
    for file in (SAMPLES / "base").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    upper = folder / "upper"
    shutil.copytree(SAMPLES / "upper", upper)
    (upper / "serving.json").write_text(
        json.dumps({"sampling": {"temperature": 0, "max_tokens": 5}, "system_prompt": "pre"})
    )
    with LLM(folder) as llm:
        llm.add_adapter("upper", upper)
        llm.add_adapter("reverse", SAMPLES / "reverse")
        yield llm


def says(*contents: str, first_role: str = "user") -> list[dict[str, str]]:
    return [{"role": "user" if i else first_role, "content": content} for i, content in enumerate(contents)]


def test_chats_follow_the_template_and_the_versions_defaults(chatty: LLM) -> None:
    (output,) = chatty.chat(says("BAN", "ana"), adapter="reverse", sampling=GREEDY)
    assert output.text == "ananab"
    outputs = chatty.chat(
        [says("banana"), says("fix", "banana", first_role="system"), says("abba")],
        adapter=["upper", "upper", "reverse"],
        sampling=[SamplingParams(), SamplingParams(), GREEDY],
    )
    assert [output.text for output in outputs] == ["PREBA", "FIXBA", "abba"]
    assert chatty.chat([]) == []
    deltas = list(chatty.stream(says("banana"), adapter="upper"))
    assert "".join(delta.text for delta in deltas) == "PREBA"


def test_what_is_no_conversation_is_refused(chatty: LLM, llm: LLM) -> None:
    for conversation, match in (
        ([{"role": "user"}], "role and content"),
        ([{"role": "user", "content": "a", "name": "b"}], "nothing else"),
        ([{"role": "user", "content": [{"type": "text"}]}], "is a list, not text"),
        ("banana", "not a dict"),
        ([[]], "at least one message"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            chatty.chat(conversation)
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat(says("banana"))
