"""A request on its way through the engine."""

from bisect import bisect_left
from dataclasses import dataclass, field
from operator import attrgetter

from lorasrv.memory.pages import Owner, OwnerKind
from lorasrv.memory.prefix import BlockKeys
from lorasrv.memory.residency import AdapterInput
from lorasrv.sched.fairness import INPUT_COST, Share
from lorasrv.types import EngineRequest


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """Mutable; owned by the engine's thread. The scheduler only reads it.

    It is sample number `sample` of its request, and its service is charged to `share`. `order` is its class, then its
    arrival; `token_ids` are prompt and generated tokens as far as they are known, and one of `ends` ends it; `drawn` is
    the place of one more in the draws of the step that is running. The KV of the first `num_computed` tokens lies in
    the pages of `block_table`, or will when the submitted steps have completed. The first `num_keyed_blocks` blocks
    have been offered to the prefix cache; `keys` names them. While it runs, `adapter` is where its adapter lies, and
    it is `held_up` until the weights are there. The log-probabilities of prompt tokens before `num_scored`, where asked
    for, have been told; the first token has none. `sibling` is the sample that has computed the prompt of a request
    that draws several. `told_position` is where its caller was last told that it stands.

    The pages of `block_table` have room for `num_covered` tokens; `lane` is the list of `sched.running.Running` that a
    running one is in.
    """

    sequence_id: str
    request: EngineRequest
    sample: int
    order: tuple[int, int]
    share: Share
    token_ids: list[int]
    ends: frozenset[int]
    keys: BlockKeys
    sibling: "Sequence | None" = None
    drawn: int | None = None
    num_computed: int = 0
    num_scored: int = 1
    block_table: list[int] = field(default_factory=list[int])
    num_covered: int = 0
    num_keyed_blocks: int = 0
    adapter: AdapterInput | None = None
    held_up: bool = False
    queued: bool = False
    running: bool = False
    lane: "list[Sequence] | None" = None
    ended: bool = False
    charged: bool = False
    told_position: int | None = None
    # Read in every step: plain fields, though the request says them too.
    request_id: str = field(init=False)
    digest: str | None = field(init=False)
    num_prompt: int = field(init=False)
    max_tokens_total: int = field(init=False)
    owner: Owner = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.request_id = request.request_id
        self.digest = request.adapter.digest if request.adapter else None
        self.num_prompt = len(request.token_ids)
        self.max_tokens_total = self.num_prompt + request.max_tokens
        self.owner = Owner(OwnerKind.SEQUENCE, self.sequence_id)

    @property
    def num_generated(self) -> int:
        """Tokens that are known."""
        return len(self.token_ids) - self.num_prompt

    @property
    def has_output(self) -> bool:
        """Whether the caller has been given anything."""
        return self.num_generated > 0 or self.num_scored > 1

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is still to be computed: 1 while decoding, 0 when the one that is being drawn is the last."""
        if self.drawn is None:
            return len(self.token_ids) - self.num_computed
        num_tokens = len(self.token_ids) + 1
        return 0 if num_tokens == self.max_tokens_total else num_tokens - self.num_computed

    @property
    def admission_cost(self) -> float:
        """What being admitted adds to its tenant's account: the prompt, once a request."""
        return 0.0 if self.charged or self.sample else INPUT_COST * self.num_prompt / self.share.weight


order_of = attrgetter("order")


def take_out(ordered: list[Sequence], sequence: Sequence) -> None:
    """Of a list that is kept in order."""
    place = bisect_left(ordered, sequence.order, key=order_of)
    assert ordered[place] is sequence, f"{sequence.sequence_id} is not in its place"
    del ordered[place]
