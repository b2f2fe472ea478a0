"""JSON as strangers send it: duplicate keys, NaN, infinities and bottomless nesting are refused, not interpreted."""

import json
import math
from typing import Any, NoReturn

from lorasrv_adapters.errors import MalformedFile, quote


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`, which must already be within a size cap; raises MalformedFile naming `what`."""

    def refuse_constant(text: str) -> NoReturn:
        raise MalformedFile(f"{what}: {text} is not a JSON number")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise MalformedFile(f"{what}: number {quote(text)} overflows")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise MalformedFile(f"{what}: key {quote(twice)} occurs twice")
        return found

    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite
        )
    except UnicodeDecodeError as error:
        raise MalformedFile(f"{what}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise MalformedFile(f"{what}: JSON nested too deep") from None
    except json.JSONDecodeError as error:
        raise MalformedFile(f"{what}: not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise MalformedFile(f"{what}: an integer has too many digits") from None
    if not isinstance(value, dict):
        raise MalformedFile(f"{what}: a JSON object is expected, not a {type(value).__name__}")
    return value
