"""Chats as text: the base model's own chat template, rendered in a sandbox exactly as transformers renders it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2.exceptions import SecurityError, TemplateError
from transformers.utils import chat_template_utils

from lorasrv.errors import ConfigurationError, InvalidRequest, UnsupportedModel
from lorasrv.requests import Chat

MAX_MESSAGES = 4096
MAX_ROLE_CHARS = 64
# Of all messages together, and of what the template makes of them.
MAX_CHAT_CHARS = 4 << 20

_MAX_REASON_CHARS = 500
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A compiled template. `special_tokens` are what it knows by names such as `bos_token`. Safe in any thread.

    A template is the operator's and trusted not to loop for long; what it reads is the caller's and plain text. Special
    tokens spelled out in a message are tokenized as such, as transformers does unless told otherwise.
    """

    source: str
    special_tokens: Mapping[str, str]

    def __post_init__(self) -> None:
        try:
            _render(self.source, [], {})
        except Exception as error:  # jinja2's own, and what Python says of the code that it made
            raise ConfigurationError(f"the base model's chat template cannot be compiled: {error}") from error

    def render(self, chat: Chat) -> str:
        """The prompt up to where the assistant speaks; to be tokenized without adding special tokens.

        Raises InvalidRequest for messages that the template refuses, UnsupportedModel where the template itself fails.
        """
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        try:
            (text,) = _render(self.source, [messages], self.special_tokens)
        except SecurityError as error:
            raise _template_fails(error) from error
        except TemplateError as error:
            raise InvalidRequest(
                "messages", f"the chat template refuses them: {str(error)[:_MAX_REASON_CHARS]}"
            ) from None
        except Exception as error:  # a template is a program; what it raises is its own
            raise _template_fails(error) from error
        if len(text) > MAX_CHAT_CHARS:
            raise InvalidRequest(
                "messages", f"{len(text)} characters when rendered; at most {MAX_CHAT_CHARS} are accepted"
            )
        return text


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model folder: chat_template.jinja, or `chat_template` in tokenizer_config.json, of several the
    one named `default`. None when there is none. Raises ConfigurationError.
    """
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text(encoding="utf-8") if file.is_file() else _configured(config.get("chat_template"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{folder.name}/{file.name} is not UTF-8 at byte {error.start}") from None
    if source is None:
        return None
    return ChatTemplate(source=source, special_tokens=_special_tokens(folder, config))


def check_chat(chat: Chat) -> None:
    """Raises InvalidRequest for what no template is asked about."""
    if not chat.messages:
        raise InvalidRequest("messages", "is empty; at least one message is needed")
    if len(chat.messages) > MAX_MESSAGES:
        raise InvalidRequest("messages", f"{len(chat.messages)} messages; at most {MAX_MESSAGES} are accepted")
    for number, message in enumerate(chat.messages):
        if not 1 <= len(message.role) <= MAX_ROLE_CHARS:
            raise InvalidRequest(
                f"messages[{number}].role",
                f"has {len(message.role)} characters; 1 to {MAX_ROLE_CHARS} are accepted",
            )
    num_chars = sum(len(message.content) for message in chat.messages)
    if num_chars > MAX_CHAT_CHARS:
        raise InvalidRequest("messages", f"{num_chars} characters; at most {MAX_CHAT_CHARS} are accepted")


def _render(source: str, chats: list[list[dict[str, str]]], names: Mapping[str, Any]) -> list[str]:
    """The chats as text; compiles the template, once, also when there are none."""
    rendered, _ = cast(Any, chat_template_utils).render_jinja_template(
        chats, chat_template=source, add_generation_prompt=True, **names
    )
    return rendered


def _template_fails(error: Exception) -> UnsupportedModel:
    reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]
    return UnsupportedModel(f"the base model's chat template fails: {reason}")


def _configured(given: Any) -> str | None:
    """One template, or a list of named ones as older transformers wrote it."""
    match given:
        case None | str():
            return given
        case [*_] if all(isinstance(each, dict) for each in given):
            named = {each.get("name"): each.get("template") for each in given}
            if isinstance(named.get("default"), str):
                return named["default"]
            raise ConfigurationError(f"of the chat templates {sorted(map(str, named))} none is named 'default'")
        case _:
            raise ConfigurationError("chat_template in tokenizer_config.json is neither a string nor a list of them")


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The model's special tokens by name, from the files that transformers looks into."""
    legacy = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
    fields = {**config, **legacy}
    own = {name: token for name, token in fields.items() if name.endswith("_token") and isinstance(token, str)}
    extra = fields.get("extra_special_tokens")
    if isinstance(extra, dict):
        own |= cast(dict[str, Any], extra)
    own |= {name: fields.get(name) for name in _SPECIAL_TOKENS}
    spelled = {name: _spelling(token) for name, token in own.items()}
    return {name: token for name, token in spelled.items() if token is not None}


def _spelling(token: Any) -> str | None:
    text = cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigurationError(f"{path.parent.name}/{path.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path.parent.name}/{path.name} is not a JSON object")
    return cast(dict[str, Any], value)
