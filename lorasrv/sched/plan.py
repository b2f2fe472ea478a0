"""What a step will do, decided before anything is done."""

from dataclasses import dataclass
from typing import NamedTuple

from lorasrv.memory.eviction import Candidate
from lorasrv.sched.sequence import Sequence
from lorasrv.types import Failure


class Chunk(NamedTuple):
    """Compute tokens `[start, start + num_tokens)` of a sequence."""

    sequence: Sequence
    start: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A queued sequence that this pool can never serve."""

    sequence: Sequence
    failure: Failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """Let a queued sequence run; its first `num_cached_blocks` blocks are in the prefix cache.

    `copied_page` is the page of another sample of the request whose tokens, up to the prompt's last one, are its next.
    """

    sequence: Sequence
    num_cached_blocks: int
    copied_page: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Effects in the order in which they are carried out; `want`, `load` are adapter versions' digests.

    `want` is what queued requests need in host memory, most urgent first. Of `decodes` the next token is computed; the
    first tokens of new blocks, those in `grow`, need a page. Behind them stand the rows of `chunks`.
    """

    reject: tuple[Rejection, ...] = ()
    preempt: tuple[Sequence, ...] = ()
    evict: tuple[Candidate, ...] = ()
    want: tuple[str, ...] = ()
    load: tuple[str, ...] = ()
    admit: tuple[Admission, ...] = ()
    grow: tuple[Sequence, ...] = ()
    decodes: tuple[Sequence, ...] = ()
    chunks: tuple[Chunk, ...] = ()
