"""`lorasrv serve`: start a server and stay."""

import logging
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from lorasrv.cli.output import JsonOption
from lorasrv.config import DType, EngineConfig, ModelConfig, PoolConfig, SchedulerConfig, TierConfig


def default_data_dir() -> Path:
    return Path(platformdirs.user_data_dir("lorasrv"))


def serve(
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The base model's Hugging Face folder.")],
    dtype: Annotated[DType, typer.Option(help="How weights and KV are held.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device, say cpu or cuda:0.")] = "cpu",
    pool_gib: Annotated[float | None, typer.Option(min=0, help="Size of the page pool.")] = None,
    pool_mib: Annotated[float | None, typer.Option(min=0, help="The same in MiB; 256 by default.")] = None,
    listen: Annotated[
        str,
        typer.Option(envvar="LORASRV_LISTEN", help="HOST:PORT, loopback without --api-keys; port 0 picks a free one."),
    ] = "127.0.0.1:8470",
    api_keys: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File of API keys, see lorasrv keys new; SIGHUP reads it again."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(dir_okay=False, help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(dir_okay=False, help="Its private key, PEM.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The registry; in the user's data folder by default.")] = None,
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="Random weights of the config's shape.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same request gives the same bits, whatever the batch; slower.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that compute on a CPU; one for a small model, else all cores.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Requests in one step.")] = 64,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens in one step.")] = 512,
    max_waiting: Annotated[int, typer.Option(help="Requests of a tenant that may wait.")] = 2048,
    max_rank: Annotated[int, typer.Option(min=1, help="The largest adapter rank that is accepted.")] = 256,
    host_cache_gib: Annotated[
        float, typer.Option(min=0, help="Host memory for adapters that are ready to be copied to the device.")
    ] = 1.0,
    read_timeout_s: Annotated[
        float, typer.Option(min=0.1, help="An adapter that takes longer to read fails its own requests.")
    ] = 30.0,
    grace_s: Annotated[float, typer.Option(min=0, help="How long streams may go on after SIGTERM.")] = 10.0,
    heartbeat_timeout_s: Annotated[
        float, typer.Option(min=1, help="An engine whose step takes longer is taken for hung and restarted.")
    ] = 30.0,
    stall_timeout_s: Annotated[float, typer.Option(min=1, help="A stream not read for so long is ended.")] = 30.0,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics here; 0 picks a free port.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Where metrics are served; loopback by default.")] = "127.0.0.1",
    tenant_quota_gib: Annotated[float | None, typer.Option(min=0, help="What a tenant may store; unlimited.")] = None,
    import_root: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A tenant may import from ROOT/TENANT.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a base model and the adapters pushed to it; prints one READY line and stays until SIGTERM or SIGINT."""
    if pool_gib is not None and pool_mib is not None:
        raise typer.BadParameter("give --pool-gib or --pool-mib, not both")
    pool_bytes = int(pool_gib * 2**30) if pool_gib is not None else int((256 if pool_mib is None else pool_mib) * 2**20)
    # Needs the server's packages, which the client alone does not install.
    from lorasrv.server.serve import serve as run
    from lorasrv.server.server import ServerConfig
    from lorasrv_adapters.limits import RegistryLimits

    config = ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(
                path=str(model),
                dtype=dtype,
                device=device,
                dummy_weights=dummy_weights,
                deterministic=deterministic,
                threads=threads,
            ),
            pool=PoolConfig(pool_bytes=pool_bytes),
            scheduler=SchedulerConfig(
                max_running=max_running, max_step_tokens=max_step_tokens, max_waiting=max_waiting
            ),
            tiers=TierConfig(host_cache_bytes=int(host_cache_gib * 2**30), read_timeout_s=read_timeout_s),
            max_rank=max_rank,
        ),
        data_dir=str(data_dir or default_data_dir()),
        listen=listen,
        api_keys=None if api_keys is None else str(api_keys),
        tls_cert=None if tls_cert is None else str(tls_cert),
        tls_key=None if tls_key is None else str(tls_key),
        grace_s=grace_s,
        heartbeat_timeout_s=heartbeat_timeout_s,
        stall_timeout_s=stall_timeout_s,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        registry=RegistryLimits(
            tenant_bytes=None if tenant_quota_gib is None else int(tenant_quota_gib * 2**30),
            import_root=import_root,
        ),
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run(config, lambda line: print(line, flush=True), as_json=as_json)
