"""`lorasrv bench`: how fast a server is, and whether what it says is right."""

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lorasrv.cli.connection import Target, UrlOption, api_key_of, resolve
from lorasrv.cli.output import INTERNAL, JsonOption, print_json, print_table, progress
from lorasrv.config import DType
from lorasrv.errors import ConfigurationError

app = typer.Typer(help="Measure a server, with its output checked.", no_args_is_help=True, rich_markup_mode=None)

WorkloadOption = Annotated[
    str, typer.Option("--workload", "-w", help="NAME:KEY=VALUE,…: slora, punica, zipf, cold_storm, tenants or trace.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]
OutOption = Annotated[Path | None, typer.Option(dir_okay=False, help="Write the run here, as JSON lines.")]
ModelOption = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="The base's folder, to make adapters for: only shapes are read."),
]


@app.command("serve")
def serve(
    workload: WorkloadOption,
    model: ModelOption = None,
    demo: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of the demo's samples: answers are known to the letter."
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="So many requests at a time, instead of the workload's times.")
    ] = None,
    slo: Annotated[str | None, typer.Option(help="ttft=S,tpot=S,e2e=S in seconds: tell goodput too.")] = None,
    resident: Annotated[
        Literal["workload", "all", "none"], typer.Option(help="Which adapters are on the device before it begins.")
    ] = "workload",
    warm_up: Annotated[int, typer.Option(min=0, help="Requests to the base before it begins.")] = 8,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Client processes.")] = 1,
    seed: SeedOption = 0,
    salt: Annotated[
        int | None, typer.Option(min=0, help="Draws weights and prompts anew for each run; give it to repeat one.")
    ] = None,
    tenant_keys: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="API keys, one a line: tenant t of the workload sends with key t."),
    ] = None,
    openai: Annotated[
        str | None, typer.Option(metavar="URL", help="Another server, that speaks OpenAI's completions, not --url's.")
    ] = None,
    base_name: Annotated[str, typer.Option(help="With --openai: the base's name there.")] = "base",
    adapter_names: Annotated[
        str, typer.Option(help="With --openai: its adapters' names; {} is the number.")
    ] = "lora-{}",
    vocab_size: Annotated[int, typer.Option(min=1, help="With --openai: prompts are of token ids below it.")] = 32_000,
    lora_field: Annotated[
        bool, typer.Option("--lora-field", help="With --openai: tell it of adapters by number, as llama.cpp wants it.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --openai: hold it to the same answer whatever else it does.")
    ] = False,
    out: OutOption = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a workload to a server, check what it answers, and tell how fast it was; wrong output has no score."""
    # Needs numpy, which the client alone does not install.
    from lorasrv_bench import serving
    from lorasrv_bench.backends import Server
    from lorasrv_bench.clients import Clients
    from lorasrv_bench.records import call_line, header, look_line, write
    from lorasrv_bench.summary import parse_slo
    from lorasrv_bench.workloads import parse_workload

    drawn = parse_workload(workload, seed)
    salt = secrets.randbits(32) if salt is None else salt
    if openai is not None:
        names = {adapter_names.format(number): number for number in range(drawn.num_adapters)}
        lora_ids = names if lora_field else None
        server = Server(api="openai", url=openai, api_keys=_keys(tenant_keys, None), lora_ids=lora_ids)
    else:
        server = Server(api="grpc", url=resolve(url).context.url, api_keys=_keys(tenant_keys, url))
    setup = serving.Setup(
        server=server,
        workload=drawn,
        concurrency=concurrency,
        warm_up=warm_up,
        resident=resident,
        slo=None if slo is None else parse_slo(slo),
    )
    with _phases() as phase:
        clients = Clients(processes)
        try:
            if openai is not None:
                ready = serving.openai_ready(drawn, base_name, adapter_names, vocab_size, salt, exact=exact)
                outcome = asyncio.run(serving.run(setup, ready, clients, phase))
            else:
                if (model is None) == (demo is None):
                    raise ConfigurationError("give --model, whose shapes adapters are made for, or --demo")
                source, kind = (model, "fresh") if model is not None else (demo, "demo")
                assert source is not None
                with serving.grpc_ready(server, drawn, source, kind, salt, phase) as ready:
                    outcome = asyncio.run(serving.run(setup, ready, clients, phase))
        finally:
            clients.close()
    told = header(
        drawn,
        bench="serve",
        server=server.url,
        api=server.api,
        base=None if ready.info is None else f"{ready.info.base_model.name}, {ready.info.base_model.dtype}",
        concurrency=concurrency,
        resident=resident,
        warm_up=warm_up,
        slo=slo,
        salt=salt,
        processes=processes,
    )
    if out is not None:
        looks = [look_line(look, outcome.start_s) for look in outcome.looks]
        write(out, told, looks, map(call_line, outcome.calls), outcome.summary)
    _print(told, outcome.summary, as_json)
    raise typer.Exit(0 if outcome.is_right else INTERNAL)


@app.command("offline")
def offline(
    workload: WorkloadOption,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The base model's Hugging Face folder.")],
    dtype: Annotated[DType, typer.Option(help="How weights and KV are held.")] = "float32",
    device: Annotated[str, typer.Option(help="A torch device, say cpu or cuda:0.")] = "cpu",
    dummy_weights: Annotated[bool, typer.Option("--dummy-weights", help="Random weights of the shape.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits whatever the batch.")] = False,
    max_running: Annotated[int, typer.Option(min=1, help="Requests in one step.")] = 64,
    pool_mib: Annotated[float, typer.Option(min=1, help="Size of the page pool.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Times that the workload is run.")] = 3,
    seed: SeedOption = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a workload in this process, all requests at once: what the engine does without a server around it."""
    from lorasrv.config import SchedulerConfig
    from lorasrv.llm import LLM
    from lorasrv_bench.offline import run
    from lorasrv_bench.records import header, write
    from lorasrv_bench.workloads import parse_workload

    drawn = parse_workload(workload, seed)
    with (
        LLM(
            model,
            dtype=dtype,
            device=device,
            dummy_weights=dummy_weights,
            deterministic=deterministic,
            pool_bytes=int(pool_mib * 2**20),
            scheduler=SchedulerConfig(max_running=max_running, max_step_tokens=max(512, max_running)),
        ) as llm,
        _phases() as phase,
    ):
        summary = run(llm, drawn, model, dtype=dtype, repeats=repeats, exact=deterministic, phase=phase)
    told = header(drawn, bench="offline", base=f"{model.name}, {dtype}", server=repr(llm), max_running=max_running)
    if out is not None:
        write(out, told, (), (), summary)
    _print(told, summary, as_json)
    raise typer.Exit(INTERNAL if summary["checks"]["wrong"] else 0)


