"""Streamed text against a decode of all bytes at once, on the two families of tokenizers in use."""

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lorasrv.engine.text import TextStream
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.errors import InvalidRequest


def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte, and merges that cut characters anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [
        "".join(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0])
        for text in ("hello", " world", "你", "😀", "é")
    ]
    pieces = [*alphabet, *spelled, spelled[2][:2], spelled[3][1:], spelled[4][1:] + alphabet[0]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: words with a leading ▁, and <0xNN> for what the vocabulary lacks."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in ("▁hello", "▁world", "▁", "lo", "é", "你", "\ufffd", "▁▁"):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    vocab = tokenizer.get_vocab()
    return [vocab[token] for token in tokens]


def fallback_bytes(data: bytes) -> list[int]:
    return list(data)  # in BYTE_FALLBACK, <0xNN> is token NN


def level_bytes(data: bytes) -> list[int]:
    return ids(BYTE_LEVEL, *(LEVEL_SPELLED[byte] for byte in data))


LEVEL_ALPHABET = {c for c in pre_tokenizers.ByteLevel.alphabet() if ord(c) < 256}
LEVEL_MOVED = (byte for byte in range(256) if chr(byte) not in LEVEL_ALPHABET)
LEVEL_SPELLED = {ord(c): c for c in LEVEL_ALPHABET} | {byte: chr(256 + n) for n, byte in enumerate(LEVEL_MOVED)}


def deltas(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    stream = TextStream(Vocabulary(tokenizer), prompt, ())
    return [*(stream.push([token]).text for token in tokens), stream.finish().text]


def full_text(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """What the tokens say behind the prompt, decoded in one go."""
    if tokenizer is BYTE_LEVEL:
        return tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
    # Tokenizer.decode would replace a whole run of <0xNN> for one bad byte, so the bytes are joined here.
    special = ids(tokenizer, "<s>", "</s>")
    spelled = [(token, tokenizer.id_to_token(token) or "") for token in prompt + tokens if token not in special]
    joined = b"".join(bytes([token]) if token < 256 else word.replace("▁", " ").encode() for token, word in spelled)
    text = joined.decode("utf-8", "replace")
    return text.removeprefix(" ")[len(tokenizer.decode(prompt)) :]


# The last three end inside a character.
LEVEL_PROMPTS = [
    ["<s>"],
    [],
    ["A"],
    *([LEVEL_SPELLED[byte] for byte in cut] for cut in (b"\xe4", b"A\xf0\x9f", b"\xc3\xe4\xbd")),
]


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Tokenizer, list[int], list[int]]:
    tokenizer = draw(st.sampled_from([BYTE_LEVEL, BYTE_FALLBACK]))
    prompt = draw(st.sampled_from([["<s>"], ["<s>", "é"], []] if tokenizer is BYTE_FALLBACK else LEVEL_PROMPTS))
    # Whole characters split into bytes, between tokens of any kind, invalid bytes among them.
    token = st.integers(0, tokenizer.get_vocab_size() - 1).map(lambda i: [i])
    encode = level_bytes if tokenizer is BYTE_LEVEL else fallback_bytes
    split = st.sampled_from("é你😀 ~").map(lambda character: encode(character.encode()))
    tokens = [i for part in draw(st.lists(token | split, max_size=40)) for i in part]
    if tokenizer is BYTE_FALLBACK and not any(i >= 256 for i in ids(tokenizer, *prompt)[1:]):
        tokens = [*ids(tokenizer, "lo"), *tokens]  # a space byte that opens a text is stripped by no rule worth keeping
    return tokenizer, ids(tokenizer, *prompt), tokens


@given(outputs())
@example((BYTE_LEVEL, [], level_bytes(b"\xff" * 60 + "😀".encode() * 9 + b"\xf0\x9f\x98" * 9)))
@example((BYTE_FALLBACK, ids(BYTE_FALLBACK, "é"), fallback_bytes(b"\xff" * 60 + "😀".encode() * 9 + b"\xf0\x9f" * 9)))
@example((BYTE_FALLBACK, ids(BYTE_FALLBACK, "<s>"), ids(BYTE_FALLBACK, "lo", "▁world", "é", "▁▁", "你", "<0x41>") * 20))
@example((BYTE_FALLBACK, ids(BYTE_FALLBACK, "<s>"), ids(BYTE_FALLBACK, "lo", "▁hello", "\ufffd") * 20))
def test_deltas_add_up_to_the_full_decode(case: tuple[Tokenizer, list[int], list[int]]) -> None:
    tokenizer, prompt, tokens = case
    assert "".join(deltas(tokenizer, prompt, tokens)) == full_text(tokenizer, prompt, tokens)


@given(outputs(), st.lists(st.text("lo é你h�", min_size=1, max_size=4), max_size=3), st.randoms())
def test_chunking_changes_nothing(
    case: tuple[Tokenizer, list[int], list[int]], stop: list[str], draw: random.Random
) -> None:
    tokenizer, prompt, tokens = case
    whole = TextStream(Vocabulary(tokenizer), prompt, tuple(stop))
    expected = whole.push(tokens)
    expected_rest = whole.finish()
    stream = TextStream(Vocabulary(tokenizer), prompt, tuple(stop))
    text, rest = "", tokens
    while rest:
        size = draw.randint(1, len(rest))
        text += stream.push(rest[:size]).text
        rest = rest[size:]
    end = stream.finish()
    assert (text + end.text, end.stop) == (expected.text + expected_rest.text, expected_rest.stop)
    assert stream.num_tokens == whole.num_tokens


@given(outputs(), st.lists(st.text("lo é你h�", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_complete_stop_string(
    case: tuple[Tokenizer, list[int], list[int]], stop: list[str]
) -> None:
    tokenizer, prompt, tokens = case
    full = full_text(tokenizer, prompt, tokens)
    # Brute force: grow the text a character at a time until it ends with a stop string.
    expected, matched = full, None
    for end in range(len(full) + 1):
        if ending := [string for string in stop if full[:end].endswith(string)]:
            matched = max(ending, key=len)
            expected = full[: end - len(matched)]
            break
    stream = TextStream(Vocabulary(tokenizer), prompt, tuple(stop))
    text = "".join(stream.push([token]).text for token in tokens)
    last = stream.finish()
    assert (text + last.text, last.stop) == (expected, matched)


def test_a_split_character_comes_whole() -> None:
    assert deltas(BYTE_LEVEL, [], level_bytes("a你".encode())) == ["a", "", "", "你", ""]
    assert deltas(BYTE_FALLBACK, [], fallback_bytes("a😀".encode())) == ["a", "", "", "", "😀", ""]


def test_a_character_cut_short_is_replaced_when_it_cannot_be_completed() -> None:
    assert deltas(BYTE_LEVEL, [], level_bytes(b"\xe4\xbdb\xf0\x9f")) == ["", "", "\ufffdb", "", "", "\ufffd"]
    assert deltas(BYTE_FALLBACK, [], fallback_bytes(b"\xe4\xbdb\xf0\x9f")) == ["", "", "\ufffdb", "", "", "\ufffd"]


def test_a_special_token_inside_a_character_is_skipped() -> None:
    start, *rest = level_bytes("你".encode())
    assert "".join(deltas(BYTE_LEVEL, [], [start, *ids(BYTE_LEVEL, "<s>"), *rest])) == "你"


def test_an_id_outside_the_vocabulary_is_skipped() -> None:
    assert deltas(BYTE_LEVEL, [], [*ids(BYTE_LEVEL, "hello"), 10_000]) == ["hello", "", ""]


def test_the_leading_space_depends_on_the_prompt() -> None:
    hello_world = ids(BYTE_FALLBACK, "▁hello", "▁world")
    assert deltas(BYTE_FALLBACK, ids(BYTE_FALLBACK, "<s>"), hello_world) == ["hello", " world", ""]
    assert deltas(BYTE_FALLBACK, ids(BYTE_FALLBACK, "<s>", "▁hello"), hello_world) == [" hello", " world", ""]
    after_specials = ids(BYTE_FALLBACK, "▁hello", *["</s>"] * 50)
    assert deltas(BYTE_FALLBACK, after_specials, hello_world) == [" hello", " world", ""]


def test_a_prompt_that_ends_in_a_replacement_character_is_not_repeated() -> None:
    assert deltas(BYTE_LEVEL, level_bytes("\ufffd".encode()), ids(BYTE_LEVEL, "hello")) == ["hello", ""]


def test_a_stop_string_inside_one_token_and_across_tokens() -> None:
    tokens = ids(BYTE_LEVEL, "hello", "\u0120world", "hello")
    stream = TextStream(Vocabulary(BYTE_LEVEL), [], ("o w",))
    assert stream.push(tokens[:1]).text == "hell"
    last = stream.push(tokens[1:])
    assert (last.text, last.stop) == ("", "o w")
    assert stream.num_tokens == 2
    assert (stream.push(tokens).text, stream.finish().text) == ("", "")
    assert TextStream(Vocabulary(BYTE_LEVEL), [], ("ll",)).push(tokens).text == "he"


@pytest.mark.parametrize(
    ("stop", "text", "matched"),
    [(("lo", "ell"), "h", "ell"), (("hello", "l"), "he", "l"), (("o", "llo"), "he", "llo")],
)
def test_of_several_matches_in_a_token_the_first_to_complete_wins(
    stop: tuple[str, ...], text: str, matched: str
) -> None:
    delta = TextStream(Vocabulary(BYTE_LEVEL), [], stop).push(ids(BYTE_LEVEL, "hello"))
    assert (delta.text, delta.stop) == (text, matched)


def test_a_stop_string_that_begins_inside_a_character_of_bytes() -> None:
    stream = TextStream(Vocabulary(BYTE_LEVEL), [], ("你b",))
    texts = [stream.push([token]).text for token in level_bytes("a你bc".encode())]
    assert texts == ["a", "", "", "", "", ""]
    assert stream.finish().stop == "你b"


def test_what_only_might_have_been_a_stop_string_comes_out() -> None:
    stream = TextStream(Vocabulary(BYTE_LEVEL), [], ("hello!", "lox"))
    assert stream.push(ids(BYTE_LEVEL, "hello")).text == ""
    assert stream.push(ids(BYTE_LEVEL, "\u0120world")).text == "hello world"
    assert stream.push(ids(BYTE_LEVEL, "hello")).text == ""
    last = stream.finish()
    assert (last.text, last.stop) == ("hello", None)


@BOTH
def test_a_token_that_always_adds_the_same_is_known(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    known = {i: found for i in range(tokenizer.get_vocab_size()) if (found := vocabulary.bytes_of(i)) is not None}
    assert len(known) >= 256
    front = ids(tokenizer, "lo" if tokenizer is BYTE_FALLBACK else "hello")  # where a leading space stays
    for token_id, found in known.items():
        assert tokenizer.decode([*front, token_id]) == tokenizer.decode(front) + found.decode("utf-8", "replace")
    assert vocabulary.bytes_of(10_000) == b""


def test_an_added_token_is_text_as_the_decoder_has_it() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>", "wĠx", "a b", "你"])
    vocabulary = Vocabulary(tokenizer)
    tokens = [tokenizer.token_to_id(token) for token in ("<tool>", "wĠx", "a b", "你")]
    assert [(vocabulary.bytes_of(i) or b"").decode() for i in tokens] == [tokenizer.decode([i]) for i in tokens]
    assert TextStream(vocabulary, []).push(tokens).text == tokenizer.decode(tokens)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        TextStream(Vocabulary(BYTE_LEVEL), [], ("a", ""))


@BOTH
@pytest.mark.parametrize("word", [b"a", b"\xff", b"\xe4\xbd\xa0", b"\xf0\x9f"])
def test_the_cost_of_a_token_does_not_grow(tokenizer: Tokenizer, word: bytes) -> None:
    encode = level_bytes if tokenizer is BYTE_LEVEL else fallback_bytes
    counting = CountingTokenizer(tokenizer)
    stream = TextStream(Vocabulary(counting), [])
    tokens = encode(word * 2000)
    stream.push(tokens)
    assert counting.longest <= 16
    assert counting.num_decoded <= 32 * len(tokens)


class CountingTokenizer:
    """Counts what is decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoder = tokenizer.decoder
        self.longest = 0
        self.num_decoded = 0

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(token_ids))
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
