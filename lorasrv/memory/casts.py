"""Weights cast to the type that they are served in, bit for bit as torch casts them.

numpy has no bfloat16: arrays of uint16 are the bits of bfloat16 numbers here.
"""

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

FILE_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_NAN = 0x7FC0
# A float16's bits, as an int32 with its sign repeated above them, moved to where a float32 has them: the exponent's
# zero stands 112 lower there. The mask leaves one sign.
_HALF_SHIFT, _HALF_MASK, _HALF_SCALE = 13, np.int32(-(1 << 31) | 0x0FFFE000), np.float32(2.0**112)
_HALF_BOUND = 2.0**16
_SUBNORMAL = np.float32(2.0**-149)


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
    if values.dtype == np.float16:
        found = _widened(values)
        if found is not None:
            return found
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float32, copy=False)


def _widened(values: Array) -> Array | None:
    """Of float16, six times as fast as numpy widens them. None where some are not finite, or where this thread takes
    subnormal numbers, as small ones pass for on the way, for zero."""
    if not _SUBNORMAL * _HALF_SCALE:
        return None
    bits = values.view(np.int16).astype(np.int32)
    bits <<= _HALF_SHIFT
    bits &= _HALF_MASK
    found = bits.view(np.float32)
    found *= _HALF_SCALE
    is_finite = not found.size or (found.max() < _HALF_BOUND and found.min() > -_HALF_BOUND)
    return found if is_finite else None


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
