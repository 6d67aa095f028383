"""The reference must be right before anything is judged by it: it agrees with numpy, and with torch on its limits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.reference import (
    BF16,
    BITS,
    E4M3,
    E5M2FNUZ,
    FP8,
    FP16,
    FP32,
    FP64,
    WIDE,
    FloatFormat,
    number,
    numbers,
)


@pytest.mark.parametrize("form", [*WIDE, *FP8], ids=lambda form: form.name)
def test_largest_and_smallest_are_those_of_torch(form: FloatFormat) -> None:
    info = torch.finfo(form.dtype)
    assert form.largest == Fraction(info.max)
    assert Fraction(2) ** form.smallest_exponent == Fraction(info.smallest_normal)
    after_one = torch.ones(1).to(form.dtype).view(BITS[form.dtype.itemsize]).add_(1).view(form.dtype)
    assert number(after_one) == 1 + form.quantum(Fraction(1))


@pytest.mark.parametrize("form", [FP16, BF16, *FP8], ids=lambda form: form.name)
def test_every_value_of_a_small_format_is_its_own_rounding(form: FloatFormat) -> None:
    bits = {1: torch.uint8, 2: torch.int16}[form.dtype.itemsize]
    every = torch.arange(256, dtype=torch.uint8) if form.dtype.itemsize == 1 else torch.arange(-(2**15), 2**15)
    for value in numbers(every.to(bits).view(form.dtype)):
        if isinstance(value, Fraction):
            assert form.rounded(value) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_fp64_rounds_to_fp32_and_fp16_as_numpy_does(value: float) -> None:
    with np.errstate(over="ignore"):
        fp32, fp16 = float(np.float64(value).astype(np.float32)), float(np.float64(value).astype(np.float16))
    assert FP64.rounded(Fraction(value)) == Fraction(value)
    for form, told in ((FP32, fp32), (FP16, fp16)):
        rounded = form.rounded(Fraction(value))
        assert (float(rounded) if rounded != "-inf" else -np.inf) == told


@pytest.mark.parametrize(
    ("form", "value", "rounded"),
    [
        pytest.param(FP16, Fraction(65519), Fraction(65504), id="fp16-below-the-last-tie"),
        pytest.param(FP16, Fraction(65520), "inf", id="fp16-at-the-last-tie"),
        pytest.param(FP16, -Fraction(65520), "-inf", id="fp16-negative"),
        pytest.param(FP16, Fraction(2049), Fraction(2048), id="fp16-tie-down-to-even"),
        pytest.param(FP16, Fraction(2051), Fraction(2052), id="fp16-tie-up-to-even"),
        pytest.param(FP16, Fraction(1, 2**25), Fraction(0), id="fp16-half-the-smallest"),
        pytest.param(FP16, Fraction(3, 2**25), Fraction(1, 2**23), id="fp16-one-and-a-half-of-the-smallest"),
        pytest.param(E4M3, Fraction(464), Fraction(448), id="e4m3-at-the-last-tie"),
        pytest.param(E4M3, Fraction(465), "nan", id="e4m3-has-no-infinity"),
        pytest.param(E5M2FNUZ, Fraction(61440), "nan", id="fnuz-has-no-infinity"),
    ],
)
def test_rounding_at_the_edges(form: FloatFormat, value: Fraction, rounded: Fraction | str) -> None:
    assert form.rounded(value) == rounded


def test_numbers_tell_zeros_and_what_is_not_finite_apart() -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.5])
    assert numbers(special) == [0, "-0", "inf", "-inf", "nan", Fraction(3, 2)]
    assert number(special[5].half()) == Fraction(3, 2)
