"""Defaults that an adapter version carries: who is heard first, for every field, and what is refused at upload."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from adapter_folders import write_adapter
from fake_engine import BASE_MODEL, INFO, FakeEngine, server_config
from lorasrv import LLM
from lorasrv.client import Client, ClientError
from lorasrv.config import EngineConfig, ModelConfig
from lorasrv.engine.admission import TokenLimits, engine_request
from lorasrv.engine.defaults import VersionDefaults, adapter_check, read_defaults
from lorasrv.errors import ConfigurationError, InvalidRequest
from lorasrv.model.base_shapes import base_shapes
from lorasrv.server.server import Server
from lorasrv.types import CompleteSampling, EngineRequest, SamplingParams
from lorasrv.v1 import generation_pb2
from lorasrv_adapters.errors import ContentError, ContentRefused, InvalidAdapter, MalformedFile
from lorasrv_adapters.peft_format import validate_folder
from running_server import Running, running_server

LIMITS = TokenLimits.of(INFO)
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role[0] }}{{ message.content }}|{% endfor %}"

# Field: the default in serving.json, and what a request says instead: where it can, what it would get without a word.
FIELDS: dict[str, tuple[Any, Any]] = {
    "temperature": (0.5, 1.0),
    "top_p": (0.5, 1.0),
    "top_k": (5, 0),
    "min_p": (0.25, 0.0),
    "repetition_penalty": (2.0, 1.0),
    "presence_penalty": (0.5, 0.0),
    "frequency_penalty": (-0.5, 0.0),
    "logit_bias": ({"3": 0.5, "4": -1.0}, {5: 1.0}),
    "bad_words": ([[1, 2], [3]], [[4]]),
    "stop": (["x", "yy"], ["z"]),
    "stop_token_ids": ([7, 8], [9]),
    "max_tokens": (9, 40),
    "min_tokens": (2, 0),
    "ignore_eos": (True, False),
}
NEVER_DEFAULTS = {"seed", "n", "logprobs", "prompt_logprobs"}
ALL_DEFAULTS = {name: default for name, (default, _) in FIELDS.items()}


def in_python(name: str, value: Any) -> Any:
    """A field of JSON, or of the client's arguments, as SamplingParams has it."""
    match name:
        case "logit_bias":
            return {int(token_id): bias for token_id, bias in value.items()}
        case "bad_words":
            return tuple(map(tuple, value))
        case "stop" | "stop_token_ids":
            return tuple(value)
        case _:
            return value


def params(values: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**{name: in_python(name, value) for name, value in values.items()})


def admitted(asked: SamplingParams, defaults: SamplingParams) -> tuple[EngineRequest, tuple[str, ...]]:
    """All that a request's sampling comes to."""
    request = engine_request(
        "id", (1, 2), adapter=None, sampling=replace(asked, seed=1), limits=LIMITS, defaults=defaults
    )
    return request, asked.over(defaults).stop


def serving(**fields: Any) -> str:
    return json.dumps(fields)


def served_folder(folder: Path, **fields: Any) -> Path:
    write_adapter(folder)
    (folder / "serving.json").write_text(serving(**fields))
    return folder


