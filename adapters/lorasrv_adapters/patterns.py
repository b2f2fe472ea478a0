"""How PEFT matches module paths against patterns, in time linear in the path whatever the pattern.

Strangers write the patterns, so what is more than a name runs in RE2, which never goes back, and not in Python's
matcher. What RE2 lacks, or reads otherwise than Python, is refused: what is accepted selects what it selects in PEFT.
"""

import re
from collections.abc import Callable

from lorasrv_adapters.errors import UnsupportedFeature, quote

PathMatcher = Callable[[str], bool]

MAX_PATTERN_CHARS = 4096
MAX_INSTRUCTIONS = 1024  # RE2 stays quick as long as its memory suffices, as it does for so many
_MAX_MEMORY_BYTES = 1 << 20

# Names and paths, where `.` may stand for itself or for any character: Python's own matcher never goes back far.
_NAME = re.compile(r"\^?[A-Za-z0-9_.]{1,256}\$?")
# Flags, look-around and odd groups; escapes but the classes, \b, \B, \A and punctuation; POSIX classes; and numbers of
# repetitions that only Python takes for such: without the lower one, with a leading zero, or very large. No model's
# modules are other than ASCII.
_NOT_COMMON = re.compile(r"\(\?(?!:|P<)|\\(?![dDwWsSbBA])[A-Za-z0-9]|\[:|\{(?:,|(?:\d+,)?(?:0\d|\d{4}))|[^\0-\x7f]")


def is_name(text: str) -> bool:
    """Whether the pattern costs next to nothing."""
    return _NAME.fullmatch(text) is not None


def whole_path(text: str) -> PathMatcher:
    """As `target_modules` and `exclude_modules` given as a string: the pattern is the whole path."""
    return _matcher(text, "{}")


def path_end(text: str) -> PathMatcher:
    """As the keys of `rank_pattern` and `alpha_pattern`: the pattern is the path or what follows one of its dots."""
    return _matcher(text, r"(?:.*\.)?(?:{})")


def layer_list(text: str) -> PathMatcher:
    """As `layers_pattern`: the pattern names the list whose number is the layer's. Paths hold one number only."""
    if "|" in text:
        # PEFT puts the text into a larger pattern without parentheses, which a bare alternative would cut in two.
        raise UnsupportedFeature(f"layers_pattern {quote(text)} with |; give a list of names instead")
    return _matcher(text, r"(?:^|.*?\.){}\.\d+\..*")


def _matcher(text: str, form: str) -> PathMatcher:
    if is_name(text):
        name = re.compile(form.replace("{}", text))
        return lambda path: name.fullmatch(path) is not None
    if len(text) > MAX_PATTERN_CHARS:
        raise UnsupportedFeature(f"the pattern {quote(text)} is over the limit of {MAX_PATTERN_CHARS} characters")
    if uncommon := _NOT_COMMON.search(text):
        raise UnsupportedFeature(f"the pattern {quote(text)} holds {quote(uncommon[0])}, which is not served")
    _compile(text, text)  # alone, so that a parenthesis in the text cannot close one of the form
    return _compile(form.replace("{}", text), text)


def _compile(pattern: str, text: str) -> PathMatcher:
    """The matcher of `pattern`; `text` is what to call it in an error."""
    try:
        # Here, since a bare GPU box has no RE2, and runs adapters whose patterns are names.
        import re2
    except ModuleNotFoundError as error:
        raise UnsupportedFeature(f"the pattern {quote(text)} needs the package google-re2, not installed") from error
    options = re2.Options()
    options.max_mem = _MAX_MEMORY_BYTES
    options.encoding = re2.Options.Encoding.LATIN1  # `.` is one instruction, not the ten of UTF-8
    options.never_capture = True
    options.log_errors = False
    try:
        compiled = re2.compile(pattern.encode("ascii"), options)
    except re2.error as error:
        reason = quote(error.args[0].decode("ascii"))
        raise UnsupportedFeature(f"the pattern {quote(text)} is not served: {reason}") from error
    if compiled.programsize > MAX_INSTRUCTIONS:
        raise UnsupportedFeature(f"the pattern {quote(text)} is over the limit of {MAX_INSTRUCTIONS} instructions")
    return lambda path: compiled.fullmatch(path.encode()) is not None
