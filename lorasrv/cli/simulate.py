"""`lorasrv simulate`: what a workload would come to on hardware that need not be there, and how many GPUs it takes."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.table import Table

from lorasrv.cli.output import REFUSED, JsonOption, fail, print_json, print_table, progress
from lorasrv.cli.pool_chart import pool_chart
from lorasrv.config import DType, SchedulerConfig, TierConfig
from lorasrv.errors import ConfigurationError

if TYPE_CHECKING:
    from lorasrv.sim.engine import EngineSetup
    from lorasrv.sim.outcome import Outcome, Times
    from lorasrv.sim.simulate import Trial

_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def simulate(
    workload: Annotated[str, typer.Option(help="What is asked, say slora:n=200,alpha=1,rate=10,duration=60.")],
    model: Annotated[str, typer.Option(help="7B, 8B, 13B, 70B, or a Hugging Face folder.")] = "8B",
    hardware: Annotated[str, typer.Option(help="h200, h100, a100, l40s, l4, or a hardware file.")] = "h200",
    gpus: Annotated[str, typer.Option(metavar="N|auto", help="auto finds the fewest that keep the SLO.")] = "1",
    slo: Annotated[str, typer.Option(help="Bounds of the 99th percentiles.")] = "ttft=1s,itl=100ms",
    routing: Annotated[
        str,
        typer.Option(help="affinity: an adapter's own GPUs first; balanced: the GPU with the fewest requests."),
    ] = "affinity",
    dtype: Annotated[DType, typer.Option(help="How weights, adapters and KV are held.")] = "bfloat16",
    pool_gib: Annotated[float | None, typer.Option(min=0, help="Of each GPU; else what its memory leaves.")] = None,
    host_gib: Annotated[float, typer.Option(min=0, help="Host memory for adapters, of each GPU.")] = 64.0,
    readers: Annotated[int, typer.Option(help="Processes that read adapters, of each GPU.")] = 2,
    max_running: Annotated[int, typer.Option(help="Requests in one step.")] = 64,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens in one step.")] = 512,
    max_waiting: Annotated[int, typer.Option(help="Requests in an engine's queue.")] = 2048,
    prefix_cache: Annotated[bool, typer.Option(help="Keep KV for requests that begin alike.")] = True,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    most_gpus: Annotated[int, typer.Option("--max-gpus", min=1, help="Where --gpus auto gives up.")] = 64,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw the pool, by matplotlib.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a workload through the engine's own scheduler and memory accounting, without a model or a device: a cost
    model says how long steps, copies and reads take."""
    # Needs the server's packages, which the client alone does not install.
    from lorasrv.sim.engine import EngineSetup
    from lorasrv.sim.hardware import find_hardware
    from lorasrv.sim.routing import ROUTERS
    from lorasrv.sim.simulate import fewest_engines
    from lorasrv.sim.simulate import simulate as run
    from lorasrv.sim.slo import parse_slo
    from lorasrv_bench.workloads import parse_workload

    if plot is not None and not _has_matplotlib():
        raise ConfigurationError("--plot needs matplotlib; pip install 'lorasrv[plot]' has it")
    if routing not in ROUTERS:
        raise ConfigurationError(f"routing {routing!r} is none of {', '.join(ROUTERS)}")
    asked, bounds, engines = parse_workload(workload, seed), parse_slo(slo), _engines(gpus)
    setup = EngineSetup(
        shape=_shape(model),
        hardware=find_hardware(hardware),
        itemsize=_ITEMSIZE[dtype],
        pool_bytes=None if pool_gib is None else int(pool_gib * 2**30),
        scheduler=SchedulerConfig(
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            max_waiting=max_waiting,
            prefix_cache=prefix_cache,
        ),
        tiers=TierConfig(host_cache_bytes=int(host_gib * 2**30), num_builders=readers),
    )
    with _no_collector(), progress(TextColumn("{task.description}"), BarColumn()) as bar:
        task = bar.add_task("simulating", total=1.0)

        def told(share: float) -> None:
            bar.update(task, completed=share)

        if engines is None:
            outcome = fewest_engines(
                setup, asked, routing=routing, slo=bounds, most=most_gpus, tell=_tell_trial, progress=told
            )
        else:
            outcome = run(setup, asked, engines, routing=routing, slo=bounds, progress=told)
    if outcome is None:
        fail(f"{most_gpus} GPUs do not keep {bounds}; --max-gpus tries more", REFUSED)
        return
    title = f"{asked.text} seed {seed}, {setup.shape.name} {dtype} on {outcome.num_engines} × {setup.hardware.name}"
    if plot is not None:
        from lorasrv.cli.pool_plot import plot_pool

        plot_pool(outcome.pool, title, plot)
    if as_json:
        print_json(_as_dict(asked.text, seed, setup, dtype, routing, outcome))
    else:
        _show(title, setup, routing, outcome)


