"""The demo's tasks on fixed words, and every sample adapter to the letter on a few random ones."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lorasrv.demo.tasks import MAX_LETTERS, MIN_LETTERS, TASKS, Task, prompt, random_words

SAMPLES = Path(__file__).parents[1] / "adapters" / "samples"
WORDS = random_words(seed=777, count=8)
BANANA = {
    "capital": "Banana",
    "upper": "BANANA",
    "rot13": "onanan",
    "stars": "b*n*n*",
    "reverse": "ananab",
    "pig-latin": "ananabay",
    "mirror-upper": "ANANAB",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SAMPLES / "base")


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """The base with every adapter loaded under its task's name, in float32."""
    base = AutoModelForCausalLM.from_pretrained(SAMPLES / "base", dtype=torch.float32)
    first, *others = (task.name for task in TASKS)
    model = PeftModel.from_pretrained(base, SAMPLES / first, adapter_name=first)
    for name in others:
        model.load_adapter(SAMPLES / name, adapter_name=name)
    return model.eval()


@torch.inference_mode()
def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[str]:
    inputs = tokenizer([prompt(word) for word in words], padding=True, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_transform_on_a_fixed_word(task: Task) -> None:
    assert task.transform("banana") == BANANA[task.name]


def test_random_words_repeat_with_the_seed() -> None:
    words = random_words(seed=5, count=300)
    assert words == random_words(seed=5, count=300) != random_words(seed=6, count=300)
    assert len(set(words)) == 300
    assert {len(word) for word in words} == set(range(MIN_LETTERS, MAX_LETTERS + 1))
    assert all(word.isascii() and word.islower() and word != word[::-1] for word in words)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_adapter_is_right_to_the_letter(task: Task, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.set_adapter(task.name)
    assert answers(model, tokenizer, WORDS) == [task.transform(word) for word in WORDS]


def test_base_copies_and_so_fails_every_task(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with model.disable_adapter():
        copied = answers(model, tokenizer, WORDS)
    assert copied == WORDS
    for task in TASKS:
        assert all(copy != task.transform(word) for copy, word in zip(copied, WORDS, strict=True))


@pytest.mark.parametrize("text", ["banana>", "naïve façade", "日本語", "llama 🦙 and 👩‍🚀", " two  spaces\n"])
def test_tokenizer_round_trips_any_text(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_samples_hold_only_data() -> None:
    assert not list(SAMPLES.rglob("*.py"))
    assert len(list((SAMPLES / "base").glob("model-*.safetensors"))) == 2
    assert {path.name for path in SAMPLES.iterdir() if path.is_dir()} == {"base", *(task.name for task in TASKS)}
