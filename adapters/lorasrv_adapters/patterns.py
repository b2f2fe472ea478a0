"""How PEFT matches module paths against patterns, in bounded time whatever the pattern.

Patterns run as sets of states, one set per character, never going back; sets that were seen are kept, so that the
paths of a model, which differ little, cost little. All patterns of a configuration share one budget counted in steps,
not in seconds: what is accepted at upload is accepted at every later load.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from lorasrv_adapters.errors import UnsupportedFeature, quote
from lorasrv_adapters.regex_syntax import (
    ANY,
    DIGIT,
    DOT,
    WORD_CHARS,
    Assertion,
    Chars,
    Choice,
    Node,
    Place,
    Repeat,
    Sequence,
    parse_pattern,
)

PathMatcher = Callable[[str], bool]

MAX_STEPS = 5_000_000

# A step is about 0.2 microseconds; what stays in memory costs more, so that the budget bounds memory as well.
_STEPS_PER_STATE = 1000
_STEPS_PER_KEPT_STATE = 4
_STEPS_PER_PLAIN_PATTERN = 300
_STEPS_PER_PLAIN_MATCH = 2
# Names and paths, where `.` may stand for itself or for any character: Python's own matcher never goes back far.
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.]{1,256}\$?")
_WHATEVER = Repeat(ANY, 0, None)
_PARENTS = Sequence((_WHATEVER, DOT))


class StepBudget:
    """What is left of the work that one configuration's patterns may cause. Owned by whoever reads it."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._total = self._left = steps

    def spend(self, steps: int) -> None:
        """Raises UnsupportedFeature when nothing is left."""
        self._left -= steps
        if self._left < 0:
            raise UnsupportedFeature(f"patterns that take more than {self._total} steps to match")


def whole_path(text: str, budget: StepBudget) -> PathMatcher:
    """As `target_modules` and `exclude_modules` given as a string: the pattern is the whole path."""
    if _PLAIN.fullmatch(text):
        return _plain(text, budget)
    return _Automaton(parse_pattern(text), budget).matches


def path_end(text: str, budget: StepBudget) -> PathMatcher:
    """As the keys of `rank_pattern` and `alpha_pattern`: the pattern is the path or what follows one of its dots."""
    if _PLAIN.fullmatch(text):
        return _plain(rf"(.*\.)?({text})", budget)
    return _Automaton(Sequence((Repeat(_PARENTS, 0, 1), parse_pattern(text))), budget).matches


def layer_list(text: str, budget: StepBudget) -> PathMatcher:
    """As `layers_pattern`: the pattern names the list whose number is the layer's. Paths hold one number only."""
    node = parse_pattern(text)
    if isinstance(node, Choice):
        # PEFT puts the text into a larger pattern without parentheses, which cuts the larger one in two.
        raise UnsupportedFeature(f"layers_pattern {quote(text)} with | outside of parentheses")
    start = Choice((Assertion(Place.START), _PARENTS))
    number = Sequence((DOT, Repeat(DIGIT, 1, None), DOT))
    return _Automaton(Sequence((start, node, number, _WHATEVER)), budget).matches


def _plain(pattern: str, budget: StepBudget) -> PathMatcher:
    budget.spend(_STEPS_PER_PLAIN_PATTERN)
    compiled = re.compile(pattern)

    def matches(path: str) -> bool:
        budget.spend(_STEPS_PER_PLAIN_MATCH)
        return compiled.fullmatch(path) is not None

    return matches


@dataclass(frozen=True)
class _State:
    """Goes on to `following`: by consuming a character, where an assertion holds, or freely when `test` is None."""

    test: Chars | Assertion | None
    following: tuple[int, ...]


class _Automaton:
    """A pattern's states, and the sets of them that were reached. Used by whoever owns the budget."""

    def __init__(self, node: Node, budget: StepBudget) -> None:
        self._budget = budget
        self._states: list[_State] = [_State(None, ())]  # the first one accepts
        self._start = frozenset({self._add(node, 0)})
        self._steps: dict[tuple[frozenset[int], str | None, str], frozenset[int]] = {}

    def matches(self, path: str) -> bool:
        """Whether the pattern matches all of the path."""
        states, previous = self._start, None
        for char in path:
            self._budget.spend(1)
            known = (states, previous, char)
            if known not in self._steps:
                self._steps[known] = self._step(*known)
            states, previous = self._steps[known], char
        return 0 in self._reach(states, previous, None)

    def _step(self, states: frozenset[int], previous: str | None, char: str) -> frozenset[int]:
        reached = (self._states[index] for index in self._reach(states, previous, char))
        found = frozenset(
            state.following[0] for state in reached if isinstance(state.test, Chars) and char in state.test.accepted
        )
        self._budget.spend(_STEPS_PER_KEPT_STATE * len(found))
        return found

    def _reach(self, states: frozenset[int], previous: str | None, following: str | None) -> set[int]:
        """States to get to from `states` between these two characters, None for none, without consuming one."""
        reached: set[int] = set()
        waiting = list(states)
        while waiting:
            index = waiting.pop()
            if index in reached:
                continue
            self._budget.spend(1)
            reached.add(index)
            state = self._states[index]
            if state.test is None or (
                isinstance(state.test, Assertion) and _holds(state.test.place, previous, following)
            ):
                waiting += state.following
        return reached

    def _add(self, node: Node, after: int) -> int:
        """Append the states of `node`, which go on to `after`; returns the first one."""
        self._budget.spend(_STEPS_PER_STATE)
        if isinstance(node, Sequence):
            for item in reversed(node.items):
                after = self._add(item, after)
            return after
        if isinstance(node, Choice):
            return self._append(None, *(self._add(option, after) for option in node.options))
        if isinstance(node, Repeat):
            return self._add_repeat(node, after)
        return self._append(node, after)

    def _add_repeat(self, repeat: Repeat, after: int) -> int:
        if repeat.high is None:
            loop = self._append(None)
            self._states[loop] = _State(None, (self._add(repeat.body, loop), after))
            after = loop
        else:
            end = after
            for _ in range(repeat.high - repeat.low):
                after = self._append(None, self._add(repeat.body, after), end)
        for _ in range(repeat.low):
            after = self._add(repeat.body, after)
        return after

    def _append(self, test: Chars | Assertion | None, *following: int) -> int:
        self._states.append(_State(test, following))
        return len(self._states) - 1


def _holds(place: Place, previous: str | None, following: str | None) -> bool:
    if place is Place.START:
        return previous is None
    if place is Place.END:
        return following is None
    edge = (previous in WORD_CHARS) != (following in WORD_CHARS)
    return edge == (place is Place.WORD_EDGE)
