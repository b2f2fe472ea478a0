"""Looks at every weight once: NaN, infinities, and finite values that the serving dtype cannot hold are refused."""

from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lorasrv_adapters.errors import ContentError, InvalidAdapter, listing
from lorasrv_adapters.safetensors_header import TensorEntry, iter_tensor

_FLOAT_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}
_SERVING_DTYPES = ("float32", "bfloat16")
# The smallest float32 bits that round to infinity in bfloat16, to nearest even; every infinity and NaN is above.
_BFLOAT16_OVERFLOW_BITS = 0x7F7F8000


def bad_values(file: BinaryIO, entries: Iterable[TensorEntry], serving_dtype: str) -> list[ContentError]:
    """At most two errors, one naming all tensors with NaN or Inf, one all whose values overflow `serving_dtype`."""
    assert serving_dtype in _SERVING_DTYPES, serving_dtype
    not_finite: list[str] = []
    overflowing: list[str] = []
    for entry in sorted(entries, key=lambda entry: entry.begin):
        for chunk in iter_tensor(file, entry):
            values = to_float32(chunk, entry.dtype)
            if not _all_fit(values, serving_dtype):
                (overflowing if _all_finite(chunk, entry.dtype) else not_finite).append(entry.name)
                break
    errors: list[ContentError] = []
    if not_finite:
        errors.append(InvalidAdapter(f"weights that are NaN or infinite: {listing(not_finite)}"))
    if overflowing:
        errors.append(InvalidAdapter(f"weights too large for {serving_dtype}: {listing(overflowing)}"))
    return errors


def to_float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    """Little-endian weights of a safetensors dtype as float32; values beyond its range become infinite."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return np.frombuffer(data, dtype=_FLOAT_DTYPES[dtype]).astype(np.float32, copy=False)


def _all_fit(values: NDArray[np.float32], serving_dtype: str) -> bool:
    if serving_dtype == "float32":
        return bool(np.isfinite(values).all())
    bits = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bool((bits < _BFLOAT16_OVERFLOW_BITS).all())


def _all_finite(data: bytes, dtype: str) -> bool:
    if dtype == "BF16":
        return bool(np.isfinite(to_float32(data, dtype)).all())
    return bool(np.isfinite(np.frombuffer(data, dtype=_FLOAT_DTYPES[dtype])).all())
