"""How much service each tenant has had: virtual token counters (Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024).

A token of a prompt counts 1, a generated one 2, over the tenant's weight. Who has had least goes first. A tenant that
comes back to the queue is lifted to the least served of those that wait, so that nobody saves up turns. Between two
tenants that both have work waiting all the time, what they are served differs by at most 2 max(P, 2 T) / weight, P
being the longest prompt and T the tokens that can run at once (theorem 4.4 there).
"""

from dataclasses import dataclass

INPUT_COST, OUTPUT_COST = 1.0, 2.0

_SPARE = 64


@dataclass(slots=True, eq=False)
class Share:
    """A tenant's account. Mutable; owned by the engine's thread.

    `num_open` are its sequences that have not ended; of those `num_waiting` are queued and `num_running` run.
    """

    tenant: str
    weight: float
    served: float = 0.0
    num_open: int = 0
    num_waiting: int = 0
    num_running: int = 0


class Shares:
    """The accounts of all tenants that matter: one with nothing open and less service than those that wait would be
    lifted when it comes back, so it is forgotten. Owned by the engine's thread."""

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}
        self._waiting: dict[str, Share] = {}
        # The account of who left the queue last, when nobody waits.
        self._level = 0.0

    def open(self, tenant: str, weight: float) -> Share:
        """A sequence of this tenant begins; its weight is what was said last."""
        share = self._shares.get(tenant)
        if share is None:
            if len(self._shares) > 2 * len(self._waiting) + _SPARE:
                self._forget()
            share = self._shares[tenant] = Share(tenant, weight)
        share.weight = weight
        share.num_open += 1
        return share

    def close(self, share: Share) -> None:
        """A sequence has ended."""
        share.num_open -= 1

    def enqueue(self, share: Share, *, lift: bool) -> None:
        """A sequence waits. `lift` is for one that is new, not for one that ran and has to wait again."""
        if lift and not share.num_waiting:
            share.served = max(share.served, self.level)
        share.num_waiting += 1
        self._waiting[share.tenant] = share

    def dequeue(self, share: Share) -> None:
        share.num_waiting -= 1
        if not share.num_waiting:
            del self._waiting[share.tenant]
            self._level = share.served

    def num_held_back(self, tenant: str) -> int:
        """The tenant's sequences that do not run."""
        share = self._shares.get(tenant)
        return 0 if share is None else share.num_open - share.num_running

    @property
    def level(self) -> float:
        """What newcomers are lifted to."""
        return min((share.served for share in self._waiting.values()), default=self._level)

    def _forget(self) -> None:
        level = self.level
        self._shares = {
            tenant: share for tenant, share in self._shares.items() if share.num_open or share.served > level
        }

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        for tenant, share in self._shares.items():
            assert 0 <= share.num_waiting <= share.num_open, f"{share} waits with more than it has"
            assert (tenant in self._waiting) == (share.num_waiting > 0), f"{share} is in the wrong place"
        assert self._waiting.keys() <= self._shares.keys(), "a tenant that waits is forgotten"
