"""What every verb prints and how it ends: results on stdout, one-line errors on stderr, documented exit codes."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table

from lorasrv.client.errors import ClientError
from lorasrv.errors import ConfigurationError, EngineUnavailable, InternalError, LorasrvError
from lorasrv_adapters.errors import AdapterError, AdapterNotFound, RegistryUnavailable

OK, INTERNAL, USAGE, NOT_FOUND, AUTH, REFUSED, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

EXIT_CODES = (
    "Exit codes: 0 ok, 1 internal error, 2 usage, 3 not found, 4 not authorised, 5 refused by the server or by "
    "validation, 6 server unavailable or deadline exceeded, 130 interrupted."
)

_PIPE_WIDTH = 1000

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Complete: a test holds it. What comes from no server of ours, or from a defect, is internal.
OF_CODE: Mapping[grpc.StatusCode, int] = {
    grpc.StatusCode.NOT_FOUND: NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: AUTH,
    grpc.StatusCode.PERMISSION_DENIED: AUTH,
    grpc.StatusCode.INVALID_ARGUMENT: REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: REFUSED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: REFUSED,
    grpc.StatusCode.ALREADY_EXISTS: REFUSED,
    grpc.StatusCode.ABORTED: REFUSED,
    grpc.StatusCode.OUT_OF_RANGE: REFUSED,
    grpc.StatusCode.UNIMPLEMENTED: REFUSED,
    grpc.StatusCode.UNAVAILABLE: UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: UNAVAILABLE,
    grpc.StatusCode.CANCELLED: INTERNAL,
    grpc.StatusCode.UNKNOWN: INTERNAL,
    grpc.StatusCode.INTERNAL: INTERNAL,
    grpc.StatusCode.DATA_LOSS: INTERNAL,
}


@contextmanager
def reported_errors() -> Iterator[None]:
    """Ends the command with one line and an exit code for every error that a user can run into."""
    try:
        try:
            yield
        finally:
            _flush()
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads on, as behind `| head`: nothing to say, and nobody to say it to.
        raise typer.Exit(OK) from None
    except UnicodeError as error:
        fail(f"not Unicode text: {error.reason if isinstance(error, UnicodeEncodeError) else error}", USAGE)
    except (ClientError, LorasrvError, AdapterError, OSError) as error:
        fail(one_line(error), exit_code(error))
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; pip install 'lorasrv[server]' has it", USAGE)


def _flush() -> None:
    """What cannot be written is to be known while it can still be said; Python would try again at its end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def exit_code(error: Exception) -> int:
    match error:
        case ClientError():
            return OF_CODE[error.code]
        case ConfigurationError():
            return USAGE
        case AdapterNotFound() | FileNotFoundError():
            return NOT_FOUND
        case EngineUnavailable() | RegistryUnavailable():
            return UNAVAILABLE
        case InternalError():
            return INTERNAL
        case LorasrvError() | AdapterError() | FileExistsError() | PermissionError() | IsADirectoryError():
            return REFUSED
        case _:
            return INTERNAL


def one_line(error: Exception) -> str:
    """The error on one line, its reason in front where it has one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    reason = getattr(error, "reason", None)
    text = " ".join(str(error).split())
    return f"{reason}: {text}" if reason else text


def fail(message: str, code: int) -> None:
    """One line on stderr, and the end of the command."""
    print(f"lorasrv: {message}", file=sys.stderr)
    raise typer.Exit(code)


def print_table(table: Table) -> None:
    """Fitted to a terminal, with nothing cut off; whole where nobody looks at the width."""
    for column in table.columns:
        column.overflow = "fold"
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=_PIPE_WIDTH)
    # Rich would end the command itself when nobody reads on.
    with console.capture() as shown:
        console.print(table)
    print(shown.get(), end="")


def progress(*columns: str | ProgressColumn) -> Progress:
    """A progress bar on stderr; nothing where that is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_json(value: Any) -> None:
    """One line of JSON."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def message_dict(message: Message) -> dict[str, Any]:
    """A message with its proto field names, all of them; integers stay integers, durations are seconds."""
    return {
        field.name: _field_value(field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def _field_value(field: Any, value: Any) -> Any:
    if not field.is_repeated:
        return _value(field, value)
    if isinstance(value, Mapping):
        return dict(value)
    return [_value(field, each) for each in value]


def _value(field: Any, value: Any) -> Any:
    if isinstance(value, Duration):
        return value.ToTimedelta().total_seconds()
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return message_dict(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value
