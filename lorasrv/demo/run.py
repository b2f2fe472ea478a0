"""The demo's runs: every adapter on words of its own, and two that have to come out wrong."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lorasrv.client import AsyncClient
from lorasrv.demo.tasks import TASKS, Task, prompt, random_words
from lorasrv.types import BASE_ID
from lorasrv.v1 import generation_pb2

MAX_TOKENS = 32
WORDS_EACH = 2


class Kind(StrEnum):
    """What a run shows. An adapter has to be right; the base and a swapped adapter have to be wrong."""

    ADAPTER = "adapter"
    BASE = "base"
    SWAPPED = "swapped"


@dataclass(kw_only=True)
class Run:
    """One generation and how it stands. Owned by the event loop that runs it; others only read it."""

    kind: Kind
    adapter: str
    word: str
    expected: str
    output: str = ""
    finished: bool = False
    time_to_first_token_s: float | None = None

    @property
    def right(self) -> bool:
        return self.finished and self.output == self.expected

    @property
    def as_expected(self) -> bool:
        return self.finished and self.right == (self.kind is Kind.ADAPTER)


def draw_runs(tasks: Sequence[Task], seed: int) -> list[Run]:
    """Words are drawn anew for every run, so no output can have been prepared."""
    words = random_words(seed, len(tasks) * WORDS_EACH + 2)
    runs = [
        Run(kind=Kind.ADAPTER, adapter=task.name, word=word, expected=task.transform(word))
        for index, task in enumerate(tasks)
        for word in words[index * WORDS_EACH : (index + 1) * WORDS_EACH]
    ]
    asked, answering = tasks[-1], tasks[0]
    runs.append(Run(kind=Kind.BASE, adapter=BASE_ID, word=words[-2], expected=asked.transform(words[-2])))
    runs.append(Run(kind=Kind.SWAPPED, adapter=answering.name, word=words[-1], expected=asked.transform(words[-1])))
    return runs


async def stream_all(url: str, runs: Sequence[Run]) -> None:
    """Stream all runs at once."""
    async with AsyncClient(url) as client, asyncio.TaskGroup() as group:
        for run in runs:
            group.create_task(_stream(client, run))


async def _stream(client: AsyncClient, run: Run) -> None:
    started_s = time.monotonic()
    async for event in client.stream(prompt(run.word), adapter=run.adapter, temperature=0, max_tokens=MAX_TOKENS):
        match event:
            case generation_pb2.Delta():
                if run.time_to_first_token_s is None:
                    run.time_to_first_token_s = time.monotonic() - started_s
                run.output += event.text
            case generation_pb2.Finished():
                run.finished = True
            case _:
                pass


def served_tasks(names: set[str]) -> list[Task]:
    """The tasks that there is an adapter for."""
    return [task for task in TASKS if task.name in names]
