"""The slow arithmetic against fractions, and against every bit pattern of the narrow formats."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeflow.interfaces import Step
from mergeflow.tensors import Dtype
from mergeflow.verify.floats import FLOATS, UNSIGNED, finite, is_nan, parts, rounded, rounded_one
from mergeflow.verify.sums import mean
from mergeflow.verify.trees import carried_out, converted
from tests.methods import steps
from tests.methods.means import stacks
from tests.methods.reference import BITS, FP8, FP16, FP32, FP64, WIDE, FloatFormat, expected_mean, from_bits, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeflow.verify.floats import Array

FORMATS = (*WIDE, *FP8)
OF = {one.dtype: dtype for dtype in FLOATS for one in FORMATS if one.name == dtype.torch_name}
"""The dtype of every format of the tests' reference."""


def bits_of(row: Tensor) -> Array:
    """The bits of a row, unsigned."""
    return row.contiguous().view(BITS[row.element_size()]).numpy().view(UNSIGNED[row.element_size()])


def tensor_of(bits: Array, to: FloatFormat) -> Tensor:
    narrowed = bits.astype(UNSIGNED[to.dtype.itemsize])
    return from_bits(narrowed.tobytes(), to.dtype)


def given_rows(values: Sequence[Tensor]) -> list[tuple[Dtype, Array]]:
    return [(OF[value.dtype], bits_of(value)) for value in values]


# --- what bits mean -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [one for one in FORMATS if one.dtype.itemsize < 4], ids=lambda one: one.name)
def test_every_bit_pattern_of_a_narrow_format_is_read_as_it_is(form: FloatFormat) -> None:
    size = form.dtype.itemsize
    bits = np.arange(1 << 8 * size, dtype=UNSIGNED[size])
    of = FLOATS[OF[form.dtype]]
    mantissa, exponent, there = parts(bits, of)
    assert is_nan(bits, of).tolist() == tensor_of(bits, form).double().isnan().tolist()
    for at, value in enumerate(tensor_of(bits, form).double().tolist()):
        assert there[at] == math.isfinite(value)
        assert not there[at] or value == math.ldexp(mantissa[at], int(exponent[at]))


@settings(max_examples=60)
@given(st.sampled_from([FP32, FP64]), st.binary(min_size=64, max_size=64))
def test_bits_of_a_wide_format_are_read_as_they_are(form: FloatFormat, raw: bytes) -> None:
    row = from_bits(raw, form.dtype)
    mantissa, exponent, there = parts(bits_of(row), FLOATS[OF[form.dtype]])
    assert there.tolist() == row.isfinite().tolist() == finite(bits_of(row), FLOATS[OF[form.dtype]]).tolist()
    for value, m, e, is_there in zip(row.tolist(), mantissa, exponent, there, strict=True):
        assert not is_there or Fraction(value) == Fraction(int(m)) * Fraction(2) ** int(e)


# --- rounding -------------------------------------------------------------------------------------------------------


@settings(max_examples=400)
@given(
    st.sampled_from(FORMATS),
    st.integers(0, 2**62 - 1),
    st.integers(-1200, 1000),
    st.one_of(st.just(1), st.integers(1, 100), st.integers(1, 2**26 - 1)),
)
def test_a_quotient_is_rounded_once_half_to_even(form: FloatFormat, magnitude: int, unit: int, divisor: int) -> None:
    to = FLOATS[OF[form.dtype]]
    wanted = form.rounded(Fraction(magnitude, divisor) * Fraction(2) ** unit)
    bits, beyond, other = rounded_one(magnitude, unit, divisor, to)
    assert beyond == isinstance(wanted, str)
    if not beyond:
        found = tensor_of(np.array([bits], dtype=np.uint64), form)
        assert Fraction(float(found.double())) == wanted
        assert abs(other - bits) <= 1
    if magnitude.bit_length() + divisor.bit_length() > 0 and 62 - divisor.bit_length() >= form.precision + 2:
        at_once = rounded(np.array([magnitude]), unit, divisor, to)
        assert at_once.beyond[0] == beyond
        assert beyond or (at_once.bits[0], at_once.other[0]) == (bits, other)


@settings(max_examples=300)
@given(st.sampled_from(FORMATS), st.integers(0, 2**20), st.integers(-40, 30), st.integers(-1, 1))
def test_values_halfway_between_two_go_to_the_even_one(form: FloatFormat, odd: int, unit: int, nudge: int) -> None:
    magnitude = (2 * odd + 1 << 30) + nudge
    bits, beyond, _ = rounded_one(magnitude, unit, 1, FLOATS[OF[form.dtype]])
    wanted = form.rounded(Fraction(magnitude) * Fraction(2) ** unit)
    assert beyond == isinstance(wanted, str)
    assert beyond or Fraction(float(tensor_of(np.array([bits], dtype=np.uint64), form).double())) == wanted


