"""Weights are cast as torch casts them, bit for bit."""

import numpy as np
import pytest
import torch

from lorasrv.memory.casts import FILE_TYPES, Array, cast

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SERVED = {4: torch.float32, 2: torch.bfloat16}
# Around what is infinite, subnormal or zero in a smaller type, and halfway between two of its numbers.
EDGES = [0.0, -0.0, 1e-46, 1e-40, 2**-133, 3 * 2**-134, 1e-8, 65504.0, 65520.0, 3.3895e38, 3.3961e38, 3.4028235e38]
EDGES += [3.4028236e38, 1e300, float("inf"), float("nan"), 1.00390625, 1.01171875, 1.0 + 2**-24, 1.0 + 3 * 2**-24]


def random_bits(name: str, count: int) -> Array:
    """Any bits at all: every exponent, subnormal numbers, infinities and NaNs."""
    return np.frombuffer(np.random.default_rng(0).bytes(count * np.dtype(FILE_TYPES[name]).itemsize), FILE_TYPES[name])


def as_torch(values: Array, name: str) -> torch.Tensor:
    return torch.from_numpy(values.copy()).view(TORCH[name])


@pytest.mark.parametrize("itemsize", SERVED)
@pytest.mark.parametrize("name", TORCH)
def test_any_bits_are_cast_as_torch_casts_them(name: str, itemsize: int) -> None:
    values = random_bits(name, 1 << 16 if name in ("F16", "BF16") else 200_000)
    if name in ("F16", "BF16"):
        values = np.arange(1 << 16, dtype=np.uint16).view(FILE_TYPES[name])
    check(values, name, itemsize)


@pytest.mark.parametrize("itemsize", SERVED)
@pytest.mark.parametrize("name", ["F64", "F32", "F16"])
def test_edges_are_cast_as_torch_casts_them(name: str, itemsize: int) -> None:
    with np.errstate(over="ignore"):
        values = np.array([*EDGES, *(-edge for edge in EDGES)]).astype(FILE_TYPES[name])
    check(values, name, itemsize)


@pytest.mark.parametrize("itemsize", SERVED)
def test_any_finite_half_is_cast_alone_and_beside_others(itemsize: int) -> None:
    """With one that is not finite among them they take another way."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = values[np.isfinite(values)]
    check(finite, "F16", itemsize)
    check(np.append(finite, np.float16("inf")), "F16", itemsize)
    check(finite[:0], "F16", itemsize)
    for value in (finite[:1], finite[-1:], np.array([6e-8, -6e-5], np.float16)):
        check(value, "F16", itemsize)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such mode")
def test_small_halves_are_cast_where_subnormal_numbers_are_taken_for_zero() -> None:
    values = np.arange(1, 2000, dtype=np.uint16).view(np.float16)
    wanted = values.astype(np.float64)
    torch.set_flush_denormal(True)
    try:
        found = cast(values, 4)
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(found, wanted.astype(np.float32))


def check(values: Array, name: str, itemsize: int) -> None:
    wanted = as_torch(values, name).to(SERVED[itemsize])
    found = as_torch(cast(values, itemsize), {4: "F32", 2: "BF16"}[itemsize])
    nan = wanted.isnan()
    assert torch.equal(found.isnan(), nan)
    bits = {4: torch.int32, 2: torch.int16}[itemsize]
    assert torch.equal(found.view(bits)[~nan], wanted.view(bits)[~nan])


def test_a_matrix_that_is_not_contiguous_is_cast() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert torch.equal(as_torch(cast(values, 2), "BF16").float(), torch.from_numpy(values.copy()))
