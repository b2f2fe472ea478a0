"""What makes room: a pure choice among idle adapters and idle cached blocks. Least recently used first, for now."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IdleAdapter:
    """A resident adapter that may go, and the pages that frees."""

    digest: str
    num_pages: int


@dataclass(frozen=True, slots=True)
class IdleBlock:
    """A cached block that may go."""

    page: int
    num_pages: int = 1


Candidate = IdleAdapter | IdleBlock


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
