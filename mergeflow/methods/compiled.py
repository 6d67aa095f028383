"""Sums and means in machine code: one call for a whole tile, without the interpreter's lock, and with its own proof.

The same sums as in `exact` and the same rounding as in `rounding`, written for one look at each value: it is loaded,
widened to fp64 and added, and the interpreter is not asked again before the tile is done. What makes it exact:

    sums      fp16 alone needs no proof: multiples of 2^-24 whose magnitudes add up to less than 2^29 fit into 53 bits.
              Everything else is added with TwoSum (Knuth, TAOCP 4.2.2), which tells what an addition rounds away. If
              that was nothing for a whole chunk, the sums are exact; otherwise the chunk is added again with a second
              word that takes what the first one loses. If the second loses something, too, there is no result.
    quotients the sum S is one fp64. Where it took two words, it is rounded to odd: to the neighbour whose last bit is
              set. A point at which rounding the quotient to p bits turns is t with p + 1 bits, and t times a divisor
              below 2^26 is an fp64 whose last bit is clear (p <= 24), so that S stays on its side of it. Why an fp64
              that is divided and rounded to 53 bits, and then to p, is rounded as the exact quotient: see `exact`.
    rounding  to a multiple of the last bit, by adding and taking away a power of two so large that the addition
              rounds there, half to even; what is left is a value of the result's dtype. The sign is kept apart: so a
              small negative quotient becomes -0, and the sum zero, which is +0, becomes +0.

A value that is not finite makes the sum so, and there is no result either: what is to be done then, others know.
"""

# What numba compiles has no types that mypy could follow: an intrinsic is called without its first argument.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

FP16, BF16, FP32, FP64, FP8 = range(5)
"""What rows and results may be. From `FP8` on, rows are looked up in tables of the 256 values of their dtypes."""
EXACT_FP16_SHARES = 1 << 13
"""Rows of fp16 whose shares add up to no more need no proof."""
BASE, INTO, FIRST_TERM, LAST_TERM, FIRST_RESULT, LAST_RESULT = range(6)
"""The columns of a step: registers, and its part of the terms and results."""

_SIGN_CLEARED = 0x7FFF_FFFF_FFFF_FFFF
_EXPONENT = 0x7FF0_0000_0000_0000
_FRACTION_BITS = 52
_HALF_SCALE, _HALF_SHIFT = 2.0**-112, 13
"""An fp16 is the upper part of the fp32 that is 2^-112 times it; all its values are exact there."""


def available() -> bool:
    """Whether this processor widens fp16 by itself; all do, but for those of before 2013."""
    features: Any = llvmlite.binding.get_host_cpu_features()
    name = llvmlite.binding.get_process_triple()
    return bool(features.get("f16c", False)) if name.startswith(("x86_64", "i686")) else name.startswith("aarch64")


def _pointer(builder, address, index, kind):
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def _load_fp16(typing, address, index):
    def code(context, builder, signature, arguments):
        half = builder.load(_pointer(builder, *arguments, ir.HalfType()), align=2)
        return builder.fpext(builder.fpext(half, ir.FloatType()), ir.DoubleType())

    return types.float64(types.int64, types.int64), code


@intrinsic
def _load_bf16(typing, address, index):
    def code(context, builder, signature, arguments):
        bits = builder.load(_pointer(builder, *arguments, ir.IntType(16)), align=2)
        wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.fpext(builder.bitcast(wide, ir.FloatType()), ir.DoubleType())

    return types.float64(types.int64, types.int64), code


@intrinsic
def _load_fp32(typing, address, index):
    def code(context, builder, signature, arguments):
        value = builder.load(_pointer(builder, *arguments, ir.FloatType()), align=4)
        return builder.fpext(value, ir.DoubleType())

    return types.float64(types.int64, types.int64), code


@intrinsic
def _load_fp64(typing, address, index):
    def code(context, builder, signature, arguments):
        return builder.load(_pointer(builder, *arguments, ir.DoubleType()), align=8)

    return types.float64(types.int64, types.int64), code


@intrinsic
def _load_byte(typing, address, index):
    def code(context, builder, signature, arguments):
        return builder.zext(builder.load(_pointer(builder, *arguments, ir.IntType(8))), ir.IntType(64))

    return types.int64(types.int64, types.int64), code


