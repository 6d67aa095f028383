"""What the methods are judged by: fractions, and rounding to nearest-even written without any floating point.

Nothing here uses the code that it judges, or torch's arithmetic. torch only carries the bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from mergeflow.interfaces import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAN, INFINITY = "nan", "inf"


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating point format, as its standard describes it."""

    dtype: torch.dtype
    precision: int
    """Significant bits of a normal value, the hidden one included."""
    smallest_exponent: int
    """That of the smallest normal value."""
    largest: Fraction
    beyond: str = INFINITY
    """What a value that rounds to more than `largest` becomes."""
    minus_zero: bool = True

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def quantum(self, value: Fraction) -> Fraction:
        """The distance between neighbours where `value` lies."""
        return Fraction(2) ** (max(_exponent(value), self.smallest_exponent) - self.precision + 1)

    def rounded(self, value: Fraction) -> Fraction | str:
        """`value` rounded to nearest, ties to even; or what this format says instead."""
        if value == 0:
            return value
        quantum = self.quantum(value)
        below, rest = divmod(abs(value), quantum)
        if rest > quantum / 2 or (rest == quantum / 2 and below % 2):
            below += 1
        rounded = below * quantum
        if rounded > self.largest:
            return self.beyond if self.beyond == NAN else f"{'-' if value < 0 else ''}{self.beyond}"
        return rounded if value > 0 else -rounded


FP16 = FloatFormat(torch.float16, 11, -14, Fraction(65504))
BF16 = FloatFormat(torch.bfloat16, 8, -126, (2 - Fraction(2) ** -7) * 2**127)
FP32 = FloatFormat(torch.float32, 24, -126, (2 - Fraction(2) ** -23) * 2**127)
FP64 = FloatFormat(torch.float64, 53, -1022, (2 - Fraction(2) ** -52) * 2**1023)
E4M3 = FloatFormat(torch.float8_e4m3fn, 4, -6, Fraction(448), beyond=NAN)
E5M2 = FloatFormat(torch.float8_e5m2, 3, -14, Fraction(57344))
E4M3FNUZ = FloatFormat(torch.float8_e4m3fnuz, 4, -7, Fraction(240), beyond=NAN, minus_zero=False)
E5M2FNUZ = FloatFormat(torch.float8_e5m2fnuz, 3, -15, Fraction(57344), beyond=NAN, minus_zero=False)

WIDE = (FP16, BF16, FP32, FP64)
FP8 = (E4M3, E5M2, E4M3FNUZ, E5M2FNUZ)


def _exponent(value: Fraction) -> int:
    """The e for which 2^e <= |value| < 2^(e+1)."""
    magnitude = abs(value)
    guess = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return guess if magnitude >= Fraction(2) ** guess else guess - 1


def from_bits(raw: bytes, dtype: torch.dtype) -> Tensor:
    """The values that these bytes are."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)


def rows_of(values: Sequence[Tensor]) -> Rows:
    """Rows as a worker would hand them over: fp8 widened, each with its largest magnitude."""
    widened = [value.half() if value.element_size() == 1 and value.is_floating_point() else value for value in values]
    return Rows.of(widened, [_peak(value) for value in widened])


def _peak(value: Tensor) -> float:
    magnitudes = [abs(number) for number in value.tolist()] if value.is_floating_point() else [math.nan]
    return math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)


def mean_of(column: Sequence[float], shares: Sequence[int]) -> Fraction:
    """The mean of finite numbers, exactly."""
    return sum((Fraction(value) * share for value, share in zip(column, shares, strict=True)), Fraction(0)) / sum(
        shares
    )


def expected_mean(column: Sequence[float], shares: Sequence[int], out: FloatFormat) -> Fraction | str:
    """The mean of finite numbers as `out` has it; what is too small keeps its sign where the format has -0."""
    mean = mean_of(column, shares)
    rounded = out.rounded(mean)
    return "-0" if rounded == 0 and mean < 0 and out.minus_zero else rounded


def number(value: Tensor) -> Fraction | str:
    """What one element of any float dtype is."""
    found = float(value.double())
    if math.isnan(found):
        return NAN
    if math.isinf(found):
        return f"{'-' if found < 0 else ''}{INFINITY}"
    return "-0" if found == 0 and math.copysign(1, found) < 0 else Fraction(found)


def numbers(values: Tensor) -> list[Fraction | str]:
    """What a row of any float dtype is."""
    return [number(value) for value in values]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two rows of one dtype are equal to the bit, signs of zero and payloads of NaN included."""
    integers = BITS[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))
