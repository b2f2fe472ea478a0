"""What PEFT and transformers do with the same requests: static batches of mixed adapters, one model for each adapter,
continuous batching of the base. And the referee, which is PEFT too: float32, one request at a time."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from lorasrv.config import DType
from lorasrv_bench.asks import Ask

Tokens = list[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a peer runs: torch's threads, the weights' type, and how many requests it is given at a time."""

    threads: int
    dtype: DType
    batch: int


class Models:
    """The base and its adapters, as a peer wants them; each is loaded when it is first asked for, and kept."""

    def __init__(self, model: Path, adapters: Sequence[Path]) -> None:
        self._model = model
        self._adapters = tuple(adapters)
        self.base = cache(self._base)
        self.peft = cache(self._peft)
        self.merged = cache(self._merged)

    def _base(self, dtype: DType) -> Any:
        found: Any = AutoModelForCausalLM.from_pretrained(self._model, dtype=getattr(torch, dtype))
        found.generation_config.eos_token_id = None
        return found.eval()

    def _peft(self, dtype: DType) -> Any:
        """All adapters beside one base, in the base's type: PEFT's own choice of float32 for them would be slower."""
        found: Any = None
        with _deprecations_ignored():
            for number, path in enumerate(self._adapters):
                if found is None:
                    base: Any = self._base(dtype)
                    found = PeftModel.from_pretrained(
                        base, str(path), adapter_name=str(number), autocast_adapter_dtype=False
                    )
                else:
                    found.load_adapter(str(path), adapter_name=str(number), autocast_adapter_dtype=False)
        return found.to(getattr(torch, dtype)).eval()

    def _merged(self, dtype: DType, number: int) -> Any:
        """The base with one adapter added to its weights."""
        base: Any = self._base(dtype)
        with _deprecations_ignored():
            found: Any = PeftModel.from_pretrained(base, str(self._adapters[number]), autocast_adapter_dtype=False)
            return found.merge_and_unload().eval()


def mixed_batch(models: Models, settings: Settings, asks: Sequence[Ask]) -> Tokens:
    """PEFT's own way to serve several adapters in a batch."""
    found: Tokens = []
    for batch in _batches(asks, settings.batch):
        names = ["__base__" if ask.adapter is None else str(ask.adapter) for ask in batch]
        found += _generated(models.peft(settings.dtype), batch, adapter_names=names)
    return found


def one_by_one(models: Models, settings: Settings, asks: Sequence[Ask]) -> Tokens:
    """A model for each adapter, merged: of each batch, every adapter's requests in turn."""
    found: dict[int, tuple[int, ...]] = {}
    for batch in _batches(asks, settings.batch):
        for adapter in dict.fromkeys(ask.adapter for ask in batch):
            own = [ask for ask in batch if ask.adapter == adapter]
            model = models.base(settings.dtype) if adapter is None else models.merged(settings.dtype, adapter)
            found |= {ask.index: tokens for ask, tokens in zip(own, _generated(model, own), strict=True)}
    return [found[ask.index] for ask in asks]


def continuous_batching(models: Models, settings: Settings, asks: Sequence[Ask]) -> Tokens:
    """Transformers' own, for the base alone; a batch is how many requests run at a time. Raises RuntimeError."""
    assert all(ask.adapter is None for ask in asks), "it knows no adapters"
    longest = max(len(ask.tokens) + ask.max_tokens for ask in asks)
    config = ContinuousBatchingConfig(
        page_size=16,
        num_blocks=settings.batch * (-(-longest // 16) + 1),
        max_batch_tokens=512,
        max_requests_per_batch=settings.batch,
    )
    told = models.base(settings.dtype).generate_batch(
        [list(ask.tokens) for ask in asks],
        generation_config=GenerationConfig(
            max_new_tokens=max(ask.max_tokens for ask in asks), do_sample=False, eos_token_id=-1
        ),
        continuous_batching_config=config,
        warmup=False,
    )
    if len(told) != len(asks):
        raise RuntimeError(f"continuous batching answered {len(told)} of {len(asks)} requests")
    return [tuple(each.generated_tokens) for each in told.values()]


Answer = Callable[[Models, Settings, Sequence[Ask]], Tokens]
PEERS: Mapping[str, Answer] = MappingProxyType(
    {
        "PEFT mixed batch": mixed_batch,
        "one model per adapter": one_by_one,
        "transformers continuous batching": continuous_batching,
    }
)


def answered(answer: Answer, models: Models, settings: Settings, asks: Sequence[Ask]) -> Tokens:
    """Under the settings' number of threads, which is put back. No gradients."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with torch.inference_mode():
            return answer(models, settings, asks)
    finally:
        torch.set_num_threads(before)


class Referee:
    """What is right: PEFT in float32, each request alone."""

    def __init__(self, models: Models) -> None:
        self._model = models.peft("float32")

    def greedy(self, ask: Ask) -> tuple[int, ...]:
        with self._as_asked(ask) as model, torch.inference_mode():
            return _generated(model, [ask])[0]

    def gaps(self, ask: Ask, token_ids: Sequence[int]) -> list[float]:
        """For each token of an answer, how much less likely it is than the best one in its place, in nats."""
        row = torch.tensor([[*ask.tokens, *token_ids[:-1]]])
        with self._as_asked(ask) as model, torch.inference_mode():
            logits = model(input_ids=row).logits[0, len(ask.tokens) - 1 :].float()  # [num_tokens, vocab_size]
        own = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        return (logits.max(dim=1).values - own).tolist()

    @contextmanager
    def _as_asked(self, ask: Ask) -> Iterator[Any]:
        if ask.adapter is not None:
            self._model.set_adapter(str(ask.adapter))
        with self._model.disable_adapter() if ask.adapter is None else nullcontext():
            yield self._model


def best_settings(answer: Answer, models: Models, asks: Sequence[Ask], batch: int) -> tuple[Settings, dict[str, float]]:
    """The fastest of a small search, and every try's tokens/s: threads, type and batch are varied in turn, the best
    kept. Batches are of at most `batch`, which is how many requests there are at a time."""
    best = Settings(threads=torch.get_num_threads(), dtype="bfloat16", batch=batch)
    tried: dict[Settings, float] = {}

    def attempt(settings: Settings) -> float:
        if settings not in tried:
            answered(answer, models, settings, [replace(ask, max_tokens=1) for ask in asks])  # loads, packs
            begun_s = time.perf_counter()
            found = answered(answer, models, settings, asks)
            tried[settings] = sum(map(len, found)) / (time.perf_counter() - begun_s)
        return tried[settings]

    attempt(best)
    for change in ({"threads": 1}, {"dtype": "float32"}, {"batch": batch // 2}):
        changed = replace(best, **change)
        if attempt(changed) > attempt(best):
            best = changed
    told = {f"{each.dtype}, {each.threads} threads, batch {each.batch}": rate for each, rate in tried.items()}
    return best, told


def _batches(asks: Sequence[Ask], size: int) -> Iterator[Sequence[Ask]]:
    for first in range(0, len(asks), size):
        yield asks[first : first + size]


def _generated(model: Any, asks: Sequence[Ask], **values: Any) -> Tokens:
    """Requests of one length, so that nothing is padded."""
    rows = torch.tensor([ask.tokens for ask in asks])
    with _deprecations_ignored():
        told = model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=asks[0].max_tokens,
            do_sample=False,
            pad_token_id=0,
            **values,
        )
    return [tuple(row) for row in told[:, rows.shape[1] :].tolist()]


@contextmanager
def _deprecations_ignored() -> Iterator[None]:
    """PEFT reads an attribute that this transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield
