"""Tensors by their bits, and what rounding does to them: numpy and integers, nothing of torch, nothing of mergeflow."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Scalars: TypeAlias = Literal["opmath", "half"]

STORED: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",  # numpy has no such floats, so these three are kept by their bits
        "F8_E4M3": "|u1",
        "F8_E5M2": "|u1",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "|i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "|u1",
        "BOOL": "|b1",
    }.items()
}
FLOATS = ("F16", "BF16", "F32", "F64")
"""What there is arithmetic for; fp8 is only carried."""
INTEGERS = tuple(name for name in STORED if name[0] in "IU" or name == "BOOL")


class Tensor(NamedTuple):
    """A tensor, as a safetensors file names its dtype."""

    dtype: str
    values: Array
    """Its values; for BF16 and fp8, which numpy does not have, the bits of them."""


def tensor(dtype: str, values: object) -> Tensor:
    """A tensor of numbers that `dtype` is to hold, each rounded once."""
    if dtype in INTEGERS:
        return Tensor(dtype, np.asarray(values, STORED[dtype]))
    return rounded(np.asarray(values, np.float64), dtype)


def of_bits(dtype: str, bits: object) -> Tensor:
    """A tensor whose elements have these bits."""
    stored = STORED[dtype]
    return Tensor(dtype, np.asarray(bits, f"<u{stored.itemsize}").view(stored))


def bits(value: Tensor) -> Array:
    """The bits of every element, with one NaN in the place of all."""
    found = np.asarray(value.values).view(f"<u{STORED[value.dtype].itemsize}").copy()
    if value.dtype in FLOATS:
        found[np.isnan(as_float64(value))] = (1 << (8 * found.itemsize - 1)) - 1
    return found


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit, signs of zero included; any NaN equals any other."""
    return (
        one.dtype == other.dtype
        and one.values.shape == other.values.shape
        and bool(np.array_equal(bits(one), bits(other)))
    )


@np.errstate(all="ignore")
def as_float64(value: Tensor) -> Array:
    """The values in fp64: exactly, unless they are integers beyond 2^53."""
    if value.dtype == "BF16":
        return np.asarray(_float32_of(value.values).astype(np.float64))
    _refuse_fp8(value)
    return np.asarray(value.values.astype(np.float64))


@np.errstate(all="ignore")
def as_float32(value: Tensor) -> Array:
    """The values in fp32: exactly if they are fp16 or bf16, rounded once if they are fp64 or integers."""
    if value.dtype == "BF16":
        return _float32_of(value.values)
    _refuse_fp8(value)
    return np.asarray(value.values.astype(np.float32))


@np.errstate(all="ignore")
def rounded(values: Array, dtype: str) -> Tensor:
    """These fp32 or fp64 values, rounded once, half to even; subnormal values are kept, overflow is infinite."""
    if dtype == "BF16":
        return Tensor(dtype, _bf16_of(values))
    if dtype not in FLOATS:
        raise ValueError(f"nothing is rounded to {dtype}")
    return Tensor(dtype, np.asarray(values.astype(STORED[dtype])))


def converted(value: Tensor, dtype: str) -> Tensor:
    """As torch converts: what becomes narrower than fp32 is made fp32 first, so fp64 and integers are rounded twice."""
    if value.dtype == dtype:
        return value
    return rounded(as_float64(value) if dtype == "F64" else as_float32(value), dtype)


def quantised(scalar: float, dtype: str, scalars: Scalars) -> np.float32 | np.float64:
    """A Python float as it multiplies a tensor of `dtype`; torch before 2.1 gave it the dtype of fp16 and bf16."""
    if dtype == "F64":
        return np.float64(scalar)
    with np.errstate(all="ignore"):
        single = np.asarray(scalar, np.float64).astype(np.float32)
    if scalars == "half" and dtype in ("F16", "BF16"):
        single = as_float32(rounded(single, dtype))
    return np.float32(single[()])


@np.errstate(all="ignore")
def fused_multiply_add(factor: np.float32, x: Array, y: Array) -> Array:
    """`factor * x + y` of fp32 values, rounded to fp32 once."""
    product = np.float64(factor) * x.astype(np.float64)  # exact: 24 bits times 24 bits
    addend = y.astype(np.float64)
    total = np.asarray(product + addend)  # rounded to fp64, which settles all but what lies beside a tie of fp32
    below = np.asarray(np.nextafter(total, -np.inf).astype(np.float32))
    above = np.asarray(np.nextafter(total, np.inf).astype(np.float32))
    result = np.asarray(total.astype(np.float32)).copy()
    for place in np.argwhere(np.isfinite(total) & (below != above)):
        at = tuple(place)
        exact = Fraction(float(product[at])) + Fraction(float(addend[at]))
        result[at] = _nearer(exact, below[at], above[at])
    return result


def _nearer(exact: Fraction, below: np.float32, above: np.float32) -> np.float32:
    """The nearer of two neighbours, or on a tie the one whose last bit is 0."""
    short, beyond = exact - _fraction(below), _fraction(above) - exact
    if short == beyond:
        return above if int(below.view(np.uint32)) % 2 else below
    return below if short < beyond else above


def _fraction(value: np.float32) -> Fraction:
    """Exactly, where infinity counts as the power of two at which it begins."""
    return Fraction(float(value)) if np.isfinite(value) else Fraction(2**128) * (1 if value > 0 else -1)


def _float32_of(bf16: Array) -> Array:
    return np.asarray((bf16.astype(np.uint32) << np.uint32(16)).view(np.float32))


def _bf16_of(values: Array) -> Array:
    """The bits of the nearest bf16 values: what is left when cut off, or the next, as the middle of them says."""
    magnitude = np.abs(values)
    near = np.asarray(magnitude.astype(np.float32))
    cut = near.view(np.uint32) - (near > magnitude).astype(np.uint32)  # never above the value
    kept = cut >> np.uint32(16)
    halfway = ((kept << np.uint32(16)) | np.uint32(0x8000)).view(np.float32)
    up = (magnitude > halfway) | ((magnitude == halfway) & (kept % 2 == 1))
    found = np.where(np.isinf(magnitude), np.uint32(0x7F80), kept + up.astype(np.uint32))
    found = np.where(np.isnan(magnitude), np.uint32(0x7FC0), found) | (np.signbit(values).astype(np.uint32) << 15)
    return np.asarray(found.astype(np.uint16))


def _refuse_fp8(value: Tensor) -> None:
    if value.dtype.startswith("F8"):
        raise ValueError(f"there is no arithmetic for {value.dtype}")
