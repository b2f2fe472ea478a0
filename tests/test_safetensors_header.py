"""The hardened header reader: what strangers send parses to in-bounds entries or is refused."""

import io
import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from adapter_files import with_header
from lorasrv_adapters.errors import MalformedFile
from lorasrv_adapters.safetensors_header import (
    HeaderLimits,
    SafetensorsHeader,
    iter_tensor,
    read_header,
)

A = '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
B = '"b":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]}'
VALID = with_header(f"{{{A},{B}}}".encode(), bytes(8))


def read(data: bytes, limits: HeaderLimits | None = None) -> SafetensorsHeader:
    return read_header(io.BytesIO(data), limits or HeaderLimits())


def one(**changes: Any) -> bytes:
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}
    return with_header(json.dumps({"a": entry}).encode(), bytes(4))


def test_agrees_with_the_stock_writer() -> None:
    rng = np.random.default_rng(0)
    tensors = {f"t.{i}": rng.standard_normal((i + 1, 3)).astype(np.float32) for i in range(9)}
    file = io.BytesIO(save(tensors, metadata={"format": "np"}))
    header = read_header(file)
    assert header.tensors.keys() == tensors.keys()
    for name, entry in header.tensors.items():
        assert entry.shape == tensors[name].shape
        assert b"".join(iter_tensor(file, entry)) == tensors[name].tobytes()
        assert b"".join(iter_tensor(file, entry, 8)) == tensors[name].tobytes()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x01\0\0", id="shorter-than-its-length"),
        pytest.param(struct.pack("<Q", 1 << 63) + b"{}", id="length-2^63"),
        pytest.param(struct.pack("<Q", 3) + b"{}", id="length-past-the-end"),
        pytest.param(with_header(b"{}", b"\0"), id="trailing-byte"),
        pytest.param(with_header(b""), id="no-header"),
        pytest.param(with_header(b"\xff{}"), id="not-utf-8"),
        pytest.param(with_header(b'{"\xff":1}'), id="not-utf-8-inside"),
        pytest.param(with_header(b"{]"), id="not-json"),
        pytest.param(with_header(b"[]"), id="not-an-object"),
        pytest.param(with_header(b" {}"), id="leading-space"),
        pytest.param(with_header(b'{"a":' + b"[" * 100_000), id="nested"),
        pytest.param(with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), id="nested-objects"),
        pytest.param(with_header(f"{{{A},{A}}}".encode(), bytes(4)), id="duplicate-tensor"),
        pytest.param(with_header(f'{{{A[:-1]},"dtype":"U8"}}}}'.encode(), bytes(4)), id="duplicate-key"),
        pytest.param(with_header(b'{"__metadata__":{"x":NaN}}'), id="nan"),
        pytest.param(with_header(b'{"__metadata__":{"x":1}}'), id="metadata-not-strings"),
        pytest.param(with_header(b'{"a":' + b"9" * 5000 + b"}"), id="huge-integer"),
        pytest.param(one(data_offsets=[1, 5]), id="hole-or-past-the-end"),
        pytest.param(one(data_offsets=[-4, 0]), id="negative-offset"),
        pytest.param(one(data_offsets=[0, 4, 8]), id="three-offsets"),
        pytest.param(one(data_offsets=[0.0, 4.0]), id="float-offsets"),
        pytest.param(one(data_offsets=[4, 0]), id="backwards"),
        pytest.param(one(shape=[5]), id="shape-not-the-bytes"),
        pytest.param(one(shape=[-4]), id="negative-dim"),
        pytest.param(one(shape=[True, 4]), id="bool-dim"),
        pytest.param(one(shape=[1 << 62, 1 << 62]), id="overflow"),
        pytest.param(one(shape=[0], data_offsets=[0, 0]), id="zero-size"),
        pytest.param(one(shape=[1, 2, 2]), id="three-dims"),
        pytest.param(one(dtype="F128"), id="unknown-dtype"),
        pytest.param(one(dtype=["U8"]), id="dtype-not-a-string"),
        pytest.param(one(extra=1), id="extra-key"),
        pytest.param(with_header(b'{"a":null}'), id="entry-not-an-object"),
        pytest.param(b"\x80\x02ccollections\nOrderedDict\n" + bytes(64), id="pickle"),
        pytest.param(b"PK\x03\x04" + bytes(64), id="zip"),
    ],
)
def test_refuses(data: bytes) -> None:
    with pytest.raises(MalformedFile):
        read(data)


def test_refuses_overlap_and_hole() -> None:
    for begin in (2, 6):
        moved = B.replace("[4,8]", f"[{begin},{begin + 4}]")
        with pytest.raises(MalformedFile, match=r"overlaps|hole"):
            read(with_header(f"{{{A},{moved}}}".encode(), bytes(10)))


@pytest.mark.parametrize(
    "name", ["", "a\0b", "../a", "a/../b", "a..b", "/etc/passwd", "\u202ea", "a b", "x" * 257, "\ud800", "а"]
)
def test_refuses_names(name: str) -> None:
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    with pytest.raises(MalformedFile, match="tensor name") as refused:
        read(with_header(json.dumps({name: entry}).encode(), bytes(4)))
    assert str(refused.value).isascii()
    assert str(refused.value).isprintable()


def test_limits_are_arguments() -> None:
    with pytest.raises(MalformedFile, match="2 tensors are over the limit of 1"):
        read(VALID, HeaderLimits(max_tensors=1))
    with pytest.raises(MalformedFile, match="over the limit of 10"):
        read(VALID, HeaderLimits(max_header_bytes=10))
    assert read(one(shape=[1, 2, 2]), HeaderLimits(max_ndim=3)).tensors["a"].shape == (1, 2, 2)
    assert set(read(VALID).tensors) == {"a", "b"}


@pytest.mark.row(2, 3, 7)
def test_millions_of_zero_size_tensors_are_refused_unread() -> None:
    entry = '"t%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % i for i in range(20_000)) + "}").encode()
    data = struct.pack("<Q", 80 << 20) + header
    file = io.BytesIO(data + bytes((80 << 20) - len(header)))
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFile, match="over the limit of 1048576"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_a_file_cut_short_after_its_header_was_read() -> None:
    entry = read(VALID).tensors["b"]
    with pytest.raises(MalformedFile, match="ends inside"):
        b"".join(iter_tensor(io.BytesIO(VALID[:-1]), entry))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "X"]),
        "shape": st.lists(st.integers(-1, 5), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 30), min_size=2, max_size=2),
    }
)


def parses_within_bounds_or_refuses(data: bytes) -> None:
    try:
        header = read(data)
    except MalformedFile:
        return
    ends = [8 + int.from_bytes(data[:8], "little")]
    for entry in header.tensors.values():
        assert entry.begin == ends[-1]
        ends.append(entry.end)
        assert len(b"".join(iter_tensor(io.BytesIO(data), entry))) == entry.num_bytes > 0
    assert ends[-1] == len(data)


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=6), ENTRIES | JSON_VALUES, max_size=4), st.integers(0, 40))
def test_any_json_header(fields: dict[str, Any], data_bytes: int) -> None:
    parses_within_bounds_or_refuses(with_header(json.dumps(fields).encode(), bytes(data_bytes)))


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, len(VALID)),
)
def test_any_mutated_header(flips: list[tuple[int, int]], length: int) -> None:
    data = bytearray(VALID)
    for position, value in flips:
        data[position] = value
    parses_within_bounds_or_refuses(bytes(data))
    parses_within_bounds_or_refuses(bytes(data[:length]))
