"""Trees of pairwise merges, step by step.

Sums, differences and products of two values are those of numpy in fp32 or fp64, and so is the conversion of fp32 to
fp16: one IEEE 754 operation each. Every other rounding is done by integers. Values of 16 bits are held in fp32, which
has all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergeflow.tensors import Dtype
from mergeflow.verify.floats import FLOATS, ROOM, UNSIGNED, is_nan, negative, parts, rounded, rounded_one
from mergeflow.verify.sums import signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.interfaces import Step
    from mergeflow.verify.floats import Array, Float

INTEGERS = {Dtype.BOOL: np.uint8}
"""How whole numbers are read, where numpy calls them otherwise than torch."""
HALF = 0.5
BF16_SHIFT = np.uint32(16)


class Vector(NamedTuple):
    """Values, and what they are held in."""

    dtype: Dtype
    values: Array


def carried_out(steps: Sequence[Step], rows: Sequence[tuple[Dtype, Array]], to: Dtype) -> Array:
    """The bits of what the last of `steps` makes of `rows` (dtype, bits), rounded to the floating point `to`."""
    given = [vector(dtype, bits) for dtype, bits in rows]
    registers: dict[int, Vector] = {}
    with np.errstate(all="ignore"):
        for step in steps:
            operands = [given[place] if place >= 0 else registers[-1 - place] for place in step.operands]
            registers[step.into] = _step(step, operands)
        return bits_of(registers[steps[-1].into].values, to)


def vector(dtype: Dtype, bits: Array) -> Vector:
    """Values as numpy has them; whole numbers as they are."""
    if dtype is Dtype.BF16:
        return Vector(dtype, (bits.astype(np.uint32) << BF16_SHIFT).view(np.float32))
    if dtype is Dtype.F16:
        return Vector(dtype, bits.view(np.float16).astype(np.float32))
    return Vector(dtype, bits.view(INTEGERS.get(dtype, dtype.torch_name)))


def bits_of(values: Array, to: Dtype) -> Array:
    """The bits of fp32 or fp64 values, rounded once to `to`; NaN is some NaN."""
    if to is Dtype.F64 or (values.dtype == np.float32 and to in (Dtype.F32, Dtype.F16)):
        return values.astype(np.dtype(to.torch_name)).view(UNSIGNED[to.itemsize])
    held = FLOATS[Dtype.F64 if values.dtype == np.float64 else Dtype.F32]
    bits = values.view(UNSIGNED[held.bits // 8])
    return converted(bits, held, FLOATS[to])


def converted(bits: Array, of: Float, to: Float) -> Array:
    """Values of one format in another, each rounded once, with their signs; what is beyond `to` becomes infinite.

    Where `to` has no infinity that is a NaN.
    """
    mantissa, exponent, there = parts(bits, of)
    made = rounded(np.abs(mantissa), exponent, 1, to)
    lost = is_nan(bits, of)
    infinite = (made.beyond | ~there) & ~lost
    if not to.infinite:
        lost = lost | infinite
    magnitude = np.where(infinite, np.uint64(to.largest + 1), made.bits)
    return np.where(lost, np.uint64(to.nan), signed(magnitude, negative(bits, of), to)).astype(UNSIGNED[to.bits // 8])


def _step(step: Step, operands: Sequence[Vector]) -> Vector:
    double = Dtype.F64 in {step.dtype, *(operand.dtype for operand in operands)} and step.operation != "lerp"
    computed = np.dtype(np.float64 if double else np.float32)
    x, *rest = (operand.values.astype(computed) for operand in operands)
    made: Array
    if step.operation == "scale":
        made = x * computed.type(step.factor)
    elif step.operation == "add":
        made = x + rest[0]
    elif step.operation == "subtract":
        made = x - rest[0]
    elif step.operation == "lerp":
        made = _lerp(x, rest[0], np.float32(step.factor))
    else:
        made = x
    return vector(step.dtype, bits_of(made, step.dtype))


def _lerp(x: Array, y: Array, factor: np.float32) -> Array:
    difference = y - x
    if abs(factor) < HALF:
        return fused(factor, difference, x)
    return fused(factor - np.float32(1), difference, y)


def fused(factor: np.float32, x: Array, y: Array) -> Array:
    """`factor * x + y` of fp32, rounded once."""
    single = FLOATS[Dtype.F32]
    near = np.float64(factor) * x.astype(np.float64) + y.astype(np.float64)  # right where it is 0 or not finite
    (times,), (its,), _ = parts(np.array([factor]).view(np.uint32), single)
    (one, of_one, _), (other, of_other, _) = (parts(values.view(np.uint32), single) for values in (x, y))
    product, of_product = one * times, of_one + its
    unit = np.minimum(np.where(product == 0, of_other, of_product), np.where(other == 0, of_product, of_other))
    apart = (of_product - unit, of_other - unit)
    room = ROOM - 1 - 2 * single.precision, ROOM - 1 - single.precision
    fit = ((product == 0) | (apart[0] <= room[0])) & ((other == 0) | (apart[1] <= room[1]))
    exact = (product << np.clip(apart[0], 0, room[0])) + (other << np.clip(apart[1], 0, room[1]))
    magnitude, beyond, _ = rounded(np.where(fit, np.abs(exact), 0), unit, 1, single)
    minus = exact < 0
    for at in np.flatnonzero(~fit & np.isfinite(near)):
        total = (int(product[at]) << int(apart[0][at])) + (int(other[at]) << int(apart[1][at]))
        magnitude[at], beyond[at], _ = rounded_one(abs(total), int(unit[at]), 1, single)
        minus[at] = total < 0
    made = np.where(beyond, np.uint64(single.largest + 1), magnitude)
    values: Array = signed(made, minus, single).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(near) & (near != 0), values, near.astype(np.float32))
