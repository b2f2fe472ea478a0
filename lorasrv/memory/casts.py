"""Weights cast to the type that they are served in, bit for bit as torch casts them.

numpy has no bfloat16: arrays of uint16 are the bits of bfloat16 numbers here.
"""

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

FILE_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_NAN = 0x7FC0


def cast(values: Array, itemsize: int) -> Array:
    """To float32, for an itemsize of 4, or to bfloat16, for 2: to the nearest, ties to even, through float32. What is
    too large becomes infinite, as in IEEE 754; any NaN becomes some NaN.
    """
    is_bfloat16 = values.dtype == np.uint16
    if itemsize == 4:
        return (values.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else _to_float32(values)
    assert itemsize == 2, itemsize
    return values if is_bfloat16 else _to_bfloat16(_to_float32(values))


def _to_float32(values: Array) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False)


def _to_bfloat16(values: Array) -> Array:
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Half of the last place that is kept, less one where that place is even, carries into what is kept.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nans = np.isnan(values)
    if nans.any():
        rounded[nans] = _NAN
    return rounded.astype(np.uint16)
