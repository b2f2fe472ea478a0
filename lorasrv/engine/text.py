"""Token ids to text, as they come: never half a character, never text at or behind a stop string."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.errors import ConfigurationError, InvalidRequest

_REPLACEMENT = "\ufffd"
# A token's text depends on its neighbours only: the leading space on whether any token stands before it, a split
# character on the at most three bytes before. So a short window decodes to the same ending as the whole output.
_WINDOW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """Text that is final, and the stop string that ended the output, if one did."""

    text: str
    stop: str | None = None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The model's tokenizer.json, special tokens included as it says; raises ConfigurationError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigurationError(f"{folder.name} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ConfigurationError(f"{folder.name}/tokenizer.json cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """The text of one running request. Owned by one thread; decoding a token costs the same at any length of output.

    The deltas up to and with `finish()` add up to what the tokenizer makes of the tokens as a continuation of the
    prompt, special tokens skipped, cut before the first stop string. Invalid UTF-8 comes out as U+FFFD, one for each
    maximal invalid part. (`Tokenizer.decode` agrees for byte-level vocabularies. For `<0xNN>` tokens it would spoil a
    whole run of bytes, characters already sent included, for one invalid byte behind them.)

    Stop strings are looked for behind the text of the first `min_tokens` tokens only.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
    ) -> None:
        decoder = _ByteDecoder if vocabulary.is_byte_level else _WindowDecoder
        self._decoder = decoder(vocabulary, prompt_token_ids)
        self._min_tokens = min_tokens
        self._stops = _StopMatcher(stop) if stop else None
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far; those behind the token that completed a stop string do not count."""
        return self._num_tokens

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens. After a delta with `stop`, further tokens are ignored."""
        if self._stops is None:
            self._num_tokens += len(token_ids)
            return TextDelta(text=self._decoder.push(token_ids))
        text = ""
        for token_id in token_ids:
            if self._stops.matched is not None:
                break
            self._num_tokens += 1
            decoded = self._decoder.push((token_id,))
            text += decoded if self._num_tokens <= self._min_tokens else self._stops.push(decoded)
        return TextDelta(text=text, stop=self._stops.matched)

    def finish(self) -> TextDelta:
        """No token follows: what was held back."""
        rest = self._decoder.finish()
        if self._stops is None:
            return TextDelta(text=rest)
        text = self._stops.push(rest) + self._stops.finish()
        return TextDelta(text=text, stop=self._stops.matched)


class _ByteDecoder:
    """Tokens of a byte-level vocabulary to text that no later token can change."""

    def __init__(self, vocabulary: Vocabulary, prompt_token_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode(prompt_token_ids[-_WINDOW_TOKENS:])
        # A character that the prompt began is the prompt's.
        self._num_foreign = 1 if self._decoder.getstate()[0] else 0

    def push(self, token_ids: Sequence[int]) -> str:
        return self._own(self._decode(token_ids))

    def finish(self) -> str:
        return self._own(self._decoder.decode(b"", final=True))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(filter(None, map(self._vocabulary.bytes_of, token_ids))))

    def _own(self, text: str) -> str:
        if text and self._num_foreign:
            self._num_foreign = 0
            return text[1:]
        return text


class _WindowDecoder:
    """Tokens of any other vocabulary to text that no later token can change."""

    def __init__(self, vocabulary: Vocabulary, prompt_token_ids: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if len(self._window) == _WINDOW_TOKENS:
                break
            if vocabulary.bytes_of(token_id) != b"":
                self._window.insert(0, token_id)
        self._num_chars: int | None = None  # of the window's text, where it is known
        self._held = ""  # a U+FFFD at the window's end that may yet become a character
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._push_one, token_ids))

    def finish(self) -> str:
        text = self._bytes.decode(b"", final=True) + self._held
        self._held = ""
        return text

    def _push_one(self, token_id: int) -> str:
        byte = self._vocabulary.bytes_of(token_id)
        if byte == b"":
            return ""
        text = self._push_token(token_id) if byte is None else self._push_byte(token_id, byte)
        if len(self._window) >= 2 * _WINDOW_TOKENS:
            del self._window[:-_WINDOW_TOKENS]
            self._num_chars = None
        return text

    def _push_token(self, token_id: int) -> str:
        invalid = self._bytes.decode(b"", final=True)
        if self._num_chars is None:
            self._num_chars = len(self._vocabulary.decode(self._window))
        start = self._num_chars - len(self._held)
        self._window.append(token_id)
        text = self._vocabulary.decode(self._window)
        self._num_chars = len(text)
        self._held = _REPLACEMENT if text.endswith(_REPLACEMENT) else ""
        return invalid + text[start : len(text) - len(self._held)]

    def _push_byte(self, token_id: int, byte: bytes) -> str:
        text = self._held + self._bytes.decode(byte)
        self._held = ""
        self._window.append(token_id)
        self._num_chars = None
        return text


class _StopMatcher:
    """Lets text pass up to the first stop string; holds back an ending that may become one.

    The match that completes first wins, and of two that complete at the same character the longer: that does not
    depend on how the text was cut into tokens.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        if "" in stop:
            raise InvalidRequest("stop", "a stop string is empty")
        self._stop = stop
        self._longest = max(map(len, stop))
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(string), at, string) for string in self._stop if (at := text.find(string)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at]
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text

    def _first_possible_start(self, text: str) -> int:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(string.startswith(text[start:]) for string in self._stop):
                return start
        return len(text)