@app.command("compare")
def compare(
    a: Annotated[Path, typer.Argument(help="A run that --out has written.")],
    b: Annotated[Path, typer.Argument(help="Another of the same workload.")],
    as_json: JsonOption = False,
) -> None:
    """Every figure of two runs, and the second over the first. Runs that were not asked the same are refused."""
    from lorasrv_bench import records
    from lorasrv_bench.compare import compare as figures_of

    rows = figures_of(records.read(a), records.read(b))
    if as_json:
        print_json({name: {"a": ours, "b": theirs, "ratio": ratio} for name, ours, theirs, ratio in rows})
        return
    table = Table("figure", "a", "b", "b / a", box=None)
    for name, ours, theirs, ratio in rows:
        table.add_row(name, f"{ours:.4g}", f"{theirs:.4g}", "" if ratio is None else f"{ratio:.3f}")
    print_table(table)


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Runs that --out has written.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The page.")] = Path("report.html"),
) -> None:
    """A page of runs: figures, distributions, the pool by owner, and, for several, curves over adapters."""
    from lorasrv_bench import records
    from lorasrv_bench.report import report as page_of

    out.write_text(page_of([records.read(path) for path in runs]), encoding="utf-8")
    print(out)


def _keys(file: Path | None, target: Target | None) -> tuple[str | None, ...]:
    if file is None:
        return (api_key_of(resolve(target)),)
    keys = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    if not keys:
        raise ConfigurationError(f"{file} holds no key")
    return keys


@contextmanager
def _phases() -> Iterator[Callable[..., Any]]:
    """Live bars, one for each phase of a run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress(*columns) as bars:

        @contextmanager
        def phase(name: str, total: int) -> Iterator[Callable[[], None]]:
            task = bars.add_task(name, total=total)
            yield lambda: bars.advance(task)

        yield phase


def _print(told: Mapping[str, Any], summary: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"header": dict(told), "summary": dict(summary)})
        return
    print(f"{told['workload']}, seed {told['seed']}; commit {told['commit']}; {told['machine']}")
    print("checked: " + ("; ".join(summary["checks"]["done"]) or "nothing"))
    if summary["checks"]["wrong"]:
        print("NO SCORE, the output is wrong:")
        for each in summary["checks"]["wrong"][:10]:
            print(f"- {each}")
        return
    table = Table("", "mean", "p50", "p90", "p99", box=None)
    for name, value in summary.items():
        match value:
            case {"p50": _}:
                cells = (1000 * value[key] for key in ("mean", "p50", "p90", "p99"))
                table.add_row(f"{name.removesuffix('_s')} ms", *(f"{cell:.1f}" for cell in cells))
            case int() | float():
                print(f"{name}: {value:.4g}")
            case _ if name in ("tenants", "server"):
                print(f"{name}: {json.dumps(value)}")
            case _:
                pass
    print_table(table)
    for each in summary.get("client", {}).get("bound", ()):
        print(f"CLIENT-BOUND: {each}; the server may be faster than this, try more --processes")
