import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from lorasrv.v1 import adapter_pb2 as _adapter_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATE_UNSPECIFIED: _ClassVar[EngineState]
    ENGINE_STATE_STARTING: _ClassVar[EngineState]
    ENGINE_STATE_READY: _ClassVar[EngineState]
    ENGINE_STATE_UNAVAILABLE: _ClassVar[EngineState]
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_STARTING: EngineState
ENGINE_STATE_READY: EngineState
ENGINE_STATE_UNAVAILABLE: EngineState

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "base_model", "max_rank", "block_tokens", "page_bytes", "num_pages", "deterministic")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    version: str
    base_model: BaseModel
    max_rank: int
    block_tokens: int
    page_bytes: int
    num_pages: int
    deterministic: bool
    def __init__(self, version: _Optional[str] = ..., base_model: _Optional[_Union[BaseModel, _Mapping]] = ..., max_rank: _Optional[int] = ..., block_tokens: _Optional[int] = ..., page_bytes: _Optional[int] = ..., num_pages: _Optional[int] = ..., deterministic: bool = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "architecture", "dtype", "device", "fingerprint", "context_tokens", "vocab_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    dtype: str
    device: str
    fingerprint: str
    context_tokens: int
    vocab_size: int
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., fingerprint: _Optional[str] = ..., context_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval",)
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining_generations",)
    REMAINING_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    remaining_generations: int
    def __init__(self, remaining_generations: _Optional[int] = ...) -> None: ...

class ServerStatus(_message.Message):
    __slots__ = ("state", "pool", "running_requests", "waiting_requests", "adapter_pins", "adapters", "counters", "uptime", "draining", "open_generations")
    STATE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PINS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    OPEN_GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    state: EngineState
    pool: PoolStatus
    running_requests: int
    waiting_requests: int
    adapter_pins: int
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterStatus]
    counters: Counters
    uptime: _duration_pb2.Duration
    draining: bool
    open_generations: int
    def __init__(self, state: _Optional[_Union[EngineState, str]] = ..., pool: _Optional[_Union[PoolStatus, _Mapping]] = ..., running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., adapter_pins: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[AdapterStatus, _Mapping]]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., draining: bool = ..., open_generations: _Optional[int] = ...) -> None: ...

class PoolStatus(_message.Message):
    __slots__ = ("num_pages", "free_pages", "sequence_pages", "adapter_pages", "prefix_pages")
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_PAGES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PAGES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_PAGES_FIELD_NUMBER: _ClassVar[int]
    num_pages: int
    free_pages: int
    sequence_pages: int
    adapter_pages: int
    prefix_pages: int
    def __init__(self, num_pages: _Optional[int] = ..., free_pages: _Optional[int] = ..., sequence_pages: _Optional[int] = ..., adapter_pages: _Optional[int] = ..., prefix_pages: _Optional[int] = ...) -> None: ...

class AdapterStatus(_message.Message):
    __slots__ = ("adapter_id", "version_digest", "tier", "num_pages", "pins", "failure")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    version_digest: str
    tier: _adapter_pb2.Tier
    num_pages: int
    pins: int
    failure: str
    def __init__(self, adapter_id: _Optional[str] = ..., version_digest: _Optional[str] = ..., tier: _Optional[_Union[_adapter_pb2.Tier, str]] = ..., num_pages: _Optional[int] = ..., pins: _Optional[int] = ..., failure: _Optional[str] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("steps", "prompt_tokens", "completion_tokens", "finished_requests", "adapter_loads", "adapter_evictions", "preemptions", "cached_prompt_tokens")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_LOADS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    prompt_tokens: int
    completion_tokens: int
    finished_requests: int
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    cached_prompt_tokens: int
    def __init__(self, steps: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., finished_requests: _Optional[int] = ..., adapter_loads: _Optional[int] = ..., adapter_evictions: _Optional[int] = ..., preemptions: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ...) -> None: ...
