"""A request on its way through the engine."""

from dataclasses import dataclass, field

from lorasrv.memory.prefix import BlockKeys
from lorasrv.types import EngineRequest


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """Mutable; owned by the engine's thread. The scheduler only reads it.

    `order` is its place in the queue; `token_ids` are prompt and generated tokens; the KV of the first `num_computed`
    of them lies in the pages of `block_table`, which covers at least that many tokens. The first `num_keyed_blocks`
    blocks have been offered to the prefix cache; `keys` names them. The log-probabilities of prompt tokens before
    `num_scored`, where asked for, have been told; the first token has none.
    """

    request: EngineRequest
    order: int
    token_ids: list[int]
    keys: BlockKeys
    num_computed: int = 0
    num_scored: int = 1
    block_table: list[int] = field(default_factory=list[int])
    num_keyed_blocks: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def digest(self) -> str | None:
        return self.request.adapter.digest if self.request.adapter else None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def num_remaining(self) -> int:
        """Known tokens whose KV is still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_tokens_total(self) -> int:
        return len(self.request.token_ids) + self.request.max_tokens
