"""`lorasrv chat`: a conversation; the server keeps nothing of it, each message takes the whole of it along."""

import secrets
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Annotated, Any

import typer

from lorasrv.cli.connection import AdapterOption, UrlOption, connect
from lorasrv.cli.output import OK, exit_code, one_line
from lorasrv.cli.sampling import SamplingOptions, with_sampling
from lorasrv.client import Client
from lorasrv.client.errors import ClientError
from lorasrv.v1 import generation_pb2

PROMPT = "> "


@with_sampling
def chat(
    sampling: SamplingOptions,
    adapter: AdapterOption = "base",
    system: Annotated[str | None, typer.Option(help="What the conversation begins with.")] = None,
    url: UrlOption = None,
) -> None:
    """Talk to an adapter. Ctrl-C stops an answer, Ctrl-D ends. From a pipe, each line is a message, up to an error."""
    # All turns of a conversation share it, see the proto file.
    arguments = {**sampling.arguments(), "session_key": secrets.token_hex(8)}
    history = [] if system is None else [{"role": "system", "content": system}]
    at_terminal = sys.stdin.isatty()
    code = OK
    with connect(url) as client:
        for line in _typed() if at_terminal else sys.stdin:
            message = {"role": "user", "content": line.rstrip("\r\n")}
            if not message["content"]:
                continue
            try:
                answer, code = _answer(client, [*history, message], adapter, arguments, at_terminal), OK
            except ClientError as error:
                if not at_terminal:
                    raise
                # What was said before is worth more than an answer; the last turn's code is the command's.
                print(f"lorasrv: {one_line(error)}", file=sys.stderr)
                code = exit_code(error)
                continue
            if answer is not None:
                history += [message, {"role": "assistant", "content": answer}]
    raise typer.Exit(code)


def _typed() -> Iterator[str]:
    """Lines until Ctrl-D, with the editing and history that readline gives `input`; Ctrl-C drops one."""
    with suppress(ImportError):
        import readline  # noqa: F401  # not on every system
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _answer(
    client: Client, messages: list[dict[str, str]], adapter: str, arguments: dict[str, Any], at_terminal: bool
) -> str | None:
    """Print the answer as it comes. At a terminal Ctrl-C ends it: what has been said by then is the answer, if any."""
    said: list[str] = []
    try:
        with closing(client.stream(messages, adapter=adapter, **arguments)) as events:
            for event in events:
                if isinstance(event, generation_pb2.Delta):
                    said.append(event.text)
                    print(event.text, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        if not at_terminal:
            raise
        return "".join(said) or None
    except ClientError:
        if said:
            print(flush=True)
        raise
    print(flush=True)
    return "".join(said)
