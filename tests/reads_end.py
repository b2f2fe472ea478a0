"""Takes the speed of worker threads out of what an engine's steps do."""

from lorasrv.engine.core import EngineCore
from lorasrv.types import Tier


def let_reads_end(core: EngineCore) -> None:
    """Return once no adapter is being read: what the next step does then follows from the calls so far alone."""
    tiers = core._tiers
    while not {Tier.QUEUED, Tier.READING}.isdisjoint(tiers.host_tiers().values()):
        tiers.wait(0.01)