@contextmanager
def _no_collector() -> Iterator[None]:
    """The simulation makes no cycles to speak of, and looking for them takes a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _has_matplotlib() -> bool:
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return False
    return bool(matplotlib)


def _engines(text: str) -> int | None:
    """None is to be found. Raises ConfigurationError."""
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= 4096:
        raise ConfigurationError(f"--gpus is {text!r}; it must be auto or a number from 1 to 4096")
    return int(text)


def _shape(model: str) -> Any:
    """Raises ConfigurationError, UnsupportedModel."""
    from lorasrv.model.families import read_architecture
    from lorasrv.model.shape import MODELS, ModelShape

    if model in MODELS:
        return MODELS[model]
    if not Path(model).is_dir():
        raise ConfigurationError(f"model {model!r} is no folder and none of {', '.join(MODELS)}")
    return ModelShape.of(read_architecture(model))


def _tell_trial(trial: "Trial") -> None:
    typer.echo(f"{trial.num_engines} GPUs: {'enough' if trial.keeps_slo else 'too few'}", err=True)


def _as_dict(
    workload: str, seed: int, setup: "EngineSetup", dtype: str, routing: str, outcome: "Outcome"
) -> dict[str, Any]:
    rates = {name: getattr(outcome, name) for name in ("requests_per_s", "goodput_per_s", "tokens_per_s")}
    return {
        "workload": workload,
        "seed": seed,
        "model": setup.shape.name,
        "dtype": dtype,
        "hardware": asdict(setup.hardware),
        "num_pages": setup.num_pages,
        "tiers": asdict(setup.tiers),
        "scheduler": asdict(setup.scheduler),
        "routing": routing,
        **asdict(outcome),
        **rates,
        "slo": str(outcome.slo),
    }


def _show(title: str, setup: "EngineSetup", routing: str, outcome: "Outcome") -> None:
    print(f"{title}, routing {routing}")
    print_table(_times(outcome))
    for name, value in _lines(outcome):
        print(f"{name:<12} {value}")
    if outcome.pool:
        print(f"\npool of {outcome.pool[0].pool.num_pages} pages by owner")
        Console().print(pool_chart([sample.pool for sample in outcome.pool], outcome.pool[-1].at_s))


def _times(outcome: "Outcome") -> Table:
    table = Table("", "requests", "mean", "p50", "p90", "p99", box=None)
    rows: list[tuple[str, Times | None]] = [
        ("TTFT", outcome.ttft),
        ("TTFT warm", outcome.ttft_warm),
        ("TTFT cold", outcome.ttft_cold),
        *((f"TTFT tenant {tenant}", times) for tenant, times in list(outcome.ttft_by_tenant.items())[:16]),
        ("ITL", outcome.itl),
        ("E2E", outcome.e2e),
    ]
    for name, times in rows:
        if times is not None:
            count = "" if name == "ITL" else f"{times.count:,}"
            table.add_row(name, count, *(_seconds(each) for each in (times.mean, times.p50, times.p90, times.p99)))
    return table


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _lines(outcome: "Outcome") -> list[tuple[str, str]]:
    traffic = outcome.traffic
    refused = "".join(f", {count:,} {reason}" for reason, count in outcome.refused.items())
    hits = ", ".join(f"{tier} {share:.1%}" for tier, share in outcome.hits.items())
    return [
        ("requests", f"{outcome.requests:,}: {outcome.done:,} done{refused}; {outcome.requests_per_s:.1f}/s"),
        ("tokens", f"{outcome.tokens_per_s:,.0f}/s"),
        ("goodput", f"{outcome.goodput_per_s:.1f}/s, {outcome.good / outcome.requests:.1%} of requests"),
        ("SLO", f"p99 {outcome.slo}: {'kept' if outcome.keeps_slo else 'not kept'}"),
        ("adapter hits", hits or "no adapters"),
        ("moved", f"{traffic.disk_bytes / 1e9:,.1f} GB from disk, {traffic.copied_bytes / 1e9:,.1f} GB to the device"),
        ("cached", f"{traffic.cached_prompt_tokens:,} of {_prompt_tokens(outcome):,} prompt tokens"),
        ("steps", f"{traffic.steps:,}, {traffic.preemptions:,} preemptions, devices {traffic.device_busy:.0%} busy"),
    ]


def _prompt_tokens(outcome: "Outcome") -> int:
    return outcome.traffic.prompt_tokens + outcome.traffic.cached_prompt_tokens
