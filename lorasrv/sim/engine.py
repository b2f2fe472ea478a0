"""One simulated engine: the production core and tiers over a device, a disk and a clock that are simulated."""

from dataclasses import dataclass, field
from typing import Any, cast

from lorasrv.config import SchedulerConfig, TierConfig
from lorasrv.engine.core import EngineCore, Limits
from lorasrv.engine.tiers import Tiers, unfelt_copy_bytes
from lorasrv.errors import ConfigurationError
from lorasrv.model.shape import ModelShape
from lorasrv.sim.clock import VirtualClock
from lorasrv.sim.cost import CostModel
from lorasrv.sim.device import SimDevice, SimRunner, SimStorage
from lorasrv.sim.hardware import Hardware
from lorasrv.sim.images import Adapters, page_layout
from lorasrv.sim.reads import SimReads

# Of the device's memory, for what is neither weights nor pool: activations, graphs, the libraries' own.
RESERVED_BYTES = 4 << 30
_VOCAB_SIZE = 1 << 40  # token ids are names here


@dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """What one GPU runs; `itemsize` is that of weights, adapters and KV, in bytes.

    `pool_bytes` None is what the hardware's memory leaves.
    """

    shape: ModelShape
    hardware: Hardware
    itemsize: int = 2
    pool_bytes: int | None = None
    block_tokens: int = 16
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    tiers: TierConfig = field(default_factory=TierConfig)

    @property
    def num_pages(self) -> int:
        """Raises ConfigurationError where the pool has not one page, or does not fit beside the weights."""
        weights = self.itemsize * self.shape.params
        left = self.hardware.memory_bytes - RESERVED_BYTES - weights
        pool_bytes = left if self.pool_bytes is None else self.pool_bytes
        page_bytes = page_layout(self.shape, self.block_tokens, self.itemsize).page_bytes
        if pool_bytes > left or pool_bytes < page_bytes:
            memory = f"{self.hardware.name} has {self.hardware.memory_bytes / 2**30:.1f} GiB"
            raise ConfigurationError(
                f"a pool of {pool_bytes / 2**30:.2f} GiB: {self.shape.name} takes {weights / 2**30:.1f} GiB, {memory}, "
                f"{RESERVED_BYTES >> 30} of them reserved, and a page takes {page_bytes / 2**20:.2f} MiB"
            )
        return int(pool_bytes // page_bytes)


class SimEngine:
    """`core` is driven as a real one is; the other parts tell what that took."""

    def __init__(self, setup: EngineSetup, ranks: tuple[int, ...]) -> None:
        """Raises ConfigurationError."""
        self.clock = VirtualClock()
        self.device = SimDevice(clock=self.clock, costs=CostModel(setup.shape, setup.hardware, setup.itemsize))
        layout, config = page_layout(setup.shape, setup.block_tokens, setup.itemsize), setup.tiers
        self.reads = SimReads(
            clock=self.clock,
            hardware=setup.hardware,
            num_readers=config.num_builders,
            find=Adapters(setup.shape, layout, ranks).__getitem__,
        )
        limits = Limits(
            num_pages=setup.num_pages,
            page_bytes=layout.page_bytes,
            block_tokens=setup.block_tokens,
            context_tokens=setup.num_pages * setup.block_tokens,
            vocab_size=_VOCAB_SIZE,
            eos_token_ids=frozenset(),
        )
        # Tiers and storage pass images on and never look into them.
        storage, source = cast(Any, SimStorage(self.device)), cast(Any, self.reads)
        copy_bytes = config.copy_bytes_per_step or unfelt_copy_bytes(beside_steps=setup.hardware.runs_ahead)
        tiers = Tiers(storage, source, config.host_cache_bytes, copy_bytes)
        self.core = EngineCore(
            config=setup.scheduler, limits=limits, runner=SimRunner(self.device), tiers=tiers, clock=self.clock
        )
