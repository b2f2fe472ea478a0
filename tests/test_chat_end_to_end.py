"""`lorasrv serve` with a chat template: adapters pushed with defaults, asked by chat, in client and command."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasrv.client import Client
from lorasrv.client.errors import InvalidArgument
from lorasrv.demo.local_server import LocalServer
from lorasrv.v1 import generation_pb2

SAMPLES = Path(__file__).parent.parent / "adapters" / "samples"
# The sample adapters were trained on `word>`: what all messages say together is the word.
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ("system", "user") %}
        {{- raise_exception("role " ~ message.role ~ " is not known") }}
    {%- endif %}
    {{- message.content }}
{%- endfor %}
{%- if add_generation_prompt %}>{% endif %}
"""
DEFAULTS = {"sampling": {"temperature": 0, "stop": ["b"], "max_tokens": 32}, "system_prompt": "ban"}


def linked(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    model = linked(SAMPLES / "base", folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    adapter = linked(SAMPLES / "reverse", folder / "until-b")
    (adapter / "serving.json").write_text(json.dumps(DEFAULTS))
    with LocalServer(model, folder / "data", folder / "log", ("--pool-mib", "6")) as server:
        with Client(server.url) as client:
            client.push(SAMPLES / "reverse")
            client.push(adapter)
        yield server


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def same(one: generation_pb2.GenerateResponse, other: generation_pb2.GenerateResponse) -> bool:
    return (one.text, list(one.token_ids), one.finished.stop, list(one.started.prompt_token_ids)) == (
        other.text,
        list(other.token_ids),
        other.finished.stop,
        list(other.started.prompt_token_ids),
    )


def test_defaults_give_what_the_explicit_request_gives(client: Client) -> None:
    short = client.generate(user("ana"), adapter="until-b", echo=True)
    assert (short.text, short.finished.stop) == ("anana", "b")
    assert short.started.prompt_text == "<s>banana>"
    explicit = {"temperature": 0, "stop": ["b"], "max_tokens": 32, "echo": True}
    messages = [{"role": "system", "content": "ban"}, *user("ana")]
    for adapter in ("until-b", "reverse"):
        assert same(short, client.generate(messages, adapter=adapter, **explicit))
        assert same(short, client.generate("banana>", adapter=adapter, **explicit))


def test_the_request_comes_first(client: Client) -> None:
    own = [{"role": "system", "content": "lan"}, *user("tern")]
    assert client.generate(own, adapter="until-b").text == "nretnal"
    assert client.generate(user("ana"), adapter="until-b", stop=["n"]).text == "a"
    assert client.generate(user("ana"), adapter="until-b", max_tokens=2).text == "an"
    plain = client.generate(user("cab"), adapter="until-b", temperature=0, ignore_version_defaults=True)
    assert (plain.text, plain.finished.stop) == ("bac", "")
    assert client.generate("ana>", adapter="until-b").text == "ana", "no system prompt in front of a text"


def test_what_the_template_refuses(client: Client) -> None:
    with pytest.raises(InvalidArgument, match="messages: the chat template refuses them: role tool is not known"):
        client.generate([*user("ana"), {"role": "tool", "content": "x"}], adapter="until-b")
    assert client.generate(user("ana"), adapter="until-b").text == "anana"


def test_the_command_takes_messages_by_file(server: LocalServer, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    lines = [
        {"messages": user("ana"), "adapter": "until-b"},
        {"prompt": "banana>", "adapter": "until-b", "ignore_version_defaults": True, "temperature": 0},
        {"messages": user("abc"), "adapter": "reverse", "temperature": 0},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "lorasrv.cli", "generate", "--file", str(file), "--json", "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["text"] for record in records] == ["anana", "ananab", "cba"]
    assert records[0]["messages"] == user("ana") and "prompt" not in records[0]
    assert records[1]["prompt"] == "banana>"


def test_show_prints_the_defaults(server: LocalServer) -> None:
    command = [sys.executable, "-m", "lorasrv.cli", "adapters", "show", "until-b", "--json", "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    defaults = json.loads(done.stdout)["versions"][0]["defaults"]
    assert defaults["system_prompt"] == "ban"
    assert (defaults["sampling"]["stop"], defaults["sampling"]["temperature"]) == (["b"], 0)
