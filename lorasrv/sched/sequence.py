"""A request on its way through the engine."""

from dataclasses import dataclass, field

from lorasrv.memory.prefix import BlockKeys
from lorasrv.types import EngineRequest


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """Mutable; owned by the engine's thread. The scheduler only reads it.

    It is sample number `sample` of its request. `order` is its place in the queue: class, then arrival; `token_ids` are
    prompt and generated tokens as far as they are known; `drawn` is the place of one more in the draws of the step that
    is running. The KV of the first `num_computed` tokens lies in the pages of `block_table`, or will when the submitted
    steps have completed. The first `num_keyed_blocks` blocks have been offered to the prefix cache; `keys` names them.
    The log-probabilities of prompt tokens before `num_scored`, where asked for, have been told; the first token has
    none. `sibling` is the sample that has computed the prompt of a request that draws several. `told_position` is where
    its caller was last told that it stands.
    """

    sequence_id: str
    request: EngineRequest
    sample: int
    order: tuple[int, int]
    token_ids: list[int]
    keys: BlockKeys
    sibling: "Sequence | None" = None
    drawn: int | None = None
    num_computed: int = 0
    num_scored: int = 1
    block_table: list[int] = field(default_factory=list[int])
    num_keyed_blocks: int = 0
    told_position: int | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def digest(self) -> str | None:
        return self.request.adapter.digest if self.request.adapter else None

    @property
    def num_generated(self) -> int:
        """Tokens that are known."""
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def has_output(self) -> bool:
        """Whether the caller has been given anything."""
        return self.num_generated > 0 or self.num_scored > 1

    @property
    def num_tokens(self) -> int:
        """Tokens that are known or being drawn."""
        return len(self.token_ids) + (self.drawn is not None)

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is still to be computed: 1 while decoding, 0 when the one that is being drawn is the last."""
        if self.num_tokens == self.max_tokens_total:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def max_tokens_total(self) -> int:
        return len(self.request.token_ids) + self.request.max_tokens
