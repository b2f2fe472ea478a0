"""From what a caller gives for a list of prompts to checked, tokenized requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import index as as_index
from typing import ParamSpec, TypeVar

from tokenizers import Tokenizer

from lorasrv.engine.admission import TokenLimits, check_request, engine_request
from lorasrv.errors import InvalidRequest
from lorasrv.offline.runs import Run
from lorasrv.requests import AdapterRef, GenerationRequest
from lorasrv.types import BASE_ID, AdapterUse, SamplingParams

Prompt = str | Sequence[int]
Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")

_TOKENIZED_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt and how it is to be served, unchecked."""

    prompt: str | tuple[int, ...]
    adapter: str
    scale: float | None
    sampling: SamplingParams


def make_asks(
    prompts: Sequence[Prompt],
    adapter: str | Sequence[str],
    scale: float | Sequence[float | None] | None,
    sampling: SamplingParams | Sequence[SamplingParams] | None,
) -> list[Ask]:
    """What is given once is for every prompt. Raises InvalidRequest where a list has another length than the prompts,
    or what is no prompt is among these.
    """
    num_prompts = len(prompts)
    adapters = [adapter] * num_prompts if isinstance(adapter, str) else _one_each("adapter", adapter, num_prompts)
    scales = _one_each("scale", scale, num_prompts) if isinstance(scale, Sequence) else [scale] * num_prompts
    if sampling is None or isinstance(sampling, SamplingParams):
        samplings: Sequence[SamplingParams] = [sampling or SamplingParams()] * num_prompts
    else:
        samplings = _one_each("sampling", sampling, num_prompts)
    return [
        Ask(prompt=_plain(prompt), adapter=name, scale=factor, sampling=params)
        for prompt, name, factor, params in zip(prompts, adapters, scales, samplings, strict=True)
    ]


class RunMaker:
    """Checks and tokenizes. Stateless but for the number that each request gets."""

    def __init__(self, tokenizer: Tokenizer, limits: TokenLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._numbers = count()

    def make(self, asks: Sequence[Ask], digests: Mapping[str, str], *, streamed: bool = False) -> list[Run]:
        """Requests that can be started; `digests` says what the adapters' names mean. Raises InvalidRequest, with a
        note that says which prompt is meant."""
        refs = [_noted(index, self._check, ask) for index, ask in enumerate(asks)]
        prompts = self._tokenize([ask.prompt for ask in asks])
        return [
            _noted(index, self._run, ask, _use(ref, digests), token_ids, streamed)
            for index, (ask, ref, token_ids) in enumerate(zip(asks, refs, prompts, strict=True))
        ]

    def _check(self, ask: Ask) -> AdapterRef:
        ref = AdapterRef(name=ask.adapter, scale=ask.scale)
        return check_request(GenerationRequest(tenant="", adapters=(ref,), prompt=ask.prompt, sampling=ask.sampling))

    def _run(self, ask: Ask, use: AdapterUse | None, token_ids: tuple[int, ...], streamed: bool) -> Run:
        request = engine_request(
            str(next(self._numbers)), token_ids, adapter=use, sampling=ask.sampling, limits=self._limits
        )
        return Run(request, ask.sampling.stop, self._tokenizer, streamed=streamed)

    def _tokenize(self, prompts: Sequence[str | tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Texts in batches, which the tokenizer spreads over the cores; one alone starts no threads."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) == 1:
            found = iter([tuple(self._tokenizer.encode(texts[0]).ids)])
        else:
            batches = (texts[start : start + _TOKENIZED_AT_ONCE] for start in range(0, len(texts), _TOKENIZED_AT_ONCE))
            found = (tuple(encoding.ids) for batch in batches for encoding in self._tokenizer.encode_batch(batch))
        return [next(found) if isinstance(prompt, str) else prompt for prompt in prompts]


def _one_each(field: str, values: Sequence[Value], num_prompts: int) -> Sequence[Value]:
    if len(values) != num_prompts:
        raise InvalidRequest(field, f"a list of {len(values)} for {num_prompts} prompts")
    return values


def _plain(prompt: Prompt) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    try:
        return tuple(map(as_index, prompt))
    except TypeError:
        raise InvalidRequest("prompt", f"a {type(prompt).__name__} is neither text nor a list of token ids") from None


def _use(ref: AdapterRef, digests: Mapping[str, str]) -> AdapterUse | None:
    if ref.name == BASE_ID:
        return None
    return AdapterUse(digest=digests[ref.name], scale=1.0 if ref.scale is None else ref.scale)


def _noted(index: int, make: Callable[Arguments, Value], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
    try:
        return make(*args, **kwargs)
    except InvalidRequest as error:
        error.add_note(f"This is about prompt number {index}.")
        raise
