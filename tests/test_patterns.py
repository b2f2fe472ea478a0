"""Patterns select what PEFT's use of Python's `re` selects, or are refused by name; none takes long."""

import json
import re
import sys
import warnings
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key, match_target_against_key

from lorasrv_adapters.errors import ContentError, UnsupportedFeature
from lorasrv_adapters.patterns import (
    MAX_INSTRUCTIONS,
    MAX_PATTERN_CHARS,
    PathMatcher,
    layer_list,
    path_end,
    whole_path,
)
from lorasrv_adapters.peft_config import MAX_PATTERNS, MAX_REGEXES, parse_peft_config

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
PATHS = [f"model.layers.{layer}.{module}" for layer in (*range(12), 21, 79) for module in MODULES]
# What users write; the last one is what a training tool writes.
COMMON = [
    "q_proj",
    r".*\.q_proj",
    r".*(q|v)_proj",
    r"model\.layers\.(0|1|2)\..*",
    r"model\.layers\.([0-9]|1[01])\.self_attn\.(q|v)_proj",
    r"^model.layers.1.self_attn.q_proj",
    r"^model\.layers\.\d+\.mlp\..*$",
    r"layers\.1\d*\.(?:self_attn|mlp)\.\w+",
    r"(?P<part>self_attn|mlp)\.[a-z]{1,6}_proj",
    r".*[^.]q_proj",
    r".*?\b1\b.*",
    r"q_proj|model\.layers\.1\..*",
    "",
    "model",
    "proj",
    ".",
    ".*",
    "^q_proj$",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj|q_proj|o_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|o_proj)))",
]


@pytest.mark.parametrize("text", COMMON)
def test_common_patterns_select_what_peft_selects(text: str) -> None:
    whole, end = whole_path(text), path_end(text)
    for path in PATHS:
        assert whole(path) == bool(match_target_against_key(text, path)), (text, path)
        assert end(path) == (get_pattern_key([text], path) == text), (text, path)


def test_the_common_patterns_select_something_and_not_everything() -> None:
    selected = [sum(map(path_end(text), PATHS)) for text in COMMON]
    assert sum(0 < count < len(PATHS) for count in selected) > 8


