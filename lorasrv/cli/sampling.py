"""How text is drawn: the options that every generating verb has."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Annotated, Any

import typer

MAX_COUNT = 2**32 - 1
MAX_SEED = 2**64 - 1


def _biases(options: Iterable[str] | None) -> dict[int, float] | None:
    if not options:
        return None
    try:
        pairs = [option.split("=") for option in options]
        return {_token_id(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise typer.BadParameter(f"--logit-bias: {' '.join(options)!r} is not of the form ID=BIAS") from None


def _words(options: Iterable[str] | None) -> list[list[int]] | None:
    return [_token_ids(option) for option in options] if options else None


def _token_ids(option: str) -> list[int]:
    try:
        return [_token_id(text) for text in option.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--bad-words: {option!r} is not of the form ID,ID,…") from None


def _token_id(text: str) -> int:
    token_id = int(text)
    if not 0 <= token_id <= MAX_COUNT:
        raise ValueError(f"{token_id} is no token id")
    return token_id


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """A field for each option; None, and nothing in a list, is not given."""

    max_tokens: Annotated[int | None, typer.Option(help="At most this many tokens.", min=0, max=MAX_COUNT)] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None
    top_p: Annotated[float | None, typer.Option(help="In (0, 1].")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.", min=0, max=MAX_COUNT)] = None
    seed: Annotated[int | None, typer.Option(help="Repeats a generation.", min=0, max=MAX_SEED)] = None
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given again.")] = None
    scale: Annotated[float | None, typer.Option(help="Multiplies the adapter's own scale.")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest's chance.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Of tokens in prompt and output; 1 is none.")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="Of tokens in the output.")] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="For each time a token is in the output.")] = None
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a token's logit; may be given again.")
    ] = None
    bad_words: Annotated[
        list[str] | None, typer.Option(metavar="ID,ID…", help="Tokens never to come in a row; may be given again.")
    ] = None
    stop_token: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="End with this token; may be given again.", min=0, max=MAX_COUNT),
    ] = None
    min_tokens: Annotated[
        int | None, typer.Option(help="Do not end before this many tokens.", min=0, max=MAX_COUNT)
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind an end-of-sequence token.")] = False
    ignore_version_defaults: Annotated[
        bool, typer.Option("--ignore-version-defaults", help="As if the adapter version had no defaults.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Those that were given, as the client takes them. Raises typer.BadParameter."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["logit_bias"] = _biases(self.logit_bias)
        given["bad_words"] = _words(self.bad_words)
        given["stop_token_ids"] = given.pop("stop_token")
        return {name: value for name, value in given.items() if not (value is None or value is False or value == [])}


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """A command's parameter `sampling: SamplingOptions` as an option for each of its fields, after all others."""
    parameters = [each for each in inspect.signature(command).parameters.values() if each.name != "sampling"]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=field.type, default=field.default)
        for field in fields(SamplingOptions)
    ]
    names = [option.name for option in options]

    @wraps(command)
    def expanded(**given: Any) -> None:
        command(sampling=SamplingOptions(**{name: given.pop(name) for name in names}), **given)

    shown = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters] + options
    # What typer reads a command's options from.
    expanded.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportAttributeAccessIssue]
    expanded.__annotations__ = {each.name: each.annotation for each in shown}
    return expanded
