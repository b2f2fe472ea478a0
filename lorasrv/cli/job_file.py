"""The lines of `generate --file`: a prompt each, or a JSON object with its own sampling."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorasrv.cli.sampling import MAX_COUNT, MAX_SEED
from lorasrv.client.batch import Job
from lorasrv.errors import ConfigurationError


def read_jobs(lines: Iterable[str], adapter: str, sampling: Mapping[str, Any], *, jsonl: bool) -> list[Job]:
    """A prompt per line, or a JSON object {prompt or messages, adapter?, max_tokens?, …}.

    `lines` are read with errors="surrogateescape". Raises ConfigurationError naming the line.
    """
    jobs: list[Job] = []
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if not text:
            continue
        if not _is_text(text):
            raise ConfigurationError(f"line {number}: not UTF-8")
        if jsonl or text.startswith("{"):
            jobs.append(_read_object(text, number, adapter, sampling))
        else:
            jobs.append(Job(prompt=text, adapter=adapter, sampling=sampling))
    return jobs


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SEED


def _is_text(value: Any) -> bool:
    """Half of a surrogate pair, which JSON can spell and Python makes of a byte that is no UTF-8, is no text."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _are_biases(value: Any) -> bool:
    """JSON has strings for keys."""
    if not isinstance(value, dict):
        return False
    return all(key.isdecimal() and _is_count(int(key)) and _is_number(bias) for key, bias in value.items())


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"} and all(map(_is_text, value.values()))


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "prompt": _is_text,
    "messages": _list_of(_is_message),
    "adapter": _is_text,
    "max_tokens": _is_count,
    "temperature": _is_number,
    "top_p": _is_number,
    "top_k": _is_count,
    "seed": _is_seed,
    "stop": _list_of(_is_text),
    "scale": _is_number,
    "min_p": _is_number,
    "repetition_penalty": _is_number,
    "presence_penalty": _is_number,
    "frequency_penalty": _is_number,
    "logit_bias": _are_biases,
    "bad_words": _list_of(_list_of(_is_count)),
    "stop_token_ids": _list_of(_is_count),
    "min_tokens": _is_count,
    "ignore_eos": _is_flag,
    "logprobs": _is_count,
    "prompt_logprobs": _is_count,
    "n": _is_count,
    "echo": _is_flag,
    "ignore_version_defaults": _is_flag,
}


def _read_object(text: str, number: int, adapter: str, sampling: Mapping[str, Any]) -> Job:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"line {number}: {error}") from None
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ConfigurationError(f"line {number}: not an object with a prompt or messages")
    for key, value in fields.items():
        if key not in _FIELDS or not _FIELDS[key](value):
            raise ConfigurationError(f"line {number}: {key!r} with value {value!r} is not a known field of that kind")
    prompt = fields.pop("prompt" if "prompt" in fields else "messages")
    adapter = fields.pop("adapter", adapter)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(key): bias for key, bias in fields["logit_bias"].items()}
    return Job(prompt=prompt, adapter=adapter, sampling={**sampling, **fields})
