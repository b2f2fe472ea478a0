"""The pool by owner over time, drawn in characters."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rich.text import Text

from lorasrv.types import PoolStats

# Bottom up: what a column is made of, its character and its colour.
OWNERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"adapters": ("█", "cyan"), "prefix": ("▓", "magenta"), "sequences": ("▒", "green"), "free": (" ", "default")}
)


def pool_chart(pools: Sequence[PoolStats], end_s: float, *, width: int = 72, height: int = 12) -> Text:
    """Columns from now 0 to `end_s`, each the mean of its samples, as shares of the pool; behind them the legend."""
    columns = [_column(pools, column, width, height) for column in range(min(width, len(pools)))]
    chart = Text()
    for row in reversed(range(height)):
        chart.append(f"{100 * (row + 1) // height:>4} % ")
        for column in columns:
            character, colour = OWNERS[column[row]]
            chart.append(character, colour)
        chart.append("\n")
    chart.append(f"{'0 s':>7}{f'{end_s:.0f} s':>{max(1, len(columns) - 1)}}\n{'':7}")
    for owner, (character, colour) in OWNERS.items():
        if character.strip():
            chart.append(f"{character} ", colour)
            chart.append(f"{owner}  ")
    return chart


def _column(pools: Sequence[PoolStats], column: int, width: int, height: int) -> list[str]:
    """The owner of each of `height` cells, bottom up."""
    count = min(width, len(pools))
    mine = pools[column * len(pools) // count : (column + 1) * len(pools) // count]
    total = sum(pool.num_pages for pool in mine)
    cells: list[str] = []
    so_far = 0
    for owner in OWNERS:
        so_far += sum(getattr(pool, owner) for pool in mine)
        cells += [owner] * (round(height * so_far / total) - len(cells))
    return cells
