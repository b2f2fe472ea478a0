"""Typed reading of the JSON objects in a model's folder. A refusal names the field and its value. Loads no torch."""

import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorasrv.errors import UnsupportedModel

MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A JSON object; `where` is how its errors name it. A field without a default must be there.

    Where absent and null differ, as in `sliding_window`, the methods called `optional_` keep them apart.
    """

    where: str
    values: Mapping[str, object]

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_INTEGER) -> int:
        """An integer; null is as good as absent."""
        value = self.values.get(key)
        return self._integer(key, default if value is None else value, least, most)

    def optional_integer(self, key: str, default: int | None) -> int | None:
        """An integer >= 1, `default` where absent, None where null."""
        value = self.values.get(key, default)
        return None if value is None else self._integer(key, value, 1)

    def number(self, key: str, default: float | None = None, *, least: float | None = None) -> float:
        """A finite number > 0, or >= `least`."""
        return self._number(key, self.values.get(key, default), least)

    def optional_number(self, key: str, *, least: float | None = None) -> float | None:
        """A finite number > 0, or >= `least`; None where absent or null."""
        value = self.values.get(key)
        return None if value is None else self._number(key, value, least)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "it must be true or false")
        return value

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of strings; None where absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        listed = cast(list[object], value) if isinstance(value, list) else [None]
        found = tuple(item for item in listed if isinstance(item, str))
        if len(found) != len(listed):
            raise self.refusal(key, "it must be a list of names")
        return found

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """A token id field: absent (`default`), null, one id or a list of ids."""
        value = self.values.get(key, default)
        listed = cast(list[object], value) if isinstance(value, list) else [] if value is None else [value]
        return tuple(self._integer(key, item, 0) for item in listed)

    def nested(self, key: str) -> "Fields | None":
        """An object inside this one; None where absent, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refusal(key, "it must be an object")
        return Fields(where=f"{self.where}: {key}", values=cast(dict[str, Any], value))

    def refuse_unless(self, served: Mapping[str, object]) -> None:
        """Refuse another value of a key than the one served; null is as good as absent."""
        for key, only in served.items():
            value = self.values.get(key)
            if value is not None and value != only:
                raise self.refusal(key, f"only {only!r} is served")

    def refuse_unknown(self, known: frozenset[str]) -> None:
        """Refuse keys that nothing here knows and that say something: they may change the model's arithmetic."""
        found = [f"{key} {reprlib.repr(v)}" for key, v in self.values.items() if key not in known and v is not None]
        if found:
            raise UnsupportedModel(f"{self.where}: not known, hence not served: {', '.join(found)}")

    def refusal(self, key: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.where}: {key} is {reprlib.repr(self.values.get(key))}; {why}")

    def _integer(self, key: str, value: object, least: int, most: int = MAX_INTEGER) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refusal(key, f"it must be an integer >= {least} and <= {most}")
        return value

    def _number(self, key: str, value: object, least: float | None) -> float:
        wanted = "> 0" if least is None else f">= {least:g}"
        if not isinstance(value, int | float) or isinstance(value, bool) or not value <= sys.float_info.max:
            raise self.refusal(key, f"it must be a finite number {wanted}")
        if value <= 0 if least is None else value < least:
            raise self.refusal(key, f"it must be a finite number {wanted}")
        return float(value)


def read_fields(folder: Path, name: str) -> Fields:
    """The JSON object in a file of the model's folder. Raises UnsupportedModel, which does not tell the path."""
    try:
        value = json.loads((folder / name).read_bytes())
    except OSError as error:
        raise UnsupportedModel(f"{name} of model {folder.name!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{name} of model {folder.name!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{name} of model {folder.name!r} is not a JSON object")
    return Fields(where=name, values=cast(dict[str, object], value))
