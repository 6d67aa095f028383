"""Floating point as integers: every value is a whole number times a power of two, and is rounded by its bits.

Nothing here uses the floating point of a processor, of torch or of numpy: it is what those are judged by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

ROOM = 62
"""Bits of a magnitude that an int64 has room for, one being left for a carry."""
IN_A_TABLE = 2
"""Bytes: every value of such a dtype is looked up."""
UNSIGNED: dict[int, np.dtype[Any]] = {size: np.dtype(f"uint{8 * size}") for size in (1, 2, 4, 8)}
"""The bits of one element, by its bytes."""


@dataclass(frozen=True)
class Float:
    """A binary floating point format, as its standard describes it."""

    bits: int
    """Of one value."""
    precision: int
    """Significant bits of a normal value, the hidden one included."""
    least: int
    """The exponent of the smallest normal value, which is 2^least."""
    largest: int
    """The bits of the largest finite value."""
    nan: int
    """The bits of the NaN that arithmetic makes."""
    infinite: bool = True
    """Whether there are infinities; they follow the largest value."""
    minus_zero: bool = True

    @property
    def unit(self) -> int:
        """The exponent of the smallest value there is, of which all are multiples."""
        return self.least - self.precision + 1


FLOATS = {
    Dtype.F64: Float(64, 53, -1022, (0x7FF << 52) - 1, 0x7FF8 << 48),
    Dtype.F32: Float(32, 24, -126, 0x7F7FFFFF, 0x7FC00000),
    Dtype.BF16: Float(16, 8, -126, 0x7F7F, 0x7FC0),
    Dtype.F16: Float(16, 11, -14, 0x7BFF, 0x7E00),
    Dtype.F8_E5M2: Float(8, 3, -14, 0x7B, 0x7F),
    Dtype.F8_E4M3: Float(8, 4, -6, 0x7E, 0x7F, infinite=False),
    Dtype.F8_E5M2FNUZ: Float(8, 3, -15, 0x7F, 0x80, infinite=False, minus_zero=False),
    Dtype.F8_E4M3FNUZ: Float(8, 4, -7, 0x7F, 0x80, infinite=False, minus_zero=False),
}


class Parts(NamedTuple):
    """Values taken apart: `mantissa * 2^exponent`. One array each, of one length."""

    mantissa: Array
    """Signed, int64, below 2^53; 0 where the value is not finite."""
    exponent: Array
    """int64."""
    finite: Array
    """bool."""


def parts(bits: Array, of: Float) -> Parts:
    """What the values with these `bits` (unsigned) are."""
    if of.bits <= 8 * IN_A_TABLE:
        return Parts(*(column[bits] for column in _table(of)))
    return _parts(_wide(bits), of)


def finite(bits: Array, of: Float) -> Array:
    """Where a value is neither NaN nor infinite; bool."""
    if not of.minus_zero:
        there: Array = bits != of.nan
        return there
    found: Array = (bits & bits.dtype.type((1 << (of.bits - 1)) - 1)) <= bits.dtype.type(of.largest)
    return found


def is_nan(bits: Array, of: Float) -> Array:
    """Where there is no number; bool."""
    found: Array = ~finite(bits, of) & ((_magnitude(bits, of) != of.largest + 1) | (not of.infinite))
    return found


def _magnitude(bits: Array, of: Float) -> Array:
    """The bits without the sign; int64."""
    found: Array = _wide(bits) & ((1 << (of.bits - 1)) - 1)
    return found


def _wide(bits: Array) -> Array:
    """Unsigned bits as int64."""
    return bits.view(np.int64) if bits.dtype.itemsize == np.dtype(np.int64).itemsize else bits.astype(np.int64)


@cache
def multiples(of: Float, unit: int) -> Array:
    """Of all values of a format of 8 or 16 bits, by their bits: how many times 2^unit they are; int64."""
    table = _table(of)
    found: Array = table.mantissa << (table.exponent - unit)
    return found


def negative(bits: Array, of: Float) -> Array:
    """Where the sign is set, of zeros and NaN too."""
    found: Array = bits >> UNSIGNED[of.bits // 8].type(of.bits - 1) != 0
    return found


@cache
def _table(of: Float) -> Parts:
    return _parts(np.arange(1 << of.bits, dtype=np.int64), of)


def _parts(bits: Array, of: Float) -> Parts:
    magnitude = bits & ((1 << (of.bits - 1)) - 1)
    field = magnitude >> (of.precision - 1)
    mantissa = (magnitude & ((1 << (of.precision - 1)) - 1)) + ((field > 0).astype(np.int64) << (of.precision - 1))
    there = bits != of.nan if not of.minus_zero else magnitude <= of.largest
    minus = bits < 0 if of.bits == 64 else bits >> (of.bits - 1) != 0
    mantissa = np.where(there, np.where(minus, -mantissa, mantissa), 0)
    return Parts(mantissa, np.maximum(field, 1) + (of.unit - 1), there)


# --- rounding -------------------------------------------------------------------------------------------------------


class Rounded(NamedTuple):
    """Magnitudes as bits, without a sign."""

    bits: Array
    """uint64."""
    beyond: Array
    """bool: where the format does not hold the value; the bits there mean nothing."""
    other: Array
    """uint64: the bits on the other side of the exact value; the same as `bits` where that needed no rounding."""


def fits(divisor: int, to: Float) -> bool:
    """Whether `rounded` has room to divide by as much as `divisor`."""
    return ROOM - divisor.bit_length() >= to.precision + 2


def rounded(magnitude: Array, unit: Array | int, divisor: Array | int, to: Float) -> Rounded:
    """`magnitude * 2^unit / divisor`, rounded once to nearest, ties to even.

    Magnitudes are int64, not negative and below 2^62; `fits` says how large divisors may be.
    """
    up = ROOM - _bit_length(magnitude)
    scaled = magnitude << up
    quotient = scaled // divisor
    rest = scaled - quotient * divisor
    below = np.asarray(unit, dtype=np.int64) - up
    lead = _bit_length(quotient) - 1 + below
    quantum = np.maximum(lead, to.least) - (to.precision - 1)
    # Where all is cut, it is less than half of what would be kept; where there is nothing, there is nothing to cut.
    cut = np.clip(quantum - below, 1, ROOM + 1)
    kept = quotient >> cut
    lost = quotient - (kept << cut)
    half = np.int64(1) << (cut - 1)
    above = (lost > half) | ((lost == half) & ((rest != 0) | (kept & 1 != 0)))
    kept += above
    field = quantum - to.unit  # less than the format says by 1, which the hidden bit of `kept` adds where there is one
    bits = np.where(magnitude == 0, 0, (field << (to.precision - 1)) + kept)
    beyond = (bits > to.largest) | (field >= 1 << (to.bits - to.precision))
    exact = (lost == 0) & (rest == 0)
    other = np.where(exact, bits, np.where(above, bits - 1, bits + 1))
    return Rounded(bits.astype(np.uint64), beyond & (magnitude != 0), other.astype(np.uint64))


def rounded_one(magnitude: int, unit: int, divisor: int, to: Float) -> tuple[int, bool, int]:
    """As `rounded`, for one value of any size: (bits, whether it is beyond the format, the bits on the other side)."""
    if magnitude == 0:
        return 0, False, 0
    up = max(to.precision + 2 + divisor.bit_length() - magnitude.bit_length(), 0)
    quotient, rest = divmod(magnitude << up, divisor)
    quantum = max(quotient.bit_length() - 1 + unit - up, to.least) - (to.precision - 1)
    cut = quantum - unit + up
    kept, lost = quotient >> cut, quotient & ((1 << cut) - 1)
    half = 1 << (cut - 1)
    above = lost > half or (lost == half and (rest != 0 or kept & 1 != 0))
    bits = (quantum - to.unit << (to.precision - 1)) + kept + above  # as above
    other = bits if lost == rest == 0 else bits + (-1 if above else 1)
    return min(bits, 1 << to.bits - 1), bits > to.largest, min(other, 1 << to.bits - 1)


def _bit_length(values: Array) -> Array:
    """Of integers that are not negative."""
    length = np.zeros(values.shape, dtype=np.int64)
    left = values
    for step in (32, 16, 8, 4, 2, 1):
        more = left >> step
        large = more > 0
        length += np.where(large, step, 0)
        left = np.where(large, more, left)
    return length + (left > 0)
