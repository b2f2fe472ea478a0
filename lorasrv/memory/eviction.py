"""Which idle adapters make room: a pure choice. Least recently used first, for now."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that may go, and the pages that frees."""

    digest: str
    num_pages: int


def choose_victims(candidates: Iterable[Candidate], num_pages: int) -> tuple[Candidate, ...] | None:
    """The first candidates (given in the order in which they should go) that free `num_pages`; None if all do not."""
    victims: list[Candidate] = []
    freed = 0
    for candidate in candidates:
        if freed >= num_pages:
            break
        victims.append(candidate)
        freed += candidate.num_pages
    return tuple(victims) if freed >= num_pages else None
