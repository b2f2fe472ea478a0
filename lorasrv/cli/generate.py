"""`lorasrv generate`: one prompt streamed to stdout, or a file of prompts with many at once."""

import asyncio
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from lorasrv.cli.connection import UrlOption, connect, resolve_url
from lorasrv.cli.output import JsonOption, exit_code, one_line, print_json, progress, reported_errors
from lorasrv.client import AsyncClient
from lorasrv.client.batch import Job, Outcome, generate_all
from lorasrv.client.errors import ClientError
from lorasrv.errors import ConfigurationError
from lorasrv.v1 import generation_pb2


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or give --file.")] = None,
    adapter: Annotated[
        str, typer.Option("--adapter", "-a", help="NAME, NAME@TAG, NAME@sha256:HEX, or base for the bare model.")
    ] = "base",
    max_tokens: Annotated[int | None, typer.Option(help="At most this many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a generation.", min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given again.")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiplies the adapter's own scale.")] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="One prompt a line; .jsonl or lines of JSON objects; - is stdin.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Prompts of --file at once.", min=1)] = 16,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text with an adapter. With --file, results come in the order of the prompts."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either PROMPT or --file")
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
        "scale": scale,
    }
    sampling = {key: value for key, value in given.items() if value is not None}
    with reported_errors():
        if prompt is not None:
            _generate_one(Job(prompt=prompt, adapter=adapter, sampling=sampling), url, as_json)
            return
        with sys.stdin if file == "-" else Path(file or "").open(encoding="utf-8") as lines:
            jobs = read_jobs(lines, adapter, sampling, jsonl=str(file).endswith(".jsonl"))
        code = asyncio.run(_generate_many(jobs, concurrency, resolve_url(url), as_json))
    raise typer.Exit(code)


def read_jobs(lines: Iterable[str], adapter: str, sampling: Mapping[str, Any], *, jsonl: bool) -> list[Job]:
    """A prompt per line, or a JSON object {prompt, adapter?, max_tokens?, …}; raises ConfigurationError."""
    jobs: list[Job] = []
    for number, line in enumerate(lines, start=1):
        text = line.rstrip("\r\n")
        if not text:
            continue
        if jsonl or text.startswith("{"):
            jobs.append(_read_object(text, number, adapter, sampling))
        else:
            jobs.append(Job(prompt=text, adapter=adapter, sampling=sampling))
    return jobs


_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "prompt": str,
    "adapter": str,
    "max_tokens": int,
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": int,
    "seed": int,
    "stop": list,
    "scale": (int, float),
}


def _read_object(text: str, number: int, adapter: str, sampling: Mapping[str, Any]) -> Job:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"line {number}: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise ConfigurationError(f"line {number}: not an object with a prompt")
    for key, value in fields.items():
        if key not in _FIELDS or not isinstance(value, _FIELDS[key]) or isinstance(value, bool):
            raise ConfigurationError(f"line {number}: {key!r} with value {value!r} is not a known field of that kind")
    prompt, adapter = fields.pop("prompt"), fields.pop("adapter", adapter)
    return Job(prompt=prompt, adapter=adapter, sampling={**sampling, **fields})


def _generate_one(job: Job, url: str | None, as_json: bool) -> None:
    with connect(url) as client:
        if as_json:
            response = client.generate(job.prompt, adapter=job.adapter, **job.sampling)
            print_json(_record(0, job, response))
            return
        for event in client.stream(job.prompt, adapter=job.adapter, **job.sampling):
            if isinstance(event, generation_pb2.Delta):
                print(event.text, end="", flush=True)
        print()


async def _generate_many(jobs: list[Job], concurrency: int, url: str, as_json: bool) -> int:
    """The exit code: 0, or that of the first prompt that failed."""
    codes: list[int] = []

    def emit(outcome: Outcome) -> None:
        if isinstance(outcome.result, ClientError):
            codes.append(exit_code(outcome.result))
            print(f"lorasrv: prompt {outcome.index}: {one_line(outcome.result)}", file=sys.stderr)
        if as_json:
            print_json(_record(outcome.index, outcome.job, outcome.result))
        else:
            print("" if isinstance(outcome.result, ClientError) else outcome.result.text, flush=True)

    with progress(*Progress.get_default_columns()) as bar:
        task = bar.add_task("generating", total=len(jobs))
        async with AsyncClient(url) as client:
            await generate_all(client, jobs, concurrency, emit, lambda: bar.advance(task))
    return codes[0] if codes else 0


def _record(index: int, job: Job, result: generation_pb2.GenerateResponse | ClientError) -> dict[str, Any]:
    asked = {"index": index, "prompt": job.prompt, "adapter": job.adapter}
    if isinstance(result, ClientError):
        return {**asked, "error": {"code": result.code.name, "reason": result.reason, "message": result.message}}
    finished = result.finished
    return {
        **asked,
        "text": result.text,
        "finish_reason": generation_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        "version_digest": result.started.version_digest or None,
        "seed": result.started.seed,
        "prompt_tokens": finished.usage.prompt_tokens,
        "completion_tokens": finished.usage.completion_tokens,
        "time_to_first_token_s": finished.timings.time_to_first_token.ToTimedelta().total_seconds(),
        "total_s": finished.timings.total.ToTimedelta().total_seconds(),
    }
