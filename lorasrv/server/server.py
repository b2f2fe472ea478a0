"""A running server: everything `lorasrv serve` holds, built in order and taken down in the opposite one."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorasrv import __version__
from lorasrv.addresses import host_and_port, is_loopback
from lorasrv.config import EngineConfig
from lorasrv.engine.admission import TokenLimits
from lorasrv.engine.chat import load_chat_template
from lorasrv.engine.client import Engine
from lorasrv.engine.defaults import adapter_check
from lorasrv.engine.text import load_tokenizer
from lorasrv.errors import ConfigurationError
from lorasrv.keys import KeyFile
from lorasrv.model.base_shapes import base_shapes
from lorasrv.model.families import read_architecture
from lorasrv.server.access import Access
from lorasrv.server.adapters import AdapterService
from lorasrv.server.boundary import Boundary
from lorasrv.server.frontdesk import FrontDesk
from lorasrv.server.generation import GenerationService
from lorasrv.server.health import ALWAYS_SERVING, FOLLOW_ENGINE, Health
from lorasrv.server.info import ServerService
from lorasrv.server.metrics import CallCounter, Metrics, MetricsEndpoint
from lorasrv.server.seen import SeenVersions
from lorasrv.server.tokens import TokenDesk
from lorasrv.server.transport import tls_credentials
from lorasrv.types import EngineInfo
from lorasrv.v1 import adapter_pb2_grpc, generation_pb2_grpc, server_pb2, server_pb2_grpc
from lorasrv_adapters.errors import AdapterError, RegistryUnavailable
from lorasrv_adapters.limits import RegistryLimits
from lorasrv_adapters.registry import Registry

MAX_MESSAGE_BYTES = 4 << 20
NUM_WORKERS = 4
LAST_WORDS_S = 0.5
REAP_INTERVAL_S = 600.0

log = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
    # Of one connection. Calls that were opened and reset count until we are through with them, so this is what bounds
    # a flood of them: without it, 20000 in a second cost 160 MiB.
    ("grpc.max_concurrent_streams", 1024),
    # A peer that is gone without a word, as behind a NAT that forgot it, is found out; a quiet connection is kept.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Pings are answered, however many come. To close the connection on the third costs gRPC 1.76 4 KiB for every
    # further ping that it finds in what it has read: 400 MiB for 1.7 MB sent, by whoever can reach the port.
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would share its connections; the second one is to fail.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All that a serving process needs. `engine.blob_root` is set here, from `data_dir`.

    `listen` is HOST:PORT, port 0 picks a free one; without `api_keys`, a file as `lorasrv.keys` describes, the host has
    to be a loopback address and every call is of `tenant`. `tls_cert` and `tls_key` are PEM files: a chain and its key.
    `grace_s` is how long streams may go on once the server has been told to stop. An engine that says nothing for
    `heartbeat_timeout_s` is taken for hung and replaced; it speaks between steps, so one step has to take less. A
    stream that is not read for `stall_timeout_s` ends. Prometheus finds metrics at `metrics_host`, which is a loopback
    address unless said otherwise, on `metrics_port`: 0 picks a free one, None serves none.
    """

    engine: EngineConfig
    data_dir: str
    listen: str = "127.0.0.1:8470"
    tenant: str = "default"
    api_keys: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    grace_s: float = 10.0
    heartbeat_timeout_s: float = 30.0
    stall_timeout_s: float = 30.0
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    registry: RegistryLimits = field(default_factory=RegistryLimits)

    def __post_init__(self) -> None:
        try:
            host, _ = host_and_port(self.listen)
        except ValueError as error:
            raise ConfigurationError(f"listen address {error}") from None
        if self.api_keys is None and not is_loopback(host):
            raise ConfigurationError(
                f"listen address {self.listen!r} is not a loopback address: nothing else is served without API keys"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("a TLS certificate and its key go together; only one of them is given")
        if self.grace_s < 0:
            raise ConfigurationError(f"grace_s {self.grace_s} is negative")
        if self.heartbeat_timeout_s < 1:
            raise ConfigurationError(f"heartbeat_timeout_s {self.heartbeat_timeout_s} is below 1")
        if not self.stall_timeout_s > 0:
            raise ConfigurationError(f"stall_timeout_s {self.stall_timeout_s} is not above 0")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ConfigurationError(f"metrics_port {self.metrics_port} is no port")


class Server:
    """Owned by one event loop: `start`, `drain`, `close`, each once; `close` undoes what `start` could not finish."""

    def __init__(self, config: ServerConfig, make_engine: Callable[[EngineConfig], Engine]) -> None:
        self._config = config
        self._keys = None if config.api_keys is None else KeyFile(Path(config.api_keys))
        self._credentials = tls_credentials(config.tls_cert, config.tls_key)
        self._seen = SeenVersions()
        # Three pools: neither validating uploads nor tokenizing long prompts, which take seconds, may hold up pins.
        self._text_workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="lorasrv-text")
        self._pin_workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="lorasrv-pins")
        self._registry_workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="lorasrv-registry")
        model = config.engine.model
        self._architecture = read_architecture(model.path)
        self._tokenizer = load_tokenizer(Path(model.path))
        self._chat_template = load_chat_template(Path(model.path))
        self._base = base_shapes(model.path, model.dtype)
        try:
            self._registry = Registry(
                Path(config.data_dir),
                self._base,
                config.engine.max_rank,
                limits=config.registry,
                check=adapter_check(config.engine),
            )
        except RegistryUnavailable as error:
            # The error itself names no path, since those of later calls go to clients.
            raise RegistryUnavailable(f"data directory {config.data_dir}: {error}") from error
        self._engine = make_engine(replace(config.engine, blob_root=str(self._registry.blob_root)))
        self._health = Health(self._engine)
        self._metrics = Metrics(self._engine)
        self._metrics_endpoint: MetricsEndpoint | None = None
        self._desk: FrontDesk | None = None
        self._grpc: grpc.aio.Server | None = None
        self._reaper: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Serve; returns the bound address. The port is taken first: a server that cannot have it loads no model."""
        access = Access(self._keys, self._config.tenant)
        interceptors = [CallCounter(self._metrics), Boundary(access, self._config.stall_timeout_s)]
        server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS)
        host, _ = host_and_port(self._config.listen)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._config.listen)
            else:
                port = server.add_secure_port(self._config.listen, self._credentials)
        except RuntimeError:
            raise ConfigurationError(f"cannot listen on {self._config.listen}: is it in use?") from None
        if self._credentials is None and not is_loopback(host):
            log.warning("listening on %s without TLS: API keys and prompts pass in the clear", self._config.listen)
        if self._config.metrics_port is not None:
            self._metrics_endpoint = MetricsEndpoint(
                self._metrics, self._config.metrics_host, self._config.metrics_port
            )
            log.info("metrics at http://%s/metrics", self._metrics_endpoint.address)
        info = await self._engine.start()
        self._desk = FrontDesk(
            engine=self._engine,
            limits=TokenLimits.of(info),
            versions=self._registry,
            tokenizer=self._tokenizer,
            chat_template=self._chat_template,
            workers=self._text_workers,
            pinning=self._pin_workers,
            seen=self._seen,
        )
        self._add_services(server, self._desk, info)
        await self._health.start()
        await server.start()
        self._grpc = server
        self._reaper = asyncio.create_task(self._reap(), name="upload-reaper")
        return f"{host}:{port}"

    def reload_keys(self) -> None:
        """Read the key file again; one that cannot be used is logged and changes nothing. Calls that run go on."""
        if self._keys is None:
            return
        try:
            self._keys.reload()
        except ConfigurationError as error:
            log.error("the keys stay as they were: %s", error)

    @property
    def metrics_address(self) -> str | None:
        """HOST:PORT where metrics are served, if they are."""
        return None if self._metrics_endpoint is None else self._metrics_endpoint.address

    async def begin_drain(self) -> None:
        """Admit no more generations; what runs goes on, and adapters and status are served. Safe to call again."""
        if self._desk is not None:
            self._desk.stop_admitting()
        await self._health.drain()

    async def drain(self, grace_s: float) -> None:
        """Admit no more generations, and wait up to `grace_s` for those that run: the server is about to stop."""
        await self.begin_drain()
        await self._health.leave()
        if self._desk is not None and not await self._desk.drain(grace_s):
            log.warning("%d generations outlived the grace time of %g s", self._desk.num_running, grace_s)

    async def close(self) -> None:
        """End it all: what still runs ends with UNAVAILABLE."""
        await self._health.leave()
        if self._reaper is not None:
            self._reaper.cancel()
        await self._engine.close()
        if self._desk is not None:
            # The streams that the engine's end has broken get to say so.
            await self._desk.drain(grace_s=LAST_WORDS_S)
        if self._grpc is not None:
            await self._grpc.stop(grace=LAST_WORDS_S)
        if self._metrics_endpoint is not None:
            await asyncio.to_thread(self._metrics_endpoint.close)
        self._text_workers.shutdown(wait=True)
        self._pin_workers.shutdown(wait=True)
        self._registry_workers.shutdown(wait=True)
        self._registry.close()

    async def _reap(self) -> None:
        """Drop expired uploads now and then, to give their disk space back."""
        while True:
            await asyncio.sleep(REAP_INTERVAL_S)
            try:
                await asyncio.get_running_loop().run_in_executor(self._registry_workers, self._registry.reap)
            except AdapterError as error:
                log.warning("expired uploads could not be dropped: %s", error)

    def _add_services(self, server: grpc.aio.Server, desk: FrontDesk, info: EngineInfo) -> None:
        tokens = TokenDesk(
            desk=desk,
            tokenizer=self._tokenizer,
            chat_template=self._chat_template,
            vocab_size=info.vocab_size,
            workers=self._text_workers,
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(desk, tokens, self._metrics), server
        )
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterService(self._registry, self._engine, desk, self._registry_workers), server
        )
        server_pb2_grpc.add_ServerServiceServicer_to_server(
            ServerService(self._server_info(info), self._engine, desk, self._seen, self.begin_drain), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        names = (*ALWAYS_SERVING, *filter(None, FOLLOW_ENGINE), "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)

    def _server_info(self, info: EngineInfo) -> server_pb2.ServerInfo:
        return server_pb2.ServerInfo(
            version=__version__,
            base_model=server_pb2.BaseModel(
                name=self._architecture.name,
                architecture=self._architecture.architecture,
                dtype=info.dtype,
                device=info.device,
                fingerprint=self._base.fingerprint,
                context_tokens=info.context_tokens,
                vocab_size=info.vocab_size,
            ),
            max_rank=self._config.engine.max_rank,
            block_tokens=info.block_tokens,
            page_bytes=info.page_bytes,
            num_pages=info.num_pages,
            deterministic=self._config.engine.model.deterministic,
        )
