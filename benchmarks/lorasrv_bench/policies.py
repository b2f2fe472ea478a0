"""Eviction policies that are not the engine's, to compare it with: `lorasrv.memory.eviction.Policy`."""


class LeastRecentlyUsed:
    inflates = False

    def worth(self, likelihood: float, cost_s: float, num_pages: int) -> float:
        return 0.0


class LeastFrequentlyUsed:
    """By the same likelihood of use as the engine's; what bringing back costs does not count."""

    inflates = False

    def worth(self, likelihood: float, cost_s: float, num_pages: int) -> float:
        return likelihood
