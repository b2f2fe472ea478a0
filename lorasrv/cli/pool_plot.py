"""The pool by owner over time as a picture, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from lorasrv.sim.replay import PoolSample

_OWNERS = {"adapters": "tab:blue", "prefix": "tab:orange", "sequences": "tab:green", "free": "lightgray"}
_TITLE_COLS = 110


def plot_pool(samples: Sequence[PoolSample], title: str, path: Path) -> None:
    """Pages by owner above, requests running and waiting below; the file's ending says the format."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(10, 6), layout="constrained")
    pool, queue = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    times = [sample.at_s for sample in samples]
    pages = [[getattr(sample.pool, owner) for sample in samples] for owner in _OWNERS]
    pool.stackplot(times, pages, labels=list(_OWNERS), colors=list(_OWNERS.values()))
    pool.set_title(fill(title.replace(",", ", "), _TITLE_COLS), fontsize="medium")
    pool.set(ylabel="pages")
    pool.margins(0)
    pool.legend(loc="upper left")
    queue.plot(times, [sample.running for sample in samples], label="running")
    queue.plot(times, [sample.waiting for sample in samples], label="waiting")
    queue.set(xlabel="seconds", ylabel="requests")
    queue.legend(loc="upper left")
    figure.savefig(path)
