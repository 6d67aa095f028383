"""Means by integers: every value widened to a multiple of one unit, added up as it is, divided and rounded once.

The unit is that of each element: what its rows are all multiples of. Where their sum does not fit 62 bits of it,
because magnitudes lie far apart, Python's integers, which are of any size, make that element alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergeflow.verify.floats import FLOATS, ROOM, Parts, finite, fits, multiples, parts, rounded, rounded_one

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mergeflow.tensors import Dtype
    from mergeflow.verify.floats import Array, Float

NOWHERE = 1 << 20
"""An exponent beyond all others."""
FP64_BITS = 53
CLOSE = 24
"""The unit of fp16 is 2^-24, of which the values of fp8 are multiples, too."""
NARROW = 41
"""Bits that they have at most, in that unit."""


class Mean(NamedTuple):
    """What the mean of some rows is."""

    bits: Array
    """uint64: the sign and the magnitude."""
    other: Array
    """The same on the other side of the exact mean."""
    beyond: Array
    """bool: where the format does not hold the mean."""
    empty: Array
    """bool: where no row has a finite value."""
    long: Array
    """bool: where the sum has more than the 53 bits that one fp64 holds."""


def mean(rows: Sequence[tuple[Dtype, Array]], shares: Sequence[int], to: Float) -> Mean:
    """The mean of what is finite in `rows` (dtype, bits), with shares renewed: exact, and rounded once."""
    total = sum(shares)
    sums, unit, divisor, fit = _sums([(FLOATS[dtype], bits) for dtype, bits in rows], shares)
    if not fits(total, to):
        fit[:] = False
    empty = divisor == 0
    whole = divisor.min() == total  # numpy divides faster by a number
    by = total if whole else np.where(empty, 1, divisor)
    magnitude, beyond, other = rounded(np.where(fit, np.abs(sums), 0), unit, by, to)
    minus, long = sums < 0, ~fit | (np.abs(sums) >> FP64_BITS != 0)
    far = np.flatnonzero(~fit & ~empty)
    for at, (exact, least) in zip(far, _one_by_one(rows, shares, far), strict=True):
        magnitude[at], beyond[at], other[at] = rounded_one(abs(exact), least, int(divisor[at]), to)
        minus[at] = exact < 0
    return Mean(signed(magnitude, minus, to), signed(other, minus, to), beyond & ~empty, empty, long)


def signed(magnitude: Array, minus: Array, to: Float) -> Array:
    """Magnitudes with their signs, where the format has such a zero."""
    sign = np.where(minus & (to.minus_zero | (magnitude != 0)), np.uint64(1) << np.uint64(to.bits - 1), 0)
    made: Array = magnitude | sign.astype(np.uint64)
    return made


def _narrow(rows: Sequence[tuple[Float, Array]], total: int) -> bool:
    """Whether all sums of such rows fit, in the unit of fp16 if need be."""
    return all(of.bits <= 16 and of.unit >= -CLOSE for of, _ in rows) and NARROW + total.bit_length() <= ROOM


def _sums(rows: Sequence[tuple[Float, Array]], shares: Sequence[int]) -> tuple[Array, Array, Array, Array]:
    """(sum, its unit, what it is divided by, whether it fits) of every element."""
    width = len(rows[0][1])
    total = sum(shares)
    sums, divisor = np.zeros(width, dtype=np.int64), np.full(width, total)
    if narrow := _narrow(rows, total):
        unit, fit = np.full(width, -CLOSE), np.ones(width, dtype=bool)
    else:
        unit, fit = _units(rows, width, total)
    for (of, bits), share in zip(rows, shares, strict=True):
        if narrow:
            term = np.take(multiples(of, -CLOSE), bits)
        else:
            term, exponent, _ = parts(bits, of)
            term <<= np.clip(exponent - unit, 0, ROOM)
        sums += term if share == 1 else term * share
        if not (found := finite(bits, of)).all():
            divisor -= np.where(found, 0, share)
    return sums, unit, divisor, fit


def _units(rows: Sequence[tuple[Float, Array]], width: int, total: int) -> tuple[Array, Array]:
    """The unit of every element, and whether its sum fits."""
    units, most = np.full(width, NOWHERE), np.full(width, -NOWHERE)
    for of, bits in rows:
        mantissa, exponent, _ = parts(bits, of)
        there = mantissa != 0
        units = np.where(there, np.minimum(units, exponent), units)
        most = np.where(there, np.maximum(most, exponent + of.precision), most)
    nothing = units == NOWHERE
    return np.where(nothing, 0, units), nothing | (most - units + total.bit_length() <= ROOM)


def _one_by_one(
    rows: Sequence[tuple[Dtype, Array]], shares: Sequence[int], elements: Array
) -> Iterator[tuple[int, int]]:
    """The sums of some elements as whole numbers, each with its unit."""
    least = min(FLOATS[dtype].unit for dtype, _ in rows)
    units = np.full(len(elements), NOWHERE)
    taken: list[Parts] = []
    for dtype, bits in rows:
        taken.append(parts(bits[elements], FLOATS[dtype]))
        units = np.minimum(units, np.where(taken[-1].mantissa != 0, taken[-1].exponent, NOWHERE))
    units = np.where(units == NOWHERE, least, units)
    sums = [0] * len(elements)
    for (mantissa, exponent, _), share in zip(taken, shares, strict=True):
        up = np.maximum(exponent - units, 0)  # what is 0 may have less
        for at, (its, by) in enumerate(zip(mantissa.tolist(), up.tolist(), strict=True)):
            sums[at] += (its << by) * share
    return zip(sums, units.tolist(), strict=True)
