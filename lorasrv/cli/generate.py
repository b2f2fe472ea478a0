"""`lorasrv generate`: one prompt streamed to stdout, or a file of prompts with many at once."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from lorasrv.cli.connection import UrlOption, connect, connect_async
from lorasrv.cli.output import JsonOption, exit_code, one_line, print_json, progress, reported_errors
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
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest's chance.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Of tokens in prompt and output; 1 is none.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Of tokens in the output.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="For each time a token is in the output.")] = None,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit; may be given again.")
    ] = None,
    bad_words: Annotated[
        list[str] | None, typer.Option(metavar="ID,ID…", help="Tokens never to come in a row; may be given again.")
    ] = None,
    stop_token: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="End with this token; may be given again.", min=0)
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Do not end before this many tokens.", min=0)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind an end-of-sequence token.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, and the k likeliest tokens'.", min=0)
    ] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="The same for the prompt's tokens.", min=0)] = None,
    n: Annotated[int | None, typer.Option("--n", help="So many samples of each prompt.", min=1)] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its output.")] = False,
    ignore_version_defaults: Annotated[
        bool, typer.Option("--ignore-version-defaults", help="As if the adapter version had no defaults.")
    ] = False,
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
    if not as_json and (logprobs is not None or prompt_logprobs is not None):
        raise typer.BadParameter("log-probabilities are printed with --json only")
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
        "scale": scale,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": _biases(logit_bias or ()) or None,
        "bad_words": [_token_ids(word) for word in bad_words or ()] or None,
        "stop_token_ids": stop_token or None,
        "min_tokens": min_tokens,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "n": n,
        "echo": echo or None,
        "ignore_version_defaults": ignore_version_defaults or None,
    }
    sampling = {key: value for key, value in given.items() if value is not None}
    with reported_errors():
        if prompt is not None:
            _generate_one(Job(prompt=prompt, adapter=adapter, sampling=sampling), url, as_json)
            return
        with sys.stdin if file == "-" else Path(file or "").open(encoding="utf-8") as lines:
            jobs = read_jobs(lines, adapter, sampling, jsonl=str(file).endswith(".jsonl"))
        code = asyncio.run(_generate_many(jobs, concurrency, url, as_json))
    raise typer.Exit(code)


def _biases(options: Iterable[str]) -> dict[int, float]:
    try:
        return {int(token_id): float(bias) for token_id, bias in (option.split("=") for option in options)}
    except ValueError:
        raise typer.BadParameter(f"--logit-bias: {' '.join(options)!r} is not of the form ID=BIAS") from None


def _token_ids(option: str) -> list[int]:
    try:
        return [int(token_id) for token_id in option.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--bad-words: {option!r} is not of the form ID,ID,…") from None


def read_jobs(lines: Iterable[str], adapter: str, sampling: Mapping[str, Any], *, jsonl: bool) -> list[Job]:
    """A prompt per line, or a JSON object {prompt or messages, adapter?, max_tokens?, …}; raises ConfigurationError."""
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _are_biases(value: Any) -> bool:
    """JSON has strings for keys."""
    if not isinstance(value, dict):
        return False
    return all(key.isdecimal() and _is_count(int(key)) and _is_number(bias) for key, bias in value.items())


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"} and all(map(_is_text, value.values()))


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "prompt": _is_text,
    "messages": _list_of(_is_message),
    "adapter": _is_text,
    "max_tokens": _is_count,
    "temperature": _is_number,
    "top_p": _is_number,
    "top_k": _is_count,
    "seed": _is_seed,
    "stop": _list_of(_is_text),
    "scale": _is_number,
    "min_p": _is_number,
    "repetition_penalty": _is_number,
    "presence_penalty": _is_number,
    "frequency_penalty": _is_number,
    "logit_bias": _are_biases,
    "bad_words": _list_of(_list_of(_is_count)),
    "stop_token_ids": _list_of(_is_count),
    "min_tokens": _is_count,
    "ignore_eos": _is_flag,
    "logprobs": _is_count,
    "prompt_logprobs": _is_count,
    "n": _is_count,
    "echo": _is_flag,
    "ignore_version_defaults": _is_flag,
}


def _read_object(text: str, number: int, adapter: str, sampling: Mapping[str, Any]) -> Job:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"line {number}: {error}") from None
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ConfigurationError(f"line {number}: not an object with a prompt or messages")
    for key, value in fields.items():
        if key not in _FIELDS or not _FIELDS[key](value):
            raise ConfigurationError(f"line {number}: {key!r} with value {value!r} is not a known field of that kind")
    prompt = fields.pop("prompt" if "prompt" in fields else "messages")
    adapter = fields.pop("adapter", adapter)
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(key): bias for key, bias in fields["logit_bias"].items()}
    return Job(prompt=prompt, adapter=adapter, sampling={**sampling, **fields})


def _generate_one(job: Job, url: str | None, as_json: bool) -> None:
    with connect(url) as client:
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


async def _generate_many(jobs: list[Job], concurrency: int, url: str | None, as_json: bool) -> int:
    """The exit code: 0, or that of the first prompt that failed."""
    codes: list[int] = []

    def emit(outcome: Outcome) -> None:
        if isinstance(outcome.result, ClientError):
            codes.append(exit_code(outcome.result))
            print(f"lorasrv: prompt {outcome.index}: {one_line(outcome.result)}", file=sys.stderr)
        _print_result(outcome, as_json)

    with progress(*Progress.get_default_columns()) as bar:
        task = bar.add_task("generating", total=len(jobs))
        async with connect_async(url) as client:
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
