"""What one row of results must be, by the slow arithmetic: the bits of every element, or why there can be none."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mergeflow.plan.sources import AGREE, WHOLE
from mergeflow.recipe.request import COPY, PAIRWISE, UNIFORM
from mergeflow.tensors import Dtype
from mergeflow.verify.floats import FLOATS, UNSIGNED, finite, is_nan, negative, parts, rounded_one
from mergeflow.verify.sums import mean, signed
from mergeflow.verify.trees import carried_out, converted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.plan.plan import Cell
    from mergeflow.recipe.request import Nonfinite
    from mergeflow.verify.floats import Array, Float

    Rows: TypeAlias = Sequence[tuple[Dtype, Array]]
    """Dtype and bits of every row."""

Why: TypeAlias = "tuple[int, str, int | None]"
"""The first element of which something is known, what, and the row that it is about, if it is one."""
Number: TypeAlias = "tuple[Fraction, Fraction] | None"
"""Real and imaginary part; None for what is not finite."""
NOT_FINITE = "has a value that is not finite, which nonfinite=error does not allow"
NOTHING_LEFT = "no source has a finite value, so there is nothing to average"


@dataclass
class Expected:
    """One row of results."""

    bits: Array
    """Unsigned integers as wide as the dtype."""
    impossible: list[Why] = field(default_factory=list)
    """Why no merge can have made it; its bits mean nothing then."""
    other: Array | None = None
    """What may stand there as well: of a long sum in fp64, the neighbour on the other side of the exact mean."""

    def differing(self, found: Array) -> Array:
        """Where `found` has other bits than it may have; bool."""
        differ: Array = self.bits != found
        if self.other is not None:
            differ &= self.other != found
        return differ


def expected(cell: Cell, rows: Rows, nonfinite: Nonfinite) -> Expected:
    """What `cell` is of `rows`, those that it names in its own order; all of one length."""
    if cell.method in (AGREE, WHOLE):
        return _agreed(cell, rows)
    broken = _not_finite(rows) if nonfinite == "error" else []
    if cell.method == PAIRWISE:
        made = _tree(cell, rows)
    elif cell.method == COPY:
        made = _copy(cell, rows, nonfinite)
    else:
        assert cell.method == UNIFORM, cell.method
        made = _mean(cell, rows, nonfinite)
    return Expected(made.bits, broken) if broken else made


# --- numbers that are merged ----------------------------------------------------------------------------------------


def _mean(cell: Cell, rows: Rows, nonfinite: Nonfinite) -> Expected:
    to = FLOATS[cell.dtype]
    made = mean(rows, cell.shares, to)
    bits, impossible = made.bits, []
    kept = np.ones(len(bits), dtype=bool)
    if nonfinite == "propagate":
        bits, kept = _with_what_is_not_finite(bits, rows, to)
    else:
        impossible += _first(made.empty, NOTHING_LEFT)
    impossible += _first(made.beyond & kept, f"the mean is beyond what {cell.dtype.code} holds")
    bits = bits.astype(UNSIGNED[cell.dtype.itemsize])
    other = np.where(made.long & kept, made.other, bits) if cell.dtype is Dtype.F64 else None
    return Expected(bits, impossible, other)


def _with_what_is_not_finite(bits: Array, rows: Rows, to: Float) -> tuple[Array, Array]:
    """Sums in which NaN and infinities have a part, and where there is no such part.

    NaN stays NaN, infinities of both signs are NaN, and one infinity is itself; where `to` has none it is NaN.
    """
    nan, up, down = (np.zeros(len(bits), dtype=bool) for _ in range(3))
    for dtype, row in rows:
        of = FLOATS[dtype]
        there = finite(row, of)
        if not there.all():
            lost = is_nan(row, of)
            nan |= lost
            up |= ~there & ~lost & ~negative(row, of)
            down |= ~there & ~lost & negative(row, of)
    kept = ~(nan | up | down)
    lost = nan | (up & down) | ((up | down) & (not to.infinite))
    infinity = signed(np.full(len(bits), to.largest + 1, dtype=np.uint64), down, to)
    return np.where(kept, bits, np.where(lost, np.uint64(to.nan), infinity)), kept


def _copy(cell: Cell, rows: Rows, nonfinite: Nonfinite) -> Expected:
    """One row: the same bits, or rounded once."""
    ((dtype, row),) = rows
    of, to = FLOATS[dtype], FLOATS[cell.dtype]
    there = finite(row, of)
    bits = row if dtype is cell.dtype and not dtype.is_fp8 else converted(row, of, to)  # fp8 goes by way of fp16
    impossible = [] if nonfinite == "propagate" else _first(~there, NOTHING_LEFT)
    impossible += _first(there & ~finite(bits, to), f"the value is beyond what {cell.dtype.code} holds")
    return Expected(bits, impossible)


def _tree(cell: Cell, rows: Rows) -> Expected:
    bits, to = carried_out(cell.steps, rows, cell.dtype), FLOATS[cell.dtype]
    there = np.ones(len(bits), dtype=bool)
    for dtype, row in rows:
        if dtype.is_float:
            there &= finite(row, FLOATS[dtype])
    beyond = _first(
        there & ~finite(bits, to), f"a merge of the tree is beyond what its dtype or {cell.dtype.code} holds"
    )
    return Expected(np.where(is_nan(bits, to), to.nan, bits).astype(bits.dtype), beyond)


def _not_finite(rows: Rows) -> list[Why]:
    found: list[Why] = []
    for number, (dtype, row) in enumerate(rows):
        if dtype.is_float and not (there := finite(row, FLOATS[dtype])).all():
            found.append((int(np.argmin(there)), NOT_FINITE, number))
    return found


def _first(where: Array, why: str) -> list[Why]:
    return [(int(np.argmax(where)), why, None)] if where.any() else []


# --- numbers that are copied ----------------------------------------------------------------------------------------


def _agreed(cell: Cell, rows: Rows) -> Expected:
    """The value that all rows have; after rounding to whole numbers, if the method is that."""
    dtype, first = rows[0]
    if cell.method == AGREE and all(one is cell.dtype for one, _ in rows):
        differ = [(number, first != row) for number, (_, row) in enumerate(rows)]
        impossible: list[Why] = [
            (int(np.argmax(where)), _differs(cell), number) for number, where in differ if where.any()
        ]
        return Expected(first, impossible[:1])
    whole = cell.method == WHOLE
    bits = np.zeros(len(first), dtype=UNSIGNED[cell.dtype.itemsize])
    for at in range(len(first)):
        values = [number_of(int(row[at]), one) for one, row in rows]
        if whole:
            values = [None if value is None else (Fraction(round(value[0])), value[1]) for value in values]
        same = values[0] is not None and values.count(values[0]) == len(values)
        made = _bits_of_number(values[0], cell.dtype) if same else None
        if dtype is cell.dtype and not whole:
            made = int(first[at]) if same else None  # -0 stays what it is
        if made is None:
            other = next((number for number, value in enumerate(values) if value != values[0]), 0)
            return Expected(bits, [(at, _differs(cell), other)])
        bits[at] = made
    return Expected(bits)


def _differs(cell: Cell) -> str:
    return (
        f"has another value than the first source, or one that {cell.dtype.code} does not hold, and it is to be copied"
    )


def number_of(bits: int, dtype: Dtype) -> Number:
    """What the element with these bits is."""
    if dtype is Dtype.C64:
        real, imaginary = (number_of(bits >> shift & 0xFFFFFFFF, Dtype.F32) for shift in (0, 32))
        return None if real is None or imaginary is None else (real[0], imaginary[0])
    if dtype.is_float:
        mantissa, exponent, there = parts(np.array([bits], dtype=UNSIGNED[dtype.itemsize]), FLOATS[dtype])
        value = Fraction(int(mantissa[0])) * Fraction(2) ** int(exponent[0])
        return (value, Fraction(0)) if there[0] else None
    if dtype is Dtype.BOOL:
        return Fraction(bits != 0), Fraction(0)
    negative = dtype.torch_name.startswith("int") and bits >> (8 * dtype.itemsize - 1)
    return Fraction(bits - (1 << 8 * dtype.itemsize) if negative else bits), Fraction(0)


def _bits_of_number(value: Number, dtype: Dtype) -> int | None:
    """The bits of a value that `dtype` holds exactly; None if it does not."""
    if value is None:
        return None
    real, imaginary = value
    if dtype is Dtype.C64:
        one, other = (_bits_of_number((part, Fraction(0)), Dtype.F32) for part in value)
        return None if one is None or other is None else one | other << 32
    if imaginary:
        return None
    if dtype.is_float:
        to = FLOATS[dtype]
        magnitude = _exactly(abs(real), to)
        return None if magnitude is None else magnitude | (real < 0) << (to.bits - 1)
    if real.denominator != 1:
        return None
    bits = int(real) % (1 << 8 * dtype.itemsize)
    return bits if number_of(bits, dtype) == value else None


def _exactly(value: Fraction, to: Float) -> int | None:
    unit = value.denominator.bit_length() - 1
    if value.denominator != 1 << unit:
        return None
    made, beyond, other = rounded_one(value.numerator, -unit, 1, to)
    return None if beyond or other != made else made
