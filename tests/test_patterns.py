"""Patterns select what Python's `re` and PEFT select, and no pattern takes longer than its budget."""

import re
import warnings
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key, match_target_against_key

from lorasrv_adapters.errors import ContentError, InvalidAdapter, UnsupportedFeature
from lorasrv_adapters.patterns import PathMatcher, StepBudget, layer_list, path_end, whole_path
from lorasrv_adapters.regex_syntax import MAX_GROUP_DEPTH, MAX_PATTERN_CHARS, parse_pattern

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
    r"[\w.]+(?<part>)?",
    r"(?i)Q_PROJ",
    r"(?!model).*",
    r".*(?=proj)proj",
    "",
    "model",
    "proj",
    ".",
    ".*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:k_proj|v_proj|q_proj|o_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|o_proj)))",
]


def matcher(kind: Callable[[str, StepBudget], PathMatcher], text: str) -> PathMatcher | None:
    """None when the pattern is refused."""
    try:
        return kind(text, StepBudget())
    except ContentError:
        return None


@pytest.mark.parametrize("text", COMMON)
def test_common_patterns_select_what_peft_selects(text: str) -> None:
    whole, end = matcher(whole_path, text), matcher(path_end, text)
    if whole is None or end is None:
        assert whole is end
        assert "(?" in text, "only look-around, flags and bad groups are refused here"
        return
    for path in PATHS:
        assert whole(path) == bool(match_target_against_key(text, path)), (text, path)
        assert end(path) == (get_pattern_key([text], path) == text), (text, path)


def test_the_common_patterns_select_something_and_not_everything() -> None:
    selected = {text: sum(map(found, PATHS)) for text in COMMON if (found := matcher(path_end, text))}
    assert len(selected) > 12
    assert sum(0 < count < len(PATHS) for count in selected.values()) > 8


@pytest.mark.parametrize(
    "text", ["layers", "model.layers", ".*layers", "laye.s", "h", "(layers|h)", "layer", "^model.layers", "s"]
)
def test_layer_lists_find_what_peft_finds(text: str) -> None:
    found = layer_list(text, StepBudget())
    for path in (*PATHS, "layers.3.q_proj", "model.blocks.3.q_proj", "h.3.x"):
        assert found(path) == bool(re.match(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", path)), (text, path)


def test_a_layer_list_with_a_bare_alternative_is_refused() -> None:
    with pytest.raises(UnsupportedFeature, match="layers_pattern"):
        layer_list("layers|h", StepBudget())


ATOMS = st.sampled_from(
    [
        *"ab._1",
        r"\.",
        r"\d",
        r"\w",
        r"\S",
        r"\W",
        "[ab]",
        "[^a.]",
        "[a-c_]",
        r"[\d.-]",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "",
    ]
)
QUANTIFIERS = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,2}", "{0,2}", "{1,3}?"])


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=1, max_size=3).map("|".join)
        | inner.map("({})".format)
        | st.tuples(inner.map("(?:{})".format), QUANTIFIERS).map("".join)
        | st.tuples(ATOMS, QUANTIFIERS).map("".join)
    )


REGEXES = st.recursive(ATOMS, _grow, max_leaves=6)
TEXTS = st.text(alphabet="ab._1", max_size=7)


def compare(pattern: str, texts: list[str]) -> bool:
    """False when the pattern is refused, which Python may not do where we accept."""
    found = matcher(whole_path, pattern)
    if found is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        compiled = re.compile(pattern)
    for text in texts:
        assert found(text) == bool(compiled.fullmatch(text)), (pattern, text)
    return True


@settings(max_examples=400, deadline=None)
@given(REGEXES, st.lists(TEXTS.filter(bool), min_size=1, max_size=8))
def test_random_expressions_agree_with_python(pattern: str, texts: list[str]) -> None:
    """An empty text is left out: what `\\B` means there changed between versions of Python."""
    try:
        re.compile(pattern)
    except re.error:
        assert matcher(whole_path, pattern) is None
    else:
        assert compare(pattern, texts), pattern


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=r"ab.1-^$\bdA*+?{},()[]|:P<>=!#", max_size=10), st.lists(TEXTS.filter(bool), max_size=4))
def test_random_characters_are_refused_or_agree_with_python(pattern: str, texts: list[str]) -> None:
    compare(pattern, texts)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("(", InvalidAdapter),
        (")", InvalidAdapter),
        ("a)|(b", InvalidAdapter),
        ("[a", InvalidAdapter),
        ("a**", InvalidAdapter),
        ("*a", InvalidAdapter),
        ("^*", InvalidAdapter),
        ("a{3,2}", InvalidAdapter),
        ("[b-a]", InvalidAdapter),
        ("\\", InvalidAdapter),
        ("(?P<a>x)(?P<a>y)", InvalidAdapter),
        ("(?=a)", UnsupportedFeature),
        ("(?!a)", UnsupportedFeature),
        ("(?<=a)", UnsupportedFeature),
        ("(?i)a", UnsupportedFeature),
        ("(?i:a)", UnsupportedFeature),
        ("(?#a)", UnsupportedFeature),
        ("(?>a)", UnsupportedFeature),
        ("(a)(?(1)b)", UnsupportedFeature),
        (r"(a)\1", UnsupportedFeature),
        ("(?P<a>x)(?P=a)", UnsupportedFeature),
        ("a++", UnsupportedFeature),
        ("a{2}+", UnsupportedFeature),
        (r"\n", UnsupportedFeature),
        ("a{", UnsupportedFeature),
        ("[[a]", UnsupportedFeature),
        ("[a&&b]", UnsupportedFeature),
        ("(" * (MAX_GROUP_DEPTH + 1) + ")" * (MAX_GROUP_DEPTH + 1), UnsupportedFeature),
        ("(" * MAX_PATTERN_CHARS, UnsupportedFeature),
        ("a" * (MAX_PATTERN_CHARS + 1), UnsupportedFeature),
    ],
)
def test_what_is_not_served_is_refused_by_name(text: str, kind: type[ContentError]) -> None:
    with pytest.raises(ContentError) as refused:
        parse_pattern(text)
    assert type(refused.value) is kind
    assert repr(text)[1:100] in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "(.*)*!",
        "((((.+)+)+)+)+!",
        r"(\w+\.?)+!",
        "(.*.*.*)*.*.*!",
        "(m|m|.)(o|o|.)" * 16 + "!",
        ".*" * 200 + "!",
        "((.{0,9}){0,9}){0,9}!",
        "((((.?){9}){9}){2}){2}!",
        "(|.|..|...)*!",
    ],
)
def test_evil_patterns_end(text: str) -> None:
    """Python's matcher takes from minutes to ages for each of these."""
    budget = StepBudget()
    found = path_end(text, budget)
    assert not any(map(found, PATHS))
    assert whole_path(text[:-1], budget)("model.layers.10.self_attn.q_proj")


@pytest.mark.parametrize(
    "text",
    ["(a{1000}){1000}", "(((){9999}){9999}){9999}", "a{1000000000}", ("(.?){60}" * 100 + "!"), ".?" * 2000 + "!"],
)
def test_what_takes_too_many_steps_is_refused_with_the_limit(text: str) -> None:
    budget = StepBudget()
    with pytest.raises(UnsupportedFeature, match="5000000 steps"):
        sum(map(whole_path(text, budget), PATHS))


def test_the_budget_is_shared_and_counts_plain_names_too() -> None:
    budget = StepBudget(2000)
    path_end("q_proj", budget)
    with pytest.raises(UnsupportedFeature, match="2000 steps"):
        for _ in range(9):
            path_end("q_proj", budget)
