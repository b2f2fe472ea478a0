"""Two runs of one workload, figure by figure."""

from lorasrv.errors import ConfigurationError
from lorasrv_bench.records import Record, figures, refusals

# What has to be the same for figures to be comparable.
SAME = ("bench", "digest", "concurrency", "resident", "warm_up", "slo")


def compare(a: Record, b: Record) -> list[tuple[str, float, float, float | None]]:
    """Each figure of both: its name, both values, and b ÷ a; None where a is 0.

    Raises ConfigurationError for runs of different workloads or ways to run them, and for one without a score.
    """
    for name in SAME:
        ours, theirs = a.header.get(name), b.header.get(name)
        if ours != theirs:
            if name == "digest":
                ours, theirs = (f"{each.header['workload']} (seed {each.header['seed']})" for each in (a, b))
                name = "workload"
            raise ConfigurationError(f"the runs are not comparable: {name} is {ours} in one, {theirs} in the other")
    for record in (a, b):
        if refusals(record.summary):
            raise ConfigurationError(f"a run has no score: {refusals(record.summary)[0]}")
    ours, theirs = figures(a.summary), figures(b.summary)
    return [
        (name, value, theirs[name], theirs[name] / value if value else None)
        for name, value in ours.items()
        if name in theirs
    ]
