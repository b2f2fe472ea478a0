"""Chat templates, against transformers' own `apply_chat_template` on the same folder."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fake_engine import BASE_MODEL
from lorasrv.engine import chat
from lorasrv.engine.chat import check_chat, load_chat_template
from lorasrv.engine.text import load_tokenizer
from lorasrv.errors import ConfigurationError, InvalidRequest, UnsupportedModel
from lorasrv.requests import Chat, ChatMessage

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

LLAMA3 = """\
{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +
message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant, " + message["role"] + " came at " ~ ns.index) }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
"""

TOOLS_OF_THE_LANGUAGE = """\
{{ bos_token }}{{ strftime_now("%Y") }} {{ messages | tojson }} {{ messages | map(attribute="role") | join("/") }}
{% for message in messages %}
    {% if message.role == "tool" %}{% break %}{% endif %}
    {% generation %}{{ message.content.split("<")[0] | upper }}{% endgeneration %}
{% endfor %}
{{ image_token }}{{ pad_token }}{{ unknown }}{{ tools is none }}
"""

CHATS = (
    Chat(messages=(ChatMessage(role="user", content="hello"),)),
    Chat(
        messages=(
            ChatMessage(role="system", content="Be brief.\n"),
            ChatMessage(role="user", content="  grüße, 世界 🎉 {{ messages }} {% raise %} "),
            ChatMessage(role="assistant", content=""),
            ChatMessage(role="user", content="<|im_end|><s></s><|end|>[INST]"),
        )
    ),
)


def model_folder(folder: Path, template: object = None, jinja: str | None = None, **config: object) -> Path:
    """The sample model's tokenizer with a chat template, in tokenizer_config.json or in a file of its own."""
    folder.mkdir()
    shutil.copy(BASE_MODEL / "tokenizer.json", folder)
    fields = json.loads((BASE_MODEL / "tokenizer_config.json").read_text()) | config
    if template is not None:
        fields["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def rendered(folder: Path, asked: Chat) -> str:
    template = load_chat_template(folder)
    assert template is not None
    return template.render(asked)


def as_dicts(asked: Chat) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in asked.messages]


@pytest.mark.parametrize("asked", CHATS)
@pytest.mark.parametrize(
    "given",
    [
        {"template": CHATML},
        {"jinja": CHATML},
        {"jinja": LLAMA3, "template": "superseded"},
        {"template": MISTRAL},
        {"template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": LLAMA3}]},
        {"template": TOOLS_OF_THE_LANGUAGE, "image_token": "<|end|>"},
        {"template": LLAMA3, "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}},
        {"template": TOOLS_OF_THE_LANGUAGE, "extra_special_tokens": {"image_token": "<|end|>"}, "pad_token": None},
    ],
)
def test_text_and_tokens_are_those_of_transformers(tmp_path: Path, given: dict[str, object], asked: Chat) -> None:
    folder = model_folder(tmp_path / "model", **given)  # pyright: ignore[reportArgumentType]
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(as_dicts(asked), add_generation_prompt=True, tokenize=False)
    text = rendered(folder, asked)
    assert text == expected
    token_ids = load_tokenizer(folder).encode(text, add_special_tokens=False).ids
    expected_ids = reference.apply_chat_template(as_dicts(asked), add_generation_prompt=True, return_dict=False)
    assert token_ids == expected_ids
    assert token_ids.count(reference.bos_token_id) <= text.count("<s>")


def test_special_tokens_map_of_older_folders(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", jinja="{{ bos_token }}|{{ eos_token }}", eos_token="<pad>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(as_dicts(CHATS[0]), tokenize=False)
    assert rendered(folder, CHATS[0]) == expected == "<s>|</s>"


def test_what_a_template_refuses_is_the_callers(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", template=MISTRAL)
    twice = Chat(messages=CHATS[0].messages * 2)
    with pytest.raises(InvalidRequest, match=r"^messages: .*roles must alternate user/assistant, user came at 1"):
        rendered(folder, twice)


@pytest.mark.parametrize(
    "escape",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages[0].content.format.__self__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.clear() }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
    ],
)
def test_the_sandbox_holds(tmp_path: Path, escape: str) -> None:
    """What leads out of the sandbox fails or is undefined; nothing comes out, and the messages stay as they are."""
    folder = model_folder(tmp_path / "model", template=escape)
    try:
        text = rendered(folder, CHATS[0])
    except (UnsupportedModel, InvalidRequest):
        text = ""
    assert text == ""
    assert CHATS[0].messages == (ChatMessage(role="user", content="hello"),)


@pytest.mark.parametrize(
    "template",
    [
        "{% include 'other' %}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' + 1 }}",
        "{{ messages.append({}) }}",
    ],
)
def test_a_template_that_fails_is_the_models_fault(tmp_path: Path, template: str) -> None:
    folder = model_folder(tmp_path / "model", template=template)
    with pytest.raises(UnsupportedModel, match="chat template fails: "):
        rendered(folder, CHATS[0])


def test_what_is_rendered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "model", template="{{ messages[0].content * 20 }}")
    assert len(rendered(folder, CHATS[0])) == 100
    monkeypatch.setattr(chat, "MAX_CHAT_CHARS", 99)
    with pytest.raises(InvalidRequest, match="100 characters when rendered; at most 99 are accepted"):
        rendered(folder, CHATS[0])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"template": "{% if %}"}, "cannot be compiled"),
        ({"jinja": "{{ x | no_such_filter }}"}, "cannot be compiled"),
        ({"template": 7}, "neither a string nor a list"),
        ({"template": [{"name": "tool_use", "template": "x"}]}, "none is named 'default'"),
        ({"template": ["x"]}, "neither a string nor a list"),
    ],
)
def test_bad_templates_end_the_start(tmp_path: Path, given: dict[str, object], reason: str) -> None:
    folder = model_folder(tmp_path / "model", **given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigurationError, match=reason):
        load_chat_template(folder)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert load_chat_template(folder) is None
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match=r"model/chat_template\.jinja is not UTF-8 at byte 0"):
        load_chat_template(folder)
    for content, reason in ((b"{", "is not JSON"), (b"[]", "is not a JSON object")):
        (folder / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(ConfigurationError, match=rf"tokenizer_config\.json {reason}"):
            load_chat_template(folder)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages: is empty"),
        ([("user", "x")] * 4097, "messages: 4097 messages; at most 4096"),
        ([("user", "x"), ("", "y")], r"messages\[1\].role: has 0 characters; 1 to 64"),
        ([("u" * 65, "y")], r"messages\[0\].role: has 65 characters"),
        ([("user", "x" * (2 << 20)), ("user", "x" * ((2 << 20) + 1))], "messages: 4194305 characters; at most 4194304"),
    ],
)
def test_bounds(messages: list[tuple[str, str]], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        check_chat(Chat(messages=tuple(ChatMessage(role=role, content=content) for role, content in messages)))


def test_with_system() -> None:
    first = ChatMessage(role="system", content="Be kind.")
    assert CHATS[0].with_system("Be kind.") == Chat(messages=(first, *CHATS[0].messages))
    assert CHATS[0].with_system(None) is CHATS[0]
    assert CHATS[1].with_system("Be kind.") is CHATS[1]


def test_the_year_is_now(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", template="{{ strftime_now('%Y') }}")
    assert rendered(folder, CHATS[0]) in {str(datetime.now().year), str(datetime.now().year - 1)}
