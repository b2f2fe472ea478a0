"""Writes docs/api.md out of the proto files' comments and the table of errors: `python docs/generate_api.py`."""

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from lorasrv.server.status import OUTCOMES

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "api.md"
PACKAGE = "lorasrv.v1"
FILES = ("generation", "adapter", "server")
INTRODUCTION = """\
# API

Generated from `proto/lorasrv/v1/` by `make docs`; change it there. Every call is gRPC in the package `lorasrv.v1`;
server reflection is on.
"""
ERRORS = """\
## Errors

A call that fails carries a google.rpc.Status with an ErrorInfo: domain `lorasrv` and one of these reasons, which are
stable. A BadRequest or PreconditionFailure names what is to be changed, a RetryInfo says after how many seconds to try
again. What gRPC itself refuses (a message or metadata over the cap, a deadline that the client notices) has a code
alone.
"""

# The numbers of these fields in descriptor.proto make the paths of comments.
_FILE_MESSAGE, _FILE_ENUM, _FILE_SERVICE = 4, 5, 6
_MESSAGE_FIELD, _ENUM_VALUE, _SERVICE_METHOD = 2, 2, 2


class Page:
    """One proto file as Markdown."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(location.path): " ".join(location.leading_comments.split())
            for location in file.source_code_info.location
        }
        self._detached = {
            tuple(location.path): [" ".join(text.split()) for text in location.leading_detached_comments]
            for location in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        for index, service in enumerate(self._file.service):
            yield from self._service(service, (_FILE_SERVICE, index))
        for index, message in enumerate(self._file.message_type):
            yield from self._message(message, (_FILE_MESSAGE, index))
        for index, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (_FILE_ENUM, index))

    def _service(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        yield from (f"## {service.name}", "", *self._paragraph(path))
        for index, method in enumerate(service.method):
            asked = "stream " * method.client_streaming + _linked(method.input_type)
            answered = "stream " * method.server_streaming + _linked(method.output_type)
            yield from (f"### {service.name}.{method.name}", "", f"{asked} → {answered}", "")
            yield from self._paragraph((*path, _SERVICE_METHOD, index))

    def _message(self, message: DescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        yield from (f"### {message.name}", "", *self._paragraph(path))
        for index in range(len(message.field)):
            for text in self._detached.get((*path, _MESSAGE_FIELD, index), ()):
                yield from (text, "")
        maps = {f".{PACKAGE}.{message.name}.{nested.name}": nested for nested in message.nested_type}
        rows = [
            (field.name, _type(field, message, maps), self._comments.get((*path, _MESSAGE_FIELD, index), ""))
            for index, field in enumerate(message.field)
        ]
        yield from _table(("field", "type", ""), rows)

    def _enum(self, enum: EnumDescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        yield from (f"### {enum.name}", "", *self._paragraph(path))
        rows = [
            (value.name, str(value.number), self._comments.get((*path, _ENUM_VALUE, index), ""))
            for index, value in enumerate(enum.value)
        ]
        yield from _table(("value", "number", ""), rows)

    def _paragraph(self, path: tuple[int, ...]) -> tuple[str, ...]:
        text = self._comments.get(path)
        return (text, "") if text else ()


def _type(field: FieldDescriptorProto, message: DescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    if field.type_name in maps:
        key, value = maps[field.type_name].field
        return f"map of {_scalar(key)} to {_scalar(value)}"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {_scalar(field)}"
    if field.proto3_optional:
        return f"optional {_scalar(field)}"
    if field.HasField("oneof_index"):
        return f"{_scalar(field)}, one of {message.oneof_decl[field.oneof_index].name}"
    return _scalar(field)


def _scalar(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _linked(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _linked(full_name: str) -> str:
    package, _, name = full_name.lstrip(".").rpartition(".")
    return f"[{name}](#{name.lower()})" if package == PACKAGE else f"{package}.{name}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [_row(row) for row in rows]
    if lines:
        yield from (_row(head), "|---" * len(head) + "|", *lines, "")


def _row(cells: tuple[str, ...]) -> str:
    return "|".join(("", *(f" {cell.replace('|', '&#124;')} " if cell else " " for cell in cells), ""))


def _errors() -> Iterator[str]:
    """By reason; the class that comes last says what it means where the root has the same."""
    rows: dict[str, tuple[str, ...]] = {}
    for kind, outcome in OUTCOMES.items():
        retry = "" if outcome.retry_s is None else f"{outcome.retry_s} s"
        meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        rows[kind.reason] = (kind.reason, outcome.code.name, retry, meaning)
    return _table(("reason", "code", "retry after", "meaning"), (rows[reason] for reason in sorted(rows)))


def api() -> str:
    """The text of docs/api.md."""
    protos = [f"{PACKAGE.replace('.', '/')}/{name}.proto" for name in FILES]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        include = Path(protoc.__file__).parent / "_proto"
        arguments = (f"-I{ROOT / 'proto'}", f"-I{include}", "--include_source_info", f"--descriptor_set_out={out}")
        if protoc.main(["protoc", *arguments, *protos]) != 0:
            raise SystemExit("protoc failed")
        files = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    pages = ("\n".join(Page(files[proto]).lines()) for proto in protos)
    errors = "\n".join(_errors())
    return "\n".join((INTRODUCTION, *pages, ERRORS, errors))


if __name__ == "__main__":
    TARGET.write_text(api())
    sys.exit(0)
