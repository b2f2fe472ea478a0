"""What an adapter version says about its own generations: the content of its serving.json.

    {"sampling": {"temperature": 0, "stop": ["\\n"]}, "system_prompt": "Answer in French."}

`sampling` holds fields of the wire's SamplingParams under the limits that requests meet; the system prompt is for chats
that bring none. A request's own field comes first, then the version's default, then the system's.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lorasrv.config import EngineConfig
from lorasrv.engine.admission import check_sampling, check_vocabulary
from lorasrv.engine.chat import ChatTemplate, load_chat_template
from lorasrv.engine.fitting import page_check
from lorasrv.errors import InvalidRequest
from lorasrv.model.families import read_architecture
from lorasrv.requests import Chat, ChatMessage
from lorasrv.types import SamplingParams
from lorasrv_adapters.errors import ContentError, ContentRefused, InvalidAdapter, listing, quote
from lorasrv_adapters.manifest import SERVING_FILE
from lorasrv_adapters.peft_format import AdapterSpec, SpecCheck


@dataclass(frozen=True, kw_only=True)
class VersionDefaults:
    """What holds where a request says nothing."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    system_prompt: str | None = None


def read_defaults(serving: str | None) -> VersionDefaults:
    """The defaults in a version's JSON object; without one there are none. Raises ContentRefused with every reason."""
    if serving is None:
        return VersionDefaults()
    reader = _Reader()
    fields = reader.read_fields("", json.loads(serving), {"sampling": _as_object, "system_prompt": _as_text})
    sampling = reader.read_fields("sampling.", fields.pop("sampling", {}), _SAMPLING_FIELDS)
    if reader.errors:
        raise ContentRefused(reader.errors)
    return VersionDefaults(sampling=SamplingParams(**sampling), **fields)


def adapter_check(config: EngineConfig) -> SpecCheck:
    """All that a server asks of an adapter beyond what its base model asks: that a page of the pool can hold its tile
    directory, and that requests could ask for its defaults. Raises ConfigurationError.
    """
    fits = page_check(config)
    vocab_size = read_architecture(config.model.path).vocab_size
    template = load_chat_template(Path(config.model.path))

    def check(spec: AdapterSpec) -> list[ContentError]:
        try:
            defaults = read_defaults(spec.serving)
        except ContentRefused as refused:
            return [*fits(spec), *refused.errors]
        refusals = [*_sampling_refusals(defaults.sampling, vocab_size), *_prompt_refusals(defaults, template)]
        return [*fits(spec), *(InvalidAdapter(f"{SERVING_FILE}: {reason}") for reason in refusals)]

    return check


def _sampling_refusals(sampling: SamplingParams, vocab_size: int) -> Iterator[str]:
    """What a request would be refused for, field by field."""
    for name, value in sampling.given().items():
        alone = SamplingParams(**{name: value})
        try:
            check_sampling(alone)
            check_vocabulary(alone, vocab_size)
        except InvalidRequest as error:
            yield str(error)
    low, high = sampling.min_tokens, sampling.max_tokens
    if low is not None and high is not None and low > high:
        yield f"sampling.min_tokens: {low} is above max_tokens {high}"


def _prompt_refusals(defaults: VersionDefaults, template: ChatTemplate | None) -> Iterator[str]:
    """Not every template takes a system message; where it does not, every chat would fail."""
    if defaults.system_prompt == "":
        yield "system_prompt is empty; leave it out"
    elif defaults.system_prompt is not None and template is not None:
        chat = Chat(messages=(ChatMessage(role="user", content="Hello"),))
        try:
            template.render(chat.with_system(defaults.system_prompt))
        except InvalidRequest as error:
            yield f"system_prompt: {error}"


class _Reader:
    """Reads objects by an allow-list of fields and collects what is wrong in them."""

    def __init__(self) -> None:
        self.errors: list[ContentError] = []

    def read_fields(
        self, prefix: str, values: Mapping[str, Any], fields: Mapping[str, Callable[[Any], Any]]
    ) -> dict[str, Any]:
        unknown = [f"{prefix}{name}" for name in values if name not in fields]
        if unknown:
            self.errors.append(InvalidAdapter(f"{SERVING_FILE}: fields that it cannot have: {listing(unknown)}"))
        found: dict[str, Any] = {}
        for name in [name for name in fields if name in values]:
            try:
                found[name] = fields[name](values[name])
            except _Mistaken as wanted:
                self.errors.append(
                    InvalidAdapter(f"{SERVING_FILE}: {prefix}{name}: {quote(values[name])} is not {wanted}")
                )
        return found


class _Mistaken(Exception):
    """What a value should have been."""


def _as_number(value: Any) -> float:
    if type(value) is not float and (type(value) is not int or abs(value) > 1 << 32):
        raise _Mistaken("a number")
    return float(value)


def _as_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise _Mistaken("an integer from 0 to 2^32 - 1")
    return value


def _as_flag(value: Any) -> bool:
    if type(value) is not bool:
        raise _Mistaken("true or false")
    return value


def _as_text(value: Any) -> str:
    # JSON may escape halves of surrogate pairs, which are no characters.
    if not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value):
        raise _Mistaken("a text")
    return value


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Mistaken("an object")
    return cast(dict[str, Any], value)


def _as_list(item: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Mistaken("a list")
        return tuple(item(each) for each in cast(list[Any], value))

    return read


def _as_biases(value: Any) -> dict[int, float]:
    """Token id to bias; JSON has strings for keys."""
    biases = _as_object(value)
    if not all(key.isascii() and key.isdecimal() and str(int(key[:20])) == key for key in biases):
        raise _Mistaken("an object of token ids and biases")
    return {_as_count(int(key)): _as_number(bias) for key, bias in biases.items()}


# What shapes a version's output. `seed`, `n` and the log-probabilities are for whoever asks.
_SAMPLING_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "temperature": _as_number,
    "top_p": _as_number,
    "top_k": _as_count,
    "min_p": _as_number,
    "repetition_penalty": _as_number,
    "presence_penalty": _as_number,
    "frequency_penalty": _as_number,
    "logit_bias": _as_biases,
    "bad_words": _as_list(_as_list(_as_count)),
    "stop": _as_list(_as_text),
    "stop_token_ids": _as_list(_as_count),
    "max_tokens": _as_count,
    "min_tokens": _as_count,
    "ignore_eos": _as_flag,
}
