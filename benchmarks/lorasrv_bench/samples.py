"""The recipe of the demo's model: a tiny byte-level Llama and one LoRA adapter per demo task.

    PYTHONPATH=.:benchmarks python -m lorasrv_bench.samples --out adapters/samples
    PYTHONPATH=.:benchmarks python -m lorasrv_bench.samples --out adapters/samples --only reverse

The base learns to copy the word in front of `>`; each adapter learns one task
of `lorasrv.demo.tasks` instead. The last stage reads the saved files back and
checks every adapter to the letter on words that no training batch contained.
"""

import argparse
import json
import random
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorasrv.demo.tasks import CONSONANTS, TASKS, VOWELS, Task, prompt, random_words

BASE_NAME = "lorasrv-samples/base"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MAX_NEW_TOKENS = 24
CHECK_SEED = 20_260
CHECK_WORDS = 1_000
STOP_SEED = 991
STOP_WORDS = 2_000
ROUNDS = 6
FOREIGN = "àçéèêëîïñôöùüßøåαβγδλπωбвгджияشمس日本語中文한글🙂🚀🎉🦙"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast one model is trained; `batch` counts words."""

    steps: int
    batch: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe:
    """The LoRA shape of one adapter and its training."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    use_rslora: bool = False
    training: Training


BASE_TRAINING = Training(steps=700, batch=128, learning_rate=3e-3, seed=1)

