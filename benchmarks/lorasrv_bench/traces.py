"""Recorded traffic: the column layouts of BurstGPT, of Azure's LLM inference traces and of Mooncake.

A trace says when requests came and how long they were, never their text and never an adapter.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TextIO

from lorasrv.errors import ConfigurationError

MOONCAKE_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One request of a trace: seconds since its first. Rows of one `session` belong to one conversation.

    `prefix` names the first `prefix_tokens` tokens where a trace tells what prompts share.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    session: str | None = None
    prefix: int | None = None
    prefix_tokens: int = 0


def read_trace(path: Path, limit: int | None) -> list[Row]:
    """At most `limit` requests from the trace's beginning, in order of time.

    BurstGPT: `Timestamp` (seconds), `Request tokens`, `Response tokens`, and `Session ID` where a release has it.
    Azure: `TIMESTAMP` (date and time), `ContextTokens`, `GeneratedTokens`. Mooncake: JSON lines with `timestamp` (ms),
    `input_length`, `output_length`, `hash_ids` (of 512 tokens each). Failed requests, with no tokens one way or the
    other, are left out.

    Mooncake's prompts share prefixes as a tree; a row's prefix is the longest that another row begins with, so overlaps
    that are shorter than that are lost, and hits of a cache come out lower than they were.

    Raises:
        ConfigurationError: the file cannot be read, is of no known layout, or holds no request.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(islice(_rows(path, file), limit))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"trace {str(path)!r} cannot be read: {error}") from None
    if not rows:
        raise ConfigurationError(f"trace {str(path)!r} has no request with tokens both ways")
    rows.sort(key=lambda row: row.at_s)
    return [replace(row, at_s=row.at_s - rows[0].at_s) for row in rows]


def _rows(path: Path, file: TextIO) -> Iterator[Row]:
    if path.suffix in (".jsonl", ".json"):
        yield from _mooncake(path, file)
        return
    table = csv.DictReader(file)
    columns = set(table.fieldnames or ())
    if {"Timestamp", "Request tokens", "Response tokens"} <= columns:
        names, seconds = ("Timestamp", "Request tokens", "Response tokens"), float
    elif {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        names, seconds = ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _wall_clock
    else:
        raise ConfigurationError(f"trace {str(path)!r} has columns {sorted(columns)}: of no known layout")
    for number, line in enumerate(table, 2):
        try:
            at_s, prompt, output = seconds(line[names[0]]), int(line[names[1]]), int(line[names[2]])
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"trace {str(path)!r}, line {number}: {error}") from None
        if prompt > 0 and output > 0:
            session = line.get("Session ID") or None
            yield Row(at_s=at_s, prompt_tokens=prompt, output_tokens=output, session=session)


def _wall_clock(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _mooncake(path: Path, file: TextIO) -> Iterator[Row]:
    found: list[tuple[float, int, int, Sequence[int]]] = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            each = json.loads(line)
            hashes = [int(block) for block in each.get("hash_ids", ())]
            found.append((each["timestamp"] / 1000, int(each["input_length"]), int(each["output_length"]), hashes))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"trace {str(path)!r}, line {number}: {error!r}") from None
    # A block's id is its whole prefix's, so how often an id begins a run says how many share it.
    seen = Counter(block for *_, hashes in found for block in hashes)
    for at_s, prompt, output, hashes in found:
        shared = sum(1 for block in hashes if seen[block] > 1)
        shared = min(shared, prompt // MOONCAKE_BLOCK)
        if prompt > 0 and output > 0:
            yield Row(
                at_s=at_s,
                prompt_tokens=prompt,
                output_tokens=output,
                session=str(hashes[shared - 1]) if shared else None,
                prefix=hashes[shared - 1] if shared else None,
                prefix_tokens=shared * MOONCAKE_BLOCK,
            )