def model_folder(folder: Path, chat_template: str) -> Path:
    """The sample model without its weights, with a chat template."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(BASE_MODEL / name)
    (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def test_every_field_is_accounted_for() -> None:
    """A new field of SamplingParams is either a default or says why it is none."""
    names = {field.name for field in fields(SamplingParams)}
    assert FIELDS.keys() | NEVER_DEFAULTS == names
    assert {field.name for field in generation_pb2.SamplingParams.DESCRIPTOR.fields} | {"n"} == names
    assert all(field.has_presence for field in generation_pb2.SamplingParams.DESCRIPTOR.fields if not field.is_repeated)
    for name in NEVER_DEFAULTS:
        with pytest.raises(ContentRefused, match=f"cannot have: sampling.{name}$"):
            read_defaults(serving(sampling={name: 1}))


@pytest.mark.parametrize("name", FIELDS)
def test_the_request_comes_first_then_the_version_then_the_system(name: str) -> None:
    default, asked = ({name: value} for value in FIELDS[name])
    defaults = read_defaults(serving(sampling=default)).sampling
    nothing = SamplingParams()
    assert admitted(nothing, defaults) == admitted(params(default), nothing)
    assert admitted(params(asked), defaults) == admitted(params(asked), nothing)
    assert admitted(nothing, defaults) != admitted(params(asked), defaults)
    others = read_defaults(serving(sampling=ALL_DEFAULTS)).sampling
    assert admitted(params(asked), others) == admitted(params(ALL_DEFAULTS | asked), nothing)


def test_what_is_unset_everywhere_is_the_systems() -> None:
    complete = CompleteSampling.of(SamplingParams())
    request, stop = admitted(SamplingParams(), SamplingParams())
    assert (request.temperature, request.top_p, request.min_p) == (1.0, 1.0, 0.0)
    assert (request.top_k, request.rules, request.min_tokens, request.ignore_eos, stop) == (None, None, 0, False, ())
    assert request.max_tokens == LIMITS.sequence_tokens - 2
    assert admitted(SamplingParams(top_k=0), SamplingParams(top_k=5))[0].top_k is None
    left_open = {"top_k", "seed", "max_tokens", "logprobs", "prompt_logprobs"}
    assert {name for name, value in vars(complete).items() if value is None} == left_open


def test_default_lengths_give_way() -> None:
    long = SamplingParams(max_tokens=10_000, min_tokens=5)
    assert admitted(SamplingParams(), long)[0].max_tokens == LIMITS.sequence_tokens - 2
    assert admitted(SamplingParams(max_tokens=3), long)[0].min_tokens == 3
    with pytest.raises(InvalidRequest, match="max_tokens 10000 exceeds"):
        admitted(SamplingParams(max_tokens=10_000), SamplingParams())
    with pytest.raises(InvalidRequest, match="5 is above max_tokens 3"):
        admitted(SamplingParams(min_tokens=5), SamplingParams(max_tokens=3))


def test_no_file_no_defaults() -> None:
    assert read_defaults(None) == read_defaults("{}") == VersionDefaults()


# What is refused


def refusals(folder: Path, content: bytes | str) -> tuple[ContentError, ...]:
    """Why an adapter with this serving.json is refused; nothing when it is not."""
    write_adapter(folder)
    (folder / "serving.json").write_bytes(content.encode() if isinstance(content, str) else content)
    check = adapter_check(EngineConfig(model=ModelConfig(path=str(BASE_MODEL))))
    try:
        validate_folder(folder, base_shapes(BASE_MODEL, "float32"), check=check)
    except ContentRefused as refused:
        return refused.errors
    return ()


REFUSED = [
    (serving(tools=[]), "fields that it cannot have: tools"),
    (serving(sampling={"best_of": 3, "seed": 1}), "cannot have: sampling.best_of, sampling.seed"),
    (serving(sampling=[]), "sampling: [] is not an object"),
    (serving(system_prompt=7), "system_prompt: 7 is not a text"),
    (serving(system_prompt=""), "system_prompt is empty"),
    (serving(system_prompt="a\ud800"), "system_prompt: 'a\\ud800' is not a text"),
    (serving(sampling={"stop": ["\udfff"]}), "sampling.stop: ['\\udfff'] is not a text"),
    (serving(sampling={"temperature": "0"}), "sampling.temperature: '0' is not a number"),
    (serving(sampling={"temperature": True}), "sampling.temperature: True is not a number"),
    (serving(sampling={"temperature": None}), "sampling.temperature: None is not a number"),
    (serving(sampling={"temperature": 101}), "sampling.temperature: 101.0 is not within [0, 100]"),
    (serving(sampling={"temperature": 10**400}), "is not a number"),
    (serving(sampling={"top_k": 1.5}), "sampling.top_k: 1.5 is not an integer"),
    (serving(sampling={"top_k": -1}), "sampling.top_k: -1 is not an integer from 0"),
    (serving(sampling={"top_p": 0}), "sampling.top_p: 0.0 is not within (0, 1]"),
    (serving(sampling={"max_tokens": 0}), "sampling.max_tokens: 0 is below 1"),
    (serving(sampling={"max_tokens": 2, "min_tokens": 3}), "sampling.min_tokens: 3 is above max_tokens 2"),
    (serving(sampling={"ignore_eos": 1}), "sampling.ignore_eos: 1 is not true or false"),
    (serving(sampling={"stop": "x"}), "sampling.stop: 'x' is not a list"),
    (serving(sampling={"stop": [""]}), "sampling.stop: a string of 0 characters"),
    (serving(sampling={"stop": ["x"] * 17}), "sampling.stop: 17 strings; at most 16"),
    (serving(sampling={"stop_token_ids": [260]}), "sampling.stop_token_ids: token id 260 is outside the vocabulary of"),
    (serving(sampling={"bad_words": [[1], [2, 260]]}), "sampling.bad_words: token id 260 is outside the vocabulary of"),
    (serving(sampling={"logit_bias": {"260": 1}}), "sampling.logit_bias: token id 260 is outside the vocabulary of"),
    (serving(sampling={"logit_bias": {"1": 101}}), "sampling.logit_bias: 101.0 is not within [-100, 100]"),
    (serving(sampling={"logit_bias": {"01": 1}}), "is not an object of token ids and biases"),
    (serving(sampling={"logit_bias": {"-1": 1}}), "is not an object of token ids and biases"),
    (serving(sampling={"logit_bias": {"9" * 5000: 1}}), "is not an object of token ids and biases"),
    ('{"sampling": {"temperature": NaN}}', "serving.json: NaN is not a JSON number"),
    ('{"sampling": {"temperature": 1e999}}', "number '1e999' overflows"),
    ('{"sampling": {"stop": ["a"], "stop": ["b"]}}', "key 'stop' occurs twice"),
    ("[]", "a JSON object is expected, not a list"),
    ("", "serving.json: not JSON"),
    (b"\xff{}", "serving.json: not UTF-8 at byte 0"),
    ('{"sampling": ' + "[" * 8000 + "]" * 8000 + "}", "nested too deep"),
    (serving(system_prompt="x" * (16 << 10)), "serving.json is over the limit of 16384 bytes"),
]


@pytest.mark.parametrize(("content", "reason"), REFUSED)
def test_refused_by_name(tmp_path: Path, content: bytes | str, reason: str) -> None:
    errors = refusals(tmp_path / "a", content)
    assert [reason in str(error) for error in errors] == [True], errors
    assert all(str(error).startswith("serving.json") and str(error).isascii() for error in errors)
    assert isinstance(errors[0], InvalidAdapter | MalformedFile)


def test_a_template_that_knows_no_system_message(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    model = model_folder(tmp_path / "model", template)
    check = adapter_check(EngineConfig(model=ModelConfig(path=str(model))))
    shapes = base_shapes(model, "float32")
    assert validate_folder(served_folder(tmp_path / "a", sampling={"top_k": 1}), shapes, check=check).serving
    with pytest.raises(ContentRefused, match="system_prompt: messages: the chat template refuses them: no"):
        validate_folder(served_folder(tmp_path / "b", system_prompt="Be brief."), shapes, check=check)


def test_all_reasons_at_once(tmp_path: Path) -> None:
    content = serving(sampling={"temperature": -1, "top_k": "many", "tokens": 3, "stop": [""]}, prompt="x")
    assert len(refusals(tmp_path / "a", content)) == 3
    assert len(refusals(tmp_path / "a", serving(sampling={"temperature": -1, "min_p": 2}, system_prompt=""))) == 3


@pytest.mark.parametrize("content", ["{}", serving(sampling=ALL_DEFAULTS, system_prompt="Sei höflich. 🎉"), "{ }\n"])
def test_accepted(tmp_path: Path, content: str) -> None:
    assert refusals(tmp_path / "a", content) == ()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "serving.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ContentRefused, match=r"serving\.json is missing"):
        validate_folder(folder, base_shapes(BASE_MODEL, "float32"))


# Over the wire


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    model = model_folder(tmp_path / "model", CHAT_TEMPLATE)
    config = server_config(tmp_path / "data")
    engine = replace(config.engine, model=ModelConfig(path=str(model)))
    async with running_server(tmp_path / "data", replace(config, engine=engine)) as found:
        yield found


async def test_every_default_reaches_the_engine_unless_the_request_speaks(running: Running, tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "polite", sampling=ALL_DEFAULTS)

    def sampling_of(client: Client, **asked: Any) -> EngineRequest:
        client.generate([1, 2], adapter="polite", seed=1, **asked)
        return replace(running.engine.requests[-1], request_id="id", adapter=None, tenant="")

    def session() -> None:
        with Client(running.address) as client:
            client.push(folder)
            assert sampling_of(client) == admitted(params(ALL_DEFAULTS), SamplingParams())[0]
            for name, (_, asked) in FIELDS.items():
                expected = admitted(params(ALL_DEFAULTS | {name: asked}), SamplingParams())[0]
                assert sampling_of(client, **{name: in_python(name, asked)}) == expected, name
            plain = sampling_of(client, ignore_version_defaults=True)
            assert plain == admitted(SamplingParams(), SamplingParams())[0]
            assert client.generate("wxyz", adapter="polite", min_tokens=0, max_tokens=40).text == "w"
            assert client.generate("wxyz", adapter="polite", stop=["q"], max_tokens=40).text == "wxyz"

    await asyncio.to_thread(session)


async def test_a_chat_brings_its_system_prompt_or_gets_the_versions(running: Running, tmp_path: Path) -> None:
    folder = served_folder(tmp_path / "polite", system_prompt="kind")
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "own"}

    def session() -> None:
        with Client(running.address) as client:
            client.push(folder)

            def echoed(prompt: Any, **options: Any) -> str:
                return client.generate(prompt, echo=True, **({"adapter": "polite"} | options)).started.prompt_text

            assert echoed([user]) == "<s>skind|uhi|"
            assert list(running.engine.requests[-1].token_ids) == [256, *(ord(c) - 33 for c in "skind|uhi|")]
            assert echoed([system, user]) == "<s>sown|uhi|"
            assert echoed([user, system]) == "<s>skind|uhi|sown|"
            assert echoed([user], ignore_version_defaults=True) == "<s>uhi|"
            assert echoed([user], adapter="base") == "<s>uhi|"
            assert echoed("hi") == "hi"
            assert echoed([256, 71]) == "h"

    await asyncio.to_thread(session)


async def test_versions_show_their_defaults(running: Running, tmp_path: Path) -> None:
    def session() -> None:
        with Client(running.address) as client:
            client.push(write_adapter(tmp_path / "polite"))
            pushed = client.push(served_folder(tmp_path / "polite", sampling=ALL_DEFAULTS, system_prompt="kind"))
            versions = client.adapter("polite").versions
            assert [version.HasField("defaults") for version in versions] == [True, False]
            assert client.adapters()[0].versions[0].defaults == pushed.defaults == versions[0].defaults
            assert versions[0].defaults.system_prompt == "kind"
            shown = versions[0].defaults.sampling
            assert {field.name for field, _ in shown.ListFields()} == FIELDS.keys()
            assert (shown.top_k, list(shown.stop), shown.logit_bias[3]) == (5, ["x", "yy"], 0.5)
            assert [list(word.ids) for word in shown.bad_words] == [[1, 2], [3]]

    await asyncio.to_thread(session)


async def test_bad_defaults_are_refused_and_a_neighbour_goes_on(running: Running, tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    running.engine.gate.clear()
    good = served_folder(tmp_path / "good", sampling={"temperature": 0})

    def session() -> None:
        with Client(running.address) as client:
            client.push(good)
            neighbour = client.stream("neighbour", adapter="good")
            next(neighbour)
            for number, (content, _) in enumerate(REFUSED):
                folder = write_adapter(tmp_path / f"bad{number}")
                (folder / "serving.json").write_bytes(content if isinstance(content, bytes) else content.encode())
                with pytest.raises(ClientError) as error:
                    client.push(folder)
                assert error.value.code.name == "INVALID_ARGUMENT", content
                assert error.value.reason in ("INVALID_ADAPTER", "MALFORMED_FILE", "INVALID_UPLOAD")
            assert [adapter.adapter_id for adapter in client.adapters()] == ["good"]
            loop.call_soon_threadsafe(running.engine.gate.set)
            assert "".join(getattr(event, "text", "") for event in neighbour) == "neighbour"

    await asyncio.to_thread(session)


async def test_chats_that_are_refused(running: Running) -> None:
    def session() -> None:
        with Client(running.address) as client:
            for messages, reason in (
                ([{"role": "", "content": "x"}], r"messages\[0\]\.role: has 0 characters"),
                ([{"role": "user", "content": "x"}] * 4097, "4097 messages; at most 4096"),
                ([{"role": "user", "content": "x" * 100}], "prompt of 103 tokens exceeds"),
            ):
                with pytest.raises(ClientError, match=reason) as error:
                    client.generate(messages, adapter="base", max_tokens=None)
                assert (error.value.code.name, error.value.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")

    await asyncio.to_thread(session)


def test_a_template_that_cannot_be_compiled_ends_the_start(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", "{% for %}")
    config = replace(server_config(tmp_path / "data"), engine=EngineConfig(model=ModelConfig(path=str(model))))
    with pytest.raises(ConfigurationError, match="chat template cannot be compiled"):
        Server(config, lambda _: FakeEngine())


async def test_a_base_without_a_template_takes_no_chats(tmp_path: Path) -> None:
    async with running_server(tmp_path / "data") as running:

        def session() -> None:
            reason = "messages: the base model has no chat template"
            with Client(running.address) as client, pytest.raises(ClientError, match=reason):
                client.generate([{"role": "user", "content": "x"}], adapter="base")

        await asyncio.to_thread(session)


# Offline


def test_offline_too(tmp_path: Path) -> None:
    reverse = BASE_MODEL.parent / "reverse"
    folder = tmp_path / "reverse"
    folder.mkdir()
    for file in reverse.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "serving.json").write_text(serving(sampling={"temperature": 0, "stop": ["b"], "max_tokens": 32}))
    with LLM(BASE_MODEL) as llm:
        digests = [llm.add_adapter("plain", reverse), llm.add_adapter("until_b", folder)]
        assert len(set(digests)) == 2
        assert llm.generate(["banana>"], adapter="until_b")[0].text == "anana"
        assert llm.generate(["banana>"], adapter="until_b", sampling=SamplingParams(stop=("n",)))[0].text == "a"
        outputs = llm.generate(["banana>"] * 2, adapter=["plain", "until_b"], sampling=SamplingParams(temperature=0))
        assert [output.text for output in outputs] == ["ananab", "anana"]
        (folder / "serving.json").write_text(serving(sampling={"stop_token_ids": [260]}))
        with pytest.raises(ContentRefused, match="outside the vocabulary of 260"):
            llm.add_adapter("until_b", folder)
        assert llm.generate(["banana>"], adapter="until_b")[0].text == "anana"