@pytest.mark.parametrize(
    "text", ["layers", "model.layers", ".*layers", "laye.s", "h", "(la)yers", "layer", "^model.l*"]
)
def test_layer_lists_find_what_peft_finds(text: str) -> None:
    found = layer_list(text)
    for path in (*PATHS, "layers.3.q_proj", "model.blocks.3.q_proj", "h.3.x"):
        assert found(path) == bool(re.match(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", path)), (text, path)


ATOMS = st.sampled_from([*"ab._1", r"\.", r"\d", r"\w", r"\S", r"\W", "[ab]", "[^a.]", "[a-c_]", r"[\d.-]", "^", "$"])
EDGES = st.sampled_from([r"\b", r"\B", r"\A", ""])
QUANTIFIERS = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{0,2}", "{1,3}?", "{02}"])


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map("|".join)
        | inner.map("({})".format)
        | st.tuples(inner.map("(?:{})".format), QUANTIFIERS).map("".join)
        | st.tuples(ATOMS, QUANTIFIERS).map("".join)
    )


REGEXES = st.recursive(ATOMS | EDGES, _grow, max_leaves=6)
CHARACTERS = st.text(alphabet=r"ab.1-^$\bdAQ*+?{},()[]|:P<>=!#i", max_size=10)
# Not empty: what `\B` means there changed between versions of Python, and no module has that path.
TEXTS = st.lists(st.text(alphabet="ab._1", min_size=1, max_size=7), min_size=1, max_size=8)


@settings(max_examples=600)
@given(REGEXES | CHARACTERS, TEXTS)
def test_what_is_accepted_selects_what_it_selects_in_peft(text: str, paths: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            whole = re.compile(text)
            end = re.compile(rf"(.*\.)?({text})$")
        except re.error:
            return  # PEFT saves no such adapter
    try:
        matchers = whole_path(text), path_end(text)
    except UnsupportedFeature:
        return
    for path in paths:
        assert matchers[0](path) == bool(whole.fullmatch(path)), path
        assert matchers[1](path) == bool(end.match(path)), path


@settings(max_examples=200)
@given(st.recursive(ATOMS.filter(lambda atom: atom not in "^$"), _grow, max_leaves=6), TEXTS)
def test_few_expressions_are_refused(text: str, paths: list[str]) -> None:
    """The random expressions use what is served, but for two ways to count that RE2 reads otherwise."""
    try:
        whole_path(text)
    except UnsupportedFeature:
        assert "{,2}" in text or "{02}" in text or _repeats_a_repetition(text)


def _repeats_a_repetition(text: str) -> bool:
    return re.search(r"[*+?}][*+?{]", text) is not None


@pytest.mark.parametrize("kind", [whole_path, path_end, layer_list])
@pytest.mark.parametrize(
    "text",
    [
        "(",
        ")",
        "a)(b",
        "[a",
        "a**",
        "*a",
        "a{3,2}",
        "[b-a]",
        "a\\",
        "(?=a)",
        "(?!a)",
        "(?<=a)",
        "(?i)a",
        "(?i:a)",
        "(?#a)",
        "(?>a)",
        "(?<a>x)",
        "(a)(?(1)b)",
        r"(a)\1",
        "(?P<a>x)(?P=a)",
        "a++",
        "a{2}+",
        "a{,2}",
        "a{02}",
        "a{1,02}",
        "a{2,99999999999}",
        "(a{1000}){1000}",
        r"\n",
        r"\Z",
        r"\z",
        r"\Qa\E",
        r"\pL",
        r"(a)(b)(c)(d)(e)(f)(g)(h)\10",
        "[[:alpha:]]",
        "\u00e9*",
        "\ud800*",
        "(" * MAX_PATTERN_CHARS,
    ],
)
def test_what_is_not_served_is_refused_by_name(text: str, kind: Callable[[str], PathMatcher]) -> None:
    with pytest.raises(UnsupportedFeature) as refused:
        kind(text)
    assert ascii(text)[:100] in str(refused.value)
    assert str(refused.value).isascii()
    assert len(str(refused.value)) < 400


def test_a_layer_list_with_an_alternative_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match=r"layers_pattern 'layers\|h'"):
        layer_list("layers|h")


def test_long_patterns_are_refused_with_the_limit() -> None:
    assert not whole_path("a|" * (MAX_PATTERN_CHARS // 2))("model")
    with pytest.raises(UnsupportedFeature, match=f"{MAX_PATTERN_CHARS} characters"):
        whole_path("a|" * (MAX_PATTERN_CHARS // 2) + "a")
    with pytest.raises(UnsupportedFeature, match=f"{MAX_INSTRUCTIONS} instructions"):
        path_end(".?" * MAX_INSTRUCTIONS)


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+$",
        "(.*)*!",
        "((((.+)+)+)+)+!",
        r"(\w+\.?)+!",
        "(.*.*.*)*.*.*!",
        "(m|m|.)(o|o|.)" * 16 + "!",
        ".*" * 200 + "!",
        "((.{0,9}){0,9}){0,2}!",
        "(.?){300}!",
        "(|.|..|...)*!",
    ],
)
def test_evil_patterns_end(text: str) -> None:
    """Python's matcher takes from minutes to ages for each of these."""
    assert not any(map(path_end(text), PATHS))
    assert not whole_path(text)("a" * 1000 + "b")


def read(**changes: object) -> tuple[bool, list[ContentError]]:
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **changes}
    config, errors = parse_peft_config(json.dumps(fields).encode(), 8)
    return config is not None, errors


@pytest.mark.parametrize(("limit", "form"), [(MAX_PATTERNS, "n{}"), (MAX_REGEXES, "n{}.*")])
def test_all_patterns_of_a_configuration_are_bounded_together(limit: int, form: str) -> None:
    texts = [form.format(index) for index in range(limit + 1)]
    half = limit // 2
    patterns = {"rank_pattern": dict.fromkeys(texts[:half], 1), "alpha_pattern": dict.fromkeys(texts[half:-2], 1)}
    assert read(**patterns, layers_pattern=texts[-2:-1], layers_to_transform=[0]) == (True, [])
    accepted, errors = read(**patterns, layers_pattern=texts[-2:], layers_to_transform=[0])
    assert not accepted
    assert [type(error) for error in errors] == [UnsupportedFeature]
    for part in (str(limit), str(limit + 1), "rank_pattern, alpha_pattern, layers_pattern"):
        assert part in str(errors[0])


def test_without_re2_names_are_matched_and_the_rest_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    assert path_end("q_proj")(PATHS[0])
    with pytest.raises(UnsupportedFeature, match=r"'\.\*q_proj' needs the package google-re2"):
        path_end(".*q_proj")