# --- means ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(stacks((*WIDE, *FP8), most=40), st.sampled_from(FORMATS))
def test_a_mean_is_that_of_fractions_rounded_once(rows: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, shares = rows
    made = mean(given_rows(values), shares, FLOATS[OF[out.dtype]])
    columns = list(zip(*(value.double().tolist() for value in values), strict=True))
    for at, column in enumerate(columns):
        wanted = expected_mean(column, shares, out)
        overflow = isinstance(wanted, str) and wanted != "-0"
        assert made.beyond[at] == overflow
        assert overflow or number(tensor_of(made.bits[at : at + 1], out)) == wanted


@settings(max_examples=60)
@given(st.binary(min_size=128, max_size=128), st.sampled_from([FP16, *FP8]), st.lists(st.integers(1, 9), min_size=4))
def test_what_is_not_finite_is_left_out_of_a_mean(raw: bytes, form: FloatFormat, shares: list[int]) -> None:
    width = 32 // form.dtype.itemsize
    values = [from_bits(raw[begin : begin + 32], form.dtype) for begin in range(0, 128, 32)]
    made = mean(given_rows(values), shares[:4], FLOATS[Dtype.F16])
    for at in range(width):
        column = [(float(value[at]), share) for value, share in zip(values, shares, strict=False)]
        there = [(value, share) for value, share in column if math.isfinite(value)]
        assert made.empty[at] == (not there)
        if there:
            wanted = expected_mean([value for value, _ in there], [share for _, share in there], FP16)
            assert number(tensor_of(made.bits[at : at + 1], FP16)) == wanted


def test_a_mean_whose_terms_lie_far_apart_is_exact() -> None:
    rows = [torch.tensor([value], dtype=torch.float64) for value in (1e300, 1.0, -1e300, 2.5)]
    made = mean(given_rows(rows), [1, 1, 1, 1], FLOATS[Dtype.F32])
    assert tensor_of(made.bits, FP32).tolist() == [0.875]


def test_a_long_sum_in_fp64_has_two_neighbours() -> None:
    rows = [torch.tensor([value], dtype=torch.float64) for value in (1.0, 2.0**-60)]
    made = mean(given_rows(rows), [1, 1], FLOATS[Dtype.F64])
    assert made.long[0]
    assert [tensor_of(bits, FP64).item() for bits in (made.bits, made.other)] == [0.5, math.nextafter(0.5, 1)]


# --- conversions and trees ------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.sampled_from(FORMATS), st.sampled_from(WIDE), st.binary(min_size=64, max_size=64))
def test_a_conversion_keeps_signs_nan_and_infinity(of: FloatFormat, to: FloatFormat, raw: bytes) -> None:
    row = from_bits(raw, of.dtype)
    made = tensor_of(converted(bits_of(row), FLOATS[OF[of.dtype]], FLOATS[OF[to.dtype]]), to)
    for value, found in zip(row, made, strict=True):
        exact = number(value)
        if not isinstance(exact, str):
            rounded_once = to.rounded(exact)
            zero_of_minus = "-0" if exact < 0 else Fraction(0)
            exact = rounded_once if rounded_once != 0 or exact == 0 else zero_of_minus
        assert number(found) == exact


STEPS = (
    Step("scale", (0,), steps.f32(0.3), Dtype.F16, 0),
    Step("scale", (1,), 0.5, Dtype.BF16, 1),
    Step("add", (-1, -2), 1.0, Dtype.F32, 2),
    Step("subtract", (-3, 2), 1.0, Dtype.F64, 3),
    Step("round", (-4,), 1.0, Dtype.BF16, 0),
    Step("lerp", (-1, 0), steps.f32(0.3), Dtype.F16, 1),
    Step("lerp", (1, -2), steps.f32(0.7), Dtype.F32, 2),
    Step("round", (3,), 1.0, Dtype.F16, 3),
    Step("add", (-4, -3), 1.0, Dtype.F16, 0),
)


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, len(STEPS)), st.sampled_from([Dtype.F16, Dtype.BF16, Dtype.F32]))
def test_a_tree_is_what_the_tests_make_of_its_steps(seed: int, count: int, out: Dtype) -> None:
    rows = [steps.some_of(dtype, 120, seed) for dtype in (Dtype.F16, Dtype.BF16, Dtype.F32, Dtype.I64)]
    width = min(map(len, rows))
    rows = [row[:width] for row in rows]
    wanted = steps.carried_out(STEPS[:count], rows, steps.TORCH[out])
    made = carried_out(STEPS[:count], [(steps.DTYPES[row.dtype], bits_of(row)) for row in rows], out)
    assert steps.same_values(from_bits(made.tobytes(), steps.TORCH[out]), wanted)
