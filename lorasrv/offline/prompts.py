"""From what a caller gives for a list of prompts to checked, tokenized requests."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import index as as_index
from typing import ParamSpec, TypeGuard, TypeVar, cast

from tokenizers import Tokenizer

from lorasrv.engine.admission import TokenLimits, check_request, engine_request
from lorasrv.engine.chat import ChatTemplate
from lorasrv.engine.defaults import VersionDefaults
from lorasrv.engine.prompts import read_prompt
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.errors import InvalidRequest
from lorasrv.offline.runs import Run
from lorasrv.offline.versions import Version
from lorasrv.requests import AdapterRef, Chat, ChatMessage, GenerationRequest
from lorasrv.types import AdapterUse, SamplingParams

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, str]]
Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")

_TOKENIZED_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt and how it is to be served, unchecked."""

    prompt: str | tuple[int, ...] | Chat
    adapter: str
    scale: float | None
    sampling: SamplingParams


def make_asks(
    prompts: Sequence[Prompt | Conversation | Chat],
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


def is_conversation(given: object) -> TypeGuard[Conversation]:
    return isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Mapping)


def as_chat(messages: Conversation) -> Chat:
    """A conversation as transformers takes it: messages with `role` and `content`. Raises InvalidRequest."""
    return Chat(messages=tuple(_message(number, message) for number, message in enumerate(messages)))


class RunMaker:
    """Checks and tokenizes. Stateless but for the number that each request gets."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, limits: TokenLimits) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._template = template
        self._limits = limits
        self._numbers = count()

    def make(self, asks: Sequence[Ask], versions: Mapping[str, Version], *, streamed: bool = False) -> list[Run]:
        """Requests that can be started; `versions` says what the adapters' names mean. Raises InvalidRequest, with a
        note that says which prompt is meant."""
        for index, ask in enumerate(asks):
            _noted(index, self._check, ask)
        texts = self._tokenize([ask.prompt for ask in asks if isinstance(ask.prompt, str)])
        return [
            _noted(index, self._run, ask, versions.get(ask.adapter), texts, streamed) for index, ask in enumerate(asks)
        ]

    def _check(self, ask: Ask) -> None:
        ref = AdapterRef(name=ask.adapter, scale=ask.scale)
        check_request(GenerationRequest(tenant="", adapters=(ref,), prompt=ask.prompt, sampling=ask.sampling))

    def _run(self, ask: Ask, version: Version | None, texts: Iterator[tuple[int, ...]], streamed: bool) -> Run:
        defaults = VersionDefaults() if version is None else version.defaults
        match ask.prompt:
            case str():
                token_ids = next(texts)
            case Chat():
                token_ids = read_prompt(ask.prompt, self._tokenizer, self._template, defaults.system_prompt).token_ids
            case _:
                token_ids = ask.prompt
        scale = 1.0 if ask.scale is None else ask.scale
        request = engine_request(
            str(next(self._numbers)),
            token_ids,
            adapter=None if version is None else AdapterUse(digest=version.digest, scale=scale),
            sampling=ask.sampling,
            limits=self._limits,
            defaults=defaults.sampling,
        )
        return Run(request, ask.sampling.over(defaults.sampling).stop, self._vocabulary, streamed=streamed)

    def _tokenize(self, texts: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """In batches, which the tokenizer spreads over the cores; one alone starts no threads."""
        if len(texts) == 1:
            yield tuple(self._tokenizer.encode(texts[0]).ids)
            return
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            for encoding in self._tokenizer.encode_batch(list(texts[start : start + _TOKENIZED_AT_ONCE])):
                yield tuple(encoding.ids)


def _one_each(field: str, values: Sequence[Value], num_prompts: int) -> Sequence[Value]:
    if len(values) != num_prompts:
        raise InvalidRequest(field, f"a list of {len(values)} for {num_prompts} prompts")
    return values


def _plain(prompt: Prompt | Conversation | Chat) -> str | tuple[int, ...] | Chat:
    if isinstance(prompt, str | Chat):
        return prompt
    if is_conversation(prompt):
        return as_chat(prompt)
    try:
        return tuple(map(as_index, cast(Sequence[int], prompt)))
    except TypeError:
        raise InvalidRequest("prompt", f"a {type(prompt).__name__} is neither text nor a list of token ids") from None


def _message(number: int, message: Mapping[str, str]) -> ChatMessage:
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        raise InvalidRequest(f"messages[{number}]", "is not a dict of role and content, and of nothing else")
    for key, value in message.items():
        if not isinstance(value, str):
            raise InvalidRequest(f"messages[{number}].{key}", f"is a {type(value).__name__}, not text")
    return ChatMessage(role=message["role"], content=message["content"])


def _noted(index: int, make: Callable[Arguments, Value], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
    try:
        return make(*args, **kwargs)
    except InvalidRequest as error:
        error.add_note(f"This is about prompt number {index}.")
        raise