def _storing(width, kind):
    def store(typing, address, index, value):
        def code(context, builder, signature, arguments):
            pointer = _pointer(builder, *arguments[:2], kind)
            value = arguments[2]
            builder.store(builder.trunc(value, kind) if isinstance(kind, ir.IntType) else value, pointer, align=width)
            return context.get_dummy_value()

        taken = {2: types.int64, 4: types.float32, 8: types.float64}[width]
        return types.void(types.int64, types.int64, taken), code

    return intrinsic(store)


_store_16 = _storing(2, ir.IntType(16))
_store_fp32 = _storing(4, ir.FloatType())
_store_fp64 = _storing(8, ir.DoubleType())


@intrinsic
def _bits(typing, value):
    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), code


@intrinsic
def _from_bits(typing, value):
    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), code


@intrinsic
def _bits_of_fp32(typing, value):
    def code(context, builder, signature, arguments):
        return builder.zext(builder.bitcast(arguments[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), code


def _compiled(function):
    """The function in machine code, which is kept beside this file or in the user's cache for the next process."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is nowhere to keep it
        return njit(nogil=True, error_model="numpy")(function)


@_compiled
def _widen(row, address, kind, share, tables):
    """A row times its share in fp64, whatever it is."""
    count = len(row)
    if kind == FP16:
        for j in range(count):
            row[j] = _load_fp16(address, j) * share
    elif kind == BF16:
        for j in range(count):
            row[j] = _load_bf16(address, j) * share
    elif kind == FP32:
        for j in range(count):
            row[j] = _load_fp32(address, j) * share
    elif kind == FP64:
        for j in range(count):
            row[j] = _load_fp64(address, j) * share
    else:
        table = tables[kind - FP8]
        for j in range(count):
            row[j] = table[_load_byte(address, j)] * share


@_compiled
def _add_fp16(total, address, share):
    for j in range(len(total)):
        total[j] += _load_fp16(address, j) * share


@_compiled
def _add_four_fp16(total, a0, a1, a2, a3, s0, s1, s2, s3):
    """Four rows of fp16 at once: the sums go through memory a quarter as often."""
    for j in range(len(total)):
        first = _load_fp16(a0, j) * s0 + _load_fp16(a1, j) * s1
        total[j] += first + (_load_fp16(a2, j) * s2 + _load_fp16(a3, j) * s3)


@_compiled
def _add_surely(total, first, last, start, terms, shares, rows):
    """Add rows of fp16 of which it is known that no addition rounds."""
    at = 2 * start
    while first + 4 <= last:
        _add_four_fp16(
            total,
            rows[0, terms[first]] + at,
            rows[0, terms[first + 1]] + at,
            rows[0, terms[first + 2]] + at,
            rows[0, terms[first + 3]] + at,
            shares[first],
            shares[first + 1],
            shares[first + 2],
            shares[first + 3],
        )
        first += 4
    while first < last:
        _add_fp16(total, rows[0, terms[first]] + at, shares[first])
        first += 1


@_compiled
def _two_sum(total, row):
    """Add a row; whether any addition rounded, or met a value that is not finite."""
    lost = 0
    for j in range(len(total)):
        before, term = total[j], row[j]
        after = before + term
        seen = after - before
        lost |= _bits((before - (after - seen)) + (term - seen))
        total[j] = after
    return lost != 0


@_compiled
def _two_sums(total, low, row):
    """Add a row to sums of two words; whether the second has rounded, or met a value that is not finite."""
    lost = 0
    for j in range(len(total)):
        before, term = total[j], row[j]
        after = before + term
        seen = after - before
        rest = (before - (after - seen)) + (term - seen)
        total[j] = after
        before = low[j]
        after = before + rest
        seen = after - before
        lost |= _bits((before - (after - seen)) + (rest - seen))
        low[j] = after
    return lost != 0


@_compiled
def _joined(total, low, row):
    """Sums of two words, as one word each, rounded to odd."""
    for j in range(len(total)):
        high, rest = total[j], low[j]
        after = high + rest
        seen = after - high
        rest = (high - (after - seen)) + (rest - seen)
        bits = _bits(after)
        outward = 1 if (rest > 0.0) == (bits >= 0) else -1
        row[j] = _from_bits(bits + (outward if rest != 0.0 and bits & 1 == 0 else 0))


@_compiled
def _rounded(value, bits, least):
    """The magnitude of an fp64, rounded to so many bits; `least` is the exponent of the smallest normal value."""
    magnitude = _bits(value) & _SIGN_CLEARED
    exponent = max(magnitude & _EXPONENT, (least + 1023) << _FRACTION_BITS)
    lever = _from_bits(exponent + ((_FRACTION_BITS + 1 - bits) << _FRACTION_BITS))
    return (_from_bits(magnitude) + lever) - lever


@_compiled
def _sign(value):
    return _bits(value) >> 63 & 1


@_compiled
def _finish(total, divisor, address, kind):
    """Write the quotients of a chunk as a row of results; whether one of them is more than its dtype holds."""
    count, fine = len(total), True
    if kind == FP16:
        for j in range(count):
            value = total[j] / divisor
            rounded = _rounded(value, 11, -14)
            fine &= rounded <= 65504.0
            _store_16(
                address,
                j,
                (_bits_of_fp32(np.float32(rounded * _HALF_SCALE)) >> _HALF_SHIFT) | (_sign(value) << 15),
            )
    elif kind == BF16:
        for j in range(count):
            value = total[j] / divisor
            rounded = _rounded(value, 8, -126)
            fine &= rounded <= 3.3895313892515355e38
            _store_16(address, j, (_bits_of_fp32(np.float32(rounded)) >> 16) | (_sign(value) << 15))
    elif kind == FP32:
        for j in range(count):
            value = np.float32(total[j] / divisor)
            fine &= abs(value) <= np.float32(3.4028234663852886e38)
            _store_fp32(address, j, value)
    else:
        for j in range(count):
            value = total[j] / divisor
            fine &= abs(value) <= 1.7976931348623157e308
            _store_fp64(address, j, value)
    return not fine


@_compiled
def _begin(word, base, total):
    """Make `total` the sum that a step begins with."""
    if base < 0:
        for j in range(len(total)):
            total[j] = 0.0
    else:
        before = word[base]
        for j in range(len(total)):
            total[j] = before[j]


@_compiled
def _add_watching(total, low, double, first, last, start, terms, shares, rows, row, tables):
    """Add rows to sums of one or two words; whether anything was lost."""
    for number in range(first, last):
        index = terms[number]
        _widen(row, rows[0, index] + start * rows[2, index], rows[1, index], shares[number], tables)
        if _two_sums(total, low, row) if double else _two_sum(total, row):
            return True
    return False


@_compiled
def _chunk(certain, double, start, count, steps, terms, shares, rows, results, divisors, registers, room, tables):
    """Make the results of one chunk, by sums of one or two words; whether one of them is in doubt."""
    row = room[:count]
    for number in range(len(steps)):
        base, into = steps[number, BASE], steps[number, INTO]
        first, last = steps[number, FIRST_TERM], steps[number, LAST_TERM]
        total, low = registers[0, into, :count], registers[1, into, :count]
        if base != into:
            _begin(registers[0], base, total)
            if double:
                _begin(registers[1], base, low)
        if certain:
            _add_surely(total, first, last, start, terms, shares, rows)
        elif _add_watching(total, low, double, first, last, start, terms, shares, rows, row, tables):
            return True
        source = total
        if double:
            _joined(total, low, row)
            source = row
        for cell in range(steps[number, FIRST_RESULT], steps[number, LAST_RESULT]):
            if double and results[1, cell] == FP64:
                return True  # rounding to odd leaves no bit to round by
            if _finish(source, divisors[cell], results[0, cell] + start * results[2, cell], results[1, cell]):
                return True
    return False


@_compiled
def means(elements, certain, steps, terms, shares, rows, results, divisors, registers, row, tables):
    """Make every result of a tile; the first element of a chunk of which it is not certain, or -1.

    Args:
        elements: How many there are in a row.
        certain: Whether no sum needs a proof: all rows are fp16, see `EXACT_FP16_SHARES`.
        steps: int64 `(steps, 6)`: the sums, in order; see `BASE` and the others.
        terms: int64: which rows the steps add, one after the other.
        shares: fp64: how often each of `terms`.
        rows: int64 `(3, rows)`: address, dtype and bytes of an element of each row.
        results: int64 `(3, results)`: the same of each result.
        divisors: fp64: what each of `results` is divided by.
        registers: fp64 `(2, registers, chunk)`: room for the sums.
        row: fp64 `(chunk,)`: room for one row.
        tables: fp64 `(dtypes, 256)`: the values of all bytes in each dtype of fp8.
    """
    chunk = len(row)
    for start in range(0, elements, chunk):
        count = min(chunk, elements - start)
        for words in range(1, 3):
            failed = _chunk(
                certain, words == 2, start, count, steps, terms, shares, rows, results, divisors, registers, row, tables
            )
            if certain or not failed:
                break
        if failed:
            return start
    return -1
