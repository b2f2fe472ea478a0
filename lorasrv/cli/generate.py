"""`lorasrv generate`: one prompt streamed to stdout, or a file of prompts with many at once."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.progress import Progress

from lorasrv.cli.connection import AdapterOption, Target, UrlOption, connect, connect_async
from lorasrv.cli.job_file import read_jobs
from lorasrv.cli.output import JsonOption, exit_code, one_line, print_json, progress
from lorasrv.cli.sampling import MAX_COUNT, SamplingOptions, with_sampling
from lorasrv.client.batch import Job, Outcome, generate_all
from lorasrv.client.errors import ClientError
from lorasrv.v1 import generation_pb2


@with_sampling
def generate(
    sampling: SamplingOptions,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or give --file.")] = None,
    adapter: AdapterOption = "base",
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="One prompt a line; .jsonl or lines of JSON objects; - is stdin.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Prompts of --file at once.", min=1)] = 16,
    n: Annotated[int | None, typer.Option("--n", help="So many samples of each prompt.", min=1, max=MAX_COUNT)] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its output.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probabilities, and the k likeliest tokens'.", min=0, max=MAX_COUNT),
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(help="The same for the prompt's tokens.", min=0, max=MAX_COUNT)
    ] = None,
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text with an adapter. With --file, results come in the order of the prompts."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either PROMPT or --file")
    if not as_json and (logprobs is not None or prompt_logprobs is not None):
        raise typer.BadParameter("log-probabilities are printed with --json only")
    asked = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs, "n": n, "echo": echo or None}
    arguments = {**sampling.arguments(), **{name: value for name, value in asked.items() if value is not None}}
    if prompt is not None:
        _generate_one(Job(prompt=prompt, adapter=adapter, sampling=arguments), url, as_json)
        return
    with _lines(file or "") as lines:
        jobs = read_jobs(lines, adapter, arguments, jsonl=str(file).endswith(".jsonl"))
    code = asyncio.run(_generate_many(jobs, concurrency, url, as_json))
    raise typer.Exit(code)


def _lines(file: str) -> TextIO:
    if file != "-":
        return Path(file).open(encoding="utf-8", errors="surrogateescape")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def _generate_one(job: Job, target: Target | None, as_json: bool) -> None:
    with connect(target) as client:
        if as_json or job.sampling.get("n", 1) > 1:
            result = client.generate(job.prompt, adapter=job.adapter, **job.sampling)
            _print_result(Outcome(index=0, job=job, result=result), as_json)
            return
        for event in client.stream(job.prompt, adapter=job.adapter, **job.sampling):
            if isinstance(event, generation_pb2.Started):
                print(event.prompt_text, end="", flush=True)
            if isinstance(event, generation_pb2.Delta):
                print(event.text, end="", flush=True)
        print()


async def _generate_many(jobs: list[Job], concurrency: int, target: Target | None, as_json: bool) -> int:
    """The exit code: 0, or that of the first prompt that failed."""
    codes: list[int] = []

    def emit(outcome: Outcome) -> None:
        if isinstance(outcome.result, ClientError):
            codes.append(exit_code(outcome.result))
            print(f"lorasrv: prompt {outcome.index}: {one_line(outcome.result)}", file=sys.stderr)
        _print_result(outcome, as_json)

    with progress(*Progress.get_default_columns()) as bar:
        task = bar.add_task("generating", total=len(jobs))
        async with connect_async(target) as client:
            await generate_all(client, jobs, concurrency, emit, lambda: bar.advance(task))
    return codes[0] if codes else 0


def _print_result(outcome: Outcome, as_json: bool) -> None:
    """A line for each sample; as text, several samples of one prompt have a line in front of each that says which."""
    if as_json:
        for record in _records(outcome):
            print_json(record)
    elif isinstance(outcome.result, ClientError):
        print(flush=True)
    else:
        for index, sample in enumerate(outcome.result.samples):
            if len(outcome.result.samples) > 1:
                print(f"--- prompt {outcome.index}, sample {index} ---")
            print(outcome.result.started.prompt_text + sample.text, flush=True)


def _records(outcome: Outcome) -> Iterator[dict[str, Any]]:
    kind = "prompt" if isinstance(outcome.job.prompt, str) else "messages"
    asked = {"index": outcome.index, kind: outcome.job.prompt, "adapter": outcome.job.adapter}
    result = outcome.result
    if isinstance(result, ClientError):
        yield {**asked, "error": {"code": result.code.name, "reason": result.reason, "message": result.message}}
        return
    for index, sample in enumerate(result.samples):
        finished, logprobs = sample.finished, {}
        if sample.logprobs:
            logprobs["logprobs"] = _positions(sample.logprobs)
        if result.prompt_logprobs and index == 0:
            logprobs["prompt_logprobs"] = _positions(result.prompt_logprobs)
        yield {
            **asked,
            "sample": index,
            "text": result.started.prompt_text + sample.text,
            **logprobs,
            "finish_reason": generation_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
            "version_digest": result.started.version_digest or None,
            "seed": result.started.seed,
            "prompt_tokens": finished.usage.prompt_tokens,
            "completion_tokens": finished.usage.completion_tokens,
            "time_to_first_token_s": finished.timings.time_to_first_token.ToTimedelta().total_seconds(),
            "total_s": finished.timings.total.ToTimedelta().total_seconds(),
        }


def _positions(logprobs: Sequence[generation_pb2.PositionLogprobs]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": each.token.token_id,
            "logprob": each.token.logprob,
            "top": {str(top.token_id): top.logprob for top in each.top},
        }
        for each in logprobs
    ]