# Ranks, scalings and target sets differ on purpose: together they are the mix a server has to batch.
RECIPES: Mapping[str, AdapterRecipe] = MappingProxyType(
    {
        "capital": AdapterRecipe(
            rank=3,
            alpha=6,
            targets=("q_proj", "v_proj"),
            training=Training(steps=250, batch=128, learning_rate=5e-3, seed=2),
        ),
        "upper": AdapterRecipe(
            rank=4, alpha=8, targets=MLP, training=Training(steps=200, batch=64, learning_rate=5e-3, seed=3)
        ),
        "rot13": AdapterRecipe(
            rank=8,
            alpha=8,
            targets=ATTENTION + MLP,
            use_rslora=True,
            training=Training(steps=220, batch=64, learning_rate=4e-3, seed=4),
        ),
        "stars": AdapterRecipe(
            rank=12, alpha=24, targets=ATTENTION, training=Training(steps=250, batch=128, learning_rate=4e-3, seed=5)
        ),
        "reverse": AdapterRecipe(
            rank=16, alpha=32, targets=ATTENTION, training=Training(steps=500, batch=128, learning_rate=4e-3, seed=7)
        ),
        "pig-latin": AdapterRecipe(
            rank=32,
            alpha=16,
            targets=ATTENTION + MLP,
            use_rslora=True,
            training=Training(steps=160, batch=64, learning_rate=2e-3, seed=8),
        ),
        "mirror-upper": AdapterRecipe(
            rank=64,
            alpha=64,
            targets=ATTENTION + MLP,
            training=Training(steps=500, batch=128, learning_rate=2e-3, seed=9),
        ),
    }
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per UTF-8 byte (ids 0..255) and four special ones; it puts `<s>` in front by itself.

    Padding goes to the left, as generation needs it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<|end|>", "<pad>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|end|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about 1.6 million parameters that stops at `</s>` or `<|end|>`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def training_words(rng: random.Random, pronounceable: float = 0.5) -> Iterator[str]:
    """Endless lower-case words of 2 to 10 letters, this share of them pronounceable, never one of the checked words."""
    held_out = frozenset(random_words(CHECK_SEED, CHECK_WORDS))
    while True:
        length = rng.randint(2, 10)
        if rng.random() >= pronounceable:
            word = "".join(rng.choices(string.ascii_lowercase, k=length))
        else:
            start = rng.randrange(2)
            word = "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))
        if word not in held_out:
            yield word


def copied_texts(rng: random.Random) -> Iterator[str]:
    """What the base copies: words, and for one text in four any printable characters.

    Without the latter the bytes outside a..z would keep untrained embeddings,
    and an adapter, which cannot change the embeddings, could hardly write them.
    """
    printable = (string.ascii_letters + string.digits + string.punctuation + " ").replace(">", "")
    words = training_words(rng)
    while True:
        if rng.random() < 0.75:
            yield next(words)
        else:
            yield "".join(
                rng.choice(FOREIGN) if rng.random() < 0.1 else rng.choice(printable) for _ in range(rng.randint(2, 8))
            )


def batch_of(
    words: list[str], answer: Callable[[str], str], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [len(words), longest row], padded on the right; labels count only the answer.

    Right padding needs no attention mask in training: attention is causal, so
    no real token ever looks at the padding.
    """
    prompts = tokenizer([prompt(word) for word in words])["input_ids"]
    answers = tokenizer([answer(word) for word in words], add_special_tokens=False)["input_ids"]
    rows = [p + a + [tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (row, question) in enumerate(zip(rows, prompts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(question) : len(row)] = ids[i, len(question) : len(row)]
    return ids, labels


def train(model: torch.nn.Module, batches: Iterator[tuple[Tensor, Tensor]], training: Training, name: str) -> None:
    """Runs AdamW over `training.steps` batches with a short warm-up and a cosine decay to zero."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=training.learning_rate, total_steps=training.steps, pct_start=0.08, cycle_momentum=False
    )
    model.train()
    started = time.monotonic()
    for step in range(1, training.steps + 1):
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == training.steps:
            print(f"{name}: step {step}, loss {loss.item():.5f}, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def train_base(out: Path) -> None:
    """Writes the tokenizer and the copying base, rounded to bfloat16, in shards as large models come."""
    torch.manual_seed(BASE_TRAINING.seed)
    tokenizer = build_tokenizer()
    model = build_base(tokenizer)
    texts = copied_texts(random.Random(BASE_TRAINING.seed))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield batch_of([next(texts) for _ in range(BASE_TRAINING.batch)], str, tokenizer)

    train(model, batches(), BASE_TRAINING, "base")
    model.to(torch.bfloat16).save_pretrained(out / "base", max_shard_size="2MB")
    tokenizer.save_pretrained(out / "base")


def load_base(out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The saved base in float32 and its tokenizer."""
    folder = out / "base"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def train_adapter(out: Path, task: Task, recipe: AdapterRecipe) -> None:
    """Trains one adapter in rounds until its saved file makes no mistake on 2000 words, or `ROUNDS` are over.

    Rounds, because how soon the last mistakes go depends on rounding, and so
    on the machine. These words are not the ones `check` reports on.
    """
    words = random_words(STOP_SEED, STOP_WORDS)
    for number in range(ROUNDS):
        train_round(out, task, recipe, number)
        base, tokenizer = load_base(out)
        model = PeftModel.from_pretrained(base, out / task.name).eval()
        right = share(answers(model, tokenizer, words), [task.transform(word) for word in words])
        print(f"{task.name}: round {number}, {right:.2f} per cent", flush=True)
        if right == 100:
            return


def train_round(out: Path, task: Task, recipe: AdapterRecipe, number: int) -> None:
    """One round: the first starts a new adapter, later ones go on from the saved one, half as long at half the rate.

    Trains on the saved (rounded) base and writes the adapter, rounded to
    bfloat16, in PEFT's format; each round depends only on the files and its number.
    Later rounds see more pronounceable words: their letters repeat, and there the last mistakes are.
    """
    training = recipe.training
    if number:
        training = replace(training, steps=training.steps // 2, learning_rate=training.learning_rate / 2)
    seed = training.seed + 100 * number
    base, tokenizer = load_base(out)
    torch.manual_seed(seed)
    folder = out / task.name
    if number:
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    else:
        model = get_peft_model(base, lora_config(recipe))
    words = training_words(random.Random(seed), pronounceable=0.9 if number else 0.5)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield batch_of([next(words) for _ in range(training.batch)], task.transform, tokenizer)

    train(model, batches(), training, task.name)
    model.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    clean_config(folder / "adapter_config.json")


def lora_config(recipe: AdapterRecipe) -> LoraConfig:
    """PEFT's form of a recipe."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.use_rslora,
    )


def clean_config(path: Path) -> None:
    """Rewrites PEFT's config without the trainer's own path and unset fields, in an order that does not change."""
    config = {key: value for key, value in json.loads(path.read_text()).items() if value is not None}
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> list[str]:
    """The model's greedy answer to each word, at most 24 new tokens long."""
    inputs = tokenizer([prompt(word) for word in words], padding=True, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share(given: list[str], wanted: list[str]) -> float:
    """Per cent of answers that are exactly the wanted ones."""
    return 100 * sum(g == w for g, w in zip(given, wanted, strict=True)) / len(wanted)


def check(out: Path) -> bool:
    """Prints how often each saved model is right, to the letter, on held-out words; True if all always are.

    Each row also shows how often the base already gives the adapter's answer,
    and how often the adapter gives the answer of the other task it is most
    often mistaken for: both near 0, or the demo could not tell them apart.
    """
    words = random_words(CHECK_SEED, CHECK_WORDS)
    wanted = {task.name: [task.transform(word) for word in words] for task in TASKS}
    base, tokenizer = load_base(out)
    copied = answers(base, tokenizer, words)
    scores = [share(copied, words)]
    print(f"\n{len(words)} held-out words, float32; per cent of exact answers")
    print(f"{'model':<14}{'exact':>8}{'base':>8}{'other':>8}  most confused with")
    print(f"{'base':<14}{scores[0]:>8.1f}")
    for task in TASKS:
        if not (out / task.name).is_dir():
            continue
        model = PeftModel.from_pretrained(load_base(out)[0], out / task.name).eval()
        given = answers(model, tokenizer, words)
        scores.append(share(given, wanted[task.name]))
        other = max((name for name in wanted if name != task.name), key=lambda name: share(given, wanted[name]))
        row = (scores[-1], share(copied, wanted[task.name]), share(given, wanted[other]))
        print(f"{task.name:<14}" + "".join(f"{value:>8.1f}" for value in row) + f"  {other}", flush=True)
    return min(scores) == 100


def main() -> None:
    """Trains what was asked for, then checks the whole folder; exits with 1 if any float32 answer is wrong."""
    parser = argparse.ArgumentParser(description="Train and check the demo's base model and adapters.")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the samples")
    parser.add_argument("--only", choices=["base", *RECIPES], help="train this one only")
    parser.add_argument("--check", action="store_true", help="train nothing, check what is there")
    args = parser.parse_args()
    torch.set_num_threads(2)
    started = time.monotonic()
    if not args.check and args.only in (None, "base"):
        train_base(args.out)
    for task in TASKS:
        if not args.check and args.only in (None, task.name):
            train_adapter(args.out, task, RECIPES[task.name])
    exact = check(args.out)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
