"""One frozen dataclass per concept, complete when constructed. What start-up finds out is in `types.EngineInfo`."""

from dataclasses import dataclass, field
from typing import Literal

from lorasrv.errors import ConfigurationError

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which base model, and how it is held. `dummy_weights` builds random weights of the config's shape, by `seed`.

    `deterministic` makes a token's arithmetic independent of what else is in the batch, of chunking, cache hits and
    preemption: the same request gives the same bits. `threads` compute on a CPU; None is one for a small model, else as
    many as there are cores.
    """

    path: str
    dtype: DType = "float32"
    device: str = "cpu"
    dummy_weights: bool = False
    seed: int = 0
    deterministic: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigurationError(f"threads is {self.threads}; it must be >= 1")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Size of the device pool that adapters and KV blocks share."""

    pool_bytes: int = 256 << 20
    block_tokens: int = 16

    def __post_init__(self) -> None:
        if self.pool_bytes < 1 or self.block_tokens < 1:
            raise ConfigurationError(f"pool_bytes {self.pool_bytes} and block_tokens {self.block_tokens} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds of a step. A step computes at most `max_step_tokens` tokens for at most `max_running` requests.

    `max_waiting` bounds each tenant's queue; `lookahead` is how many queued requests may have their adapters read to
    the host; `max_loads_per_step` bounds host-to-device copies begun in a step. `prefix_cache` keeps full KV blocks for
    requests that begin alike. `run_ahead` plans and submits a step while the one before runs; None does where that
    gains time.
    """

    max_step_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 2048
    lookahead: int = 64
    max_loads_per_step: int = 4
    prefix_cache: bool = True
    run_ahead: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_step_tokens", "max_running", "max_waiting", "lookahead", "max_loads_per_step"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be >= 1")
        if self.max_step_tokens < self.max_running:
            raise ConfigurationError(
                f"max_step_tokens {self.max_step_tokens} is below max_running {self.max_running}: decodes would starve"
            )


@dataclass(frozen=True, kw_only=True)
class TierConfig:
    """How adapters come from disk to host memory and on to the device.

    `host_cache_bytes` of host memory hold adapters ready to be copied; those being read take up to an eighth more.
    `num_builders` processes read them, some more while reads are slow; a read that takes longer than `read_timeout_s`
    fails. `copy_bytes_per_step` bounds what one step copies to the device, by a page at most more; None is what hides
    behind a step of the device.
    """

    host_cache_bytes: int = 1 << 30
    num_builders: int = 2
    read_timeout_s: float = 30.0
    copy_bytes_per_step: int | None = None

    def __post_init__(self) -> None:
        for name in ("host_cache_bytes", "num_builders", "copy_bytes_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} is {value}; it must be >= 1")
        if not self.read_timeout_s > 0:
            raise ConfigurationError(f"read_timeout_s is {self.read_timeout_s}; it must be > 0")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All that an engine process needs. `blob_root` is the registry's blob folder; None serves in-memory adapters."""

    model: ModelConfig
    pool: PoolConfig = field(default_factory=PoolConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    blob_root: str | None = None
    tiers: TierConfig = field(default_factory=TierConfig)
    max_rank: int = 256
