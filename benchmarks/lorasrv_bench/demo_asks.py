"""The demo's adapters as a workload's: each does one task on a word, so every answer is checked to the letter."""

from collections.abc import Sequence
from pathlib import Path

from lorasrv.demo.tasks import TASKS, prompt, random_words
from lorasrv.types import BASE_ID
from lorasrv_bench.asks import Ask
from lorasrv_bench.workloads import Arrival

MAX_TOKENS = 24


def demo_folders(samples: Path) -> list[Path]:
    """The tasks' folders, in the tasks' order. Raises FileNotFoundError."""
    folders = [samples / task.name for task in TASKS]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(2, "No such folder of a sample adapter", str(folder))
    return folders


def demo_asks(arrivals: Sequence[Arrival], names: Sequence[str], seed: int) -> list[Ask]:
    """A word for each arrival; adapter a has task a modulo their number, and lengths are the words'.

    `names` are the tasks', in their order.
    """
    asks: list[Ask] = []
    for index, (arrival, word) in enumerate(zip(arrivals, random_words(seed, len(arrivals)), strict=True)):
        task = None if arrival.adapter is None else arrival.adapter % len(TASKS)
        asks.append(
            Ask(
                index=index,
                at_s=arrival.at_s,
                name=BASE_ID if task is None else names[task],
                adapter=task,
                tenant=arrival.tenant,
                prompt=prompt(word),
                max_tokens=MAX_TOKENS,
                exact_tokens=False,
                answer=word if task is None else TASKS[task].transform(word),
            )
        )
    return asks
