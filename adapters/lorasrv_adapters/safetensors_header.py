"""A safetensors header reader for files of strangers.

The stock parser accepts duplicate keys, zero-size dimensions and any name, and spends gigabytes on a large header.
This one checks the size of the header before reading it, and hands out only entries that lie inside the file, do
not overlap, leave no byte over and hold exactly shape x dtype bytes. The same reader streams base model shards,
with larger limits.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO

from lorasrv_adapters.errors import MalformedFile, quote
from lorasrv_adapters.strict_json import parse_object

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
        **dict.fromkeys(("U32", "I32", "F32"), 4),
        **dict.fromkeys(("U64", "I64", "F64"), 8),
    }
)

_WHAT = "safetensors header"
_LENGTH_BYTES = 8
_MAX_DIM = 1 << 48
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
# A pickle of protocol 2 and up, and the zip archive that torch.save makes around one.
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


@dataclass(frozen=True, kw_only=True)
class HeaderLimits:
    """What a header may ask for; the defaults suit adapters, of which a large one has some thousand tensors."""

    max_header_bytes: int = 1 << 20
    max_tensors: int = 8192
    max_ndim: int = 2
    max_name_chars: int = 256


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor; `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """All tensors of a file by name, in the order of their bytes."""

    tensors: Mapping[str, TensorEntry]


def read_header(file: BinaryIO, limits: HeaderLimits = HeaderLimits()) -> SafetensorsHeader:
    """Read and check the header of a seekable file; raises MalformedFile."""
    return parse_header(*read_header_bytes(file, limits), limits)


def read_header_bytes(file: BinaryIO, limits: HeaderLimits = HeaderLimits()) -> tuple[bytes, int]:
    """A header's JSON, unparsed, and the bytes of the whole file, by its length in front; raises MalformedFile."""
    file_bytes = file.seek(0, 2)
    file.seek(0)
    start = file.read(_LENGTH_BYTES)
    if len(start) < _LENGTH_BYTES:
        raise MalformedFile(f"{_WHAT}: file of {file_bytes} bytes is shorter than the {_LENGTH_BYTES} of its length")
    header_bytes = int.from_bytes(start, "little")
    if header_bytes > file_bytes - _LENGTH_BYTES:
        hint = "; the file looks like a pickle, which is never accepted" if start.startswith(_PICKLE_STARTS) else ""
        raise MalformedFile(f"{_WHAT}: length {header_bytes} is past the end of a file of {file_bytes} bytes{hint}")
    if header_bytes > limits.max_header_bytes:
        raise MalformedFile(f"{_WHAT}: length {header_bytes} is over the limit of {limits.max_header_bytes}")
    data = file.read(header_bytes)
    if len(data) != header_bytes or not data.startswith(b"{"):
        raise MalformedFile(f"{_WHAT}: does not start with '{{'")
    return data, file_bytes


def parse_header(data: bytes, file_bytes: int, limits: HeaderLimits = HeaderLimits()) -> SafetensorsHeader:
    """What `read_header_bytes` has read, checked; raises MalformedFile."""
    fields = parse_object(data, _WHAT)
    _check_metadata(fields.pop(_METADATA, {}))
    if len(fields) > limits.max_tensors:
        raise MalformedFile(f"{_WHAT}: {len(fields)} tensors are over the limit of {limits.max_tensors}")
    data_start = _LENGTH_BYTES + len(data)
    entries = [_entry(name, value, data_start, limits) for name, value in fields.items()]
    entries.sort(key=lambda entry: entry.begin)
    _check_contiguous(entries, data_start, file_bytes)
    return SafetensorsHeader(tensors=MappingProxyType({entry.name: entry for entry in entries}))


def iter_tensor(file: BinaryIO, entry: TensorEntry, chunk_bytes: int = 4 << 20) -> Iterator[bytes]:
    """A tensor's bytes, row-major and little-endian, in chunks of whole elements. Raises MalformedFile when the file
    has become shorter."""
    chunk_bytes -= chunk_bytes % 8
    for begin in range(entry.begin, entry.end, chunk_bytes):
        num_bytes = min(chunk_bytes, entry.end - begin)
        file.seek(begin)
        data = file.read(num_bytes)
        if len(data) != num_bytes:
            raise MalformedFile(f"tensor {entry.name}: the file ends inside it")
        yield data


def _entry(name: str, value: Any, data_start: int, limits: HeaderLimits) -> TensorEntry:
    if len(name) > limits.max_name_chars or not _SAFE_NAME.fullmatch(name):
        raise MalformedFile(
            f"{_WHAT}: tensor name {quote(name)} is not up to {limits.max_name_chars} letters, digits, '_', '-' "
            "and single dots"
        )
    if not isinstance(value, dict) or value.keys() != _ENTRY_KEYS:
        raise MalformedFile(f"{_WHAT}: tensor {name} does not have exactly the keys {sorted(_ENTRY_KEYS)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise MalformedFile(f"{_WHAT}: tensor {name} has unknown dtype {quote(dtype)}")
    if not isinstance(shape, list) or not all(type(dim) is int and 0 < dim <= _MAX_DIM for dim in shape):
        raise MalformedFile(f"{_WHAT}: tensor {name} has shape {quote(shape)}; dimensions are integers >= 1")
    if len(shape) > limits.max_ndim:
        raise MalformedFile(f"{_WHAT}: tensor {name} has {len(shape)} dimensions; the limit is {limits.max_ndim}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_offset(o) for o in offsets):
        raise MalformedFile(f"{_WHAT}: tensor {name} has data_offsets {quote(offsets)}")
    begin, end = offsets
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != num_bytes:
        raise MalformedFile(
            f"{_WHAT}: tensor {name} of {dtype} {quote(shape)} takes {num_bytes} bytes, not {end - begin}"
        )
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), begin=data_start + begin, end=data_start + end)


def _is_offset(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedFile(f"{_WHAT}: {_METADATA} is not an object of strings")


def _check_contiguous(entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    expected = data_start
    for entry in entries:
        if entry.begin != expected:
            kind = "overlaps the one before it" if entry.begin < expected else "leaves a hole before it"
            raise MalformedFile(f"{_WHAT}: tensor {entry.name} at byte {entry.begin - data_start} {kind}")
        expected = entry.end
    if expected != file_bytes:
        raise MalformedFile(f"{_WHAT}: tensors end at byte {expected} of a file of {file_bytes} bytes")
