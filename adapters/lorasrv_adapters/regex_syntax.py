"""The regular expressions that an adapter's configuration may hold, parsed by allow-list.

Strangers write them, so Python's backtracking matcher never sees them: `patterns` runs what is parsed here without
going back. Served are literals, `.`, sets, `\\d \\w \\s` and their negations, groups that nothing refers to,
alternation, quantifiers (lazy ones select the same modules), `^ $ \\A \\Z \\b \\B`: all that a true regular language
needs. Look-around, back-references, flags, possessive quantifiers and atomic groups are refused by name. What is
accepted means what it means to Python's `re` on ASCII text.
"""

import string
from dataclasses import dataclass
from enum import Enum

from lorasrv_adapters.errors import ContentError, InvalidAdapter, UnsupportedFeature, quote

MAX_PATTERN_CHARS = 4096
MAX_GROUP_DEPTH = 32

_ASCII = frozenset(map(chr, range(128)))
_NO_NEWLINE = _ASCII - {"\n"}
_DIGITS = frozenset(string.digits)
WORD_CHARS = frozenset(string.ascii_letters + string.digits + "_")
_SPACES = frozenset(" \t\n\r\f\v\x1c\x1d\x1e\x1f")
_CLASSES = {
    "d": _DIGITS,
    "D": _ASCII - _DIGITS,
    "w": WORD_CHARS,
    "W": _ASCII - WORD_CHARS,
    "s": _SPACES,
    "S": _ASCII - _SPACES,
}


class Place(Enum):
    """What an assertion asks of the place between two characters."""

    START = "start"
    END = "end"
    WORD_EDGE = "word edge"
    NO_WORD_EDGE = "no word edge"


_PLACES = {"A": Place.START, "Z": Place.END, "b": Place.WORD_EDGE, "B": Place.NO_WORD_EDGE}


@dataclass(frozen=True)
class Chars:
    """One character out of a set."""

    accepted: frozenset[str]


@dataclass(frozen=True)
class Assertion:
    place: Place


@dataclass(frozen=True)
class Sequence:
    items: "tuple[Node, ...]"


@dataclass(frozen=True)
class Choice:
    options: "tuple[Node, ...]"


@dataclass(frozen=True)
class Repeat:
    """`body` from `low` to `high` times; `high` None is without end."""

    body: "Node"
    low: int
    high: int | None


Node = Chars | Assertion | Sequence | Choice | Repeat
ANY = Chars(_NO_NEWLINE)
DOT = Chars(frozenset("."))
DIGIT = Chars(_DIGITS)


def parse_pattern(text: str) -> Node:
    """Raises InvalidAdapter for what is no regular expression, UnsupportedFeature for what is not served."""
    if len(text) > MAX_PATTERN_CHARS:
        raise UnsupportedFeature(
            f"pattern {quote(text)} has {len(text)} characters; the limit is {MAX_PATTERN_CHARS} characters"
        )
    return _Parser(text).parse()


class _Parser:
    """Recursive descent over one pattern; used once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._names: set[str] = set()

    def parse(self) -> Node:
        node = self._choice()
        if self._at < len(self._text):
            raise self._invalid("unbalanced )")
        return node

    def _choice(self) -> Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Node:
        items: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            items.append(self._quantified())
        return Sequence(tuple(items))

    def _quantified(self) -> Node:
        node = self._atom()
        bounds = self._quantifier()
        if bounds is None:
            return node
        if isinstance(node, Assertion):
            raise self._invalid("nothing to repeat")
        if not self._take("?") and self._peek() == "+":
            raise self._unsupported("possessive quantifiers")
        if self._quantifier() is not None:
            raise self._invalid("multiple repeat")
        return Repeat(node, *bounds)

    def _quantifier(self) -> tuple[int, int | None] | None:
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(mark):
                return bounds
        if not self._take("{"):
            return None
        low = self._number()
        high = self._number() if self._take(",") else low
        if not self._take("}") or (low is None and high is None):
            raise self._unsupported("a { that begins no {m}, {m,}, {,n} or {m,n}")
        if low is not None and high is not None and low > high:
            raise self._invalid("min repeat greater than max repeat")
        return low or 0, high

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._set()
        if char == "\\":
            return self._escape()
        if char in "*+?":
            raise self._invalid("nothing to repeat")
        if char == "{":
            raise self._unsupported("a { that repeats nothing")
        if char == ".":
            return ANY
        if char in "^$":
            return Assertion(Place.START if char == "^" else Place.END)
        return Chars(frozenset(char))

    def _group(self) -> Node:
        if self._take("?"):
            self._group_kind()
        self._depth += 1
        if self._depth > MAX_GROUP_DEPTH:
            raise self._unsupported(f"groups nested more than {MAX_GROUP_DEPTH} deep")
        node = self._choice()
        self._depth -= 1
        if not self._take(")"):
            raise self._invalid("missing )")
        # Grouping ends an assertion's being an item of its own: Python lets `(^)*` pass, but not `^*`.
        return Sequence((node,))

    def _group_kind(self) -> None:
        if self._take(":"):
            return
        if not self._take("P<"):
            raise self._unsupported("look-around, flags, back-references and other (?...) groups")
        name, closed, _ = self._text[self._at :].partition(">")
        if not closed or not name.isidentifier() or not name.isascii() or name in self._names:
            raise self._invalid(f"bad or repeated group name {quote(name)}")
        self._names.add(name)
        self._at += len(name) + 1

    def _escape(self) -> Node:
        char = self._next()
        if char in _CLASSES:
            return Chars(_CLASSES[char])
        if char in _PLACES:
            return Assertion(_PLACES[char])
        return Chars(frozenset(self._escaped_literal(char)))

    def _escaped_literal(self, char: str) -> str:
        if char.isascii() and char.isalnum():
            raise self._unsupported(f"the escape \\{char}")
        return char

    def _set(self) -> Node:
        negated = self._take("^")
        accepted: frozenset[str] = frozenset()
        first = self._at
        while self._at == first or self._peek() != "]":
            accepted |= self._set_item()
        self._at += 1
        return Chars(_ASCII - accepted if negated else accepted)

    def _set_item(self) -> frozenset[str]:
        low = self._set_member()
        if self._peek() != "-" or self._text[self._at + 1 : self._at + 2] in ("]", ""):
            return low
        self._at += 1
        high = self._set_member()
        if len(low) != 1 or len(high) != 1 or min(low) > min(high):
            raise self._invalid("bad character range")
        (begin,), (end,) = low, high
        return frozenset(char for char in _ASCII if begin <= char <= end) | low | high

    def _set_member(self) -> frozenset[str]:
        char = self._next()
        if char == "\\":
            char = self._next()
            return _CLASSES.get(char) or frozenset(self._escaped_literal(char))
        if char in "[]" or (char in "-&~|" and self._peek() == char):
            raise self._unsupported(f"an unescaped {char} here in a set")
        return frozenset(char)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at == len(self._text):
            raise self._invalid("it ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, mark: str) -> bool:
        found = self._text.startswith(mark, self._at)
        self._at += len(mark) if found else 0
        return found

    def _number(self) -> int | None:
        begin = self._at
        while self._peek() in _DIGITS:
            self._at += 1
        return int(self._text[begin : self._at]) if self._at > begin else None

    def _invalid(self, why: str) -> ContentError:
        return InvalidAdapter(f"pattern {quote(self._text)} is no regular expression: {why}, at character {self._at}")

    def _unsupported(self, what: str) -> ContentError:
        return UnsupportedFeature(f"pattern {quote(self._text)}: {what} are not served, at character {self._at}")
