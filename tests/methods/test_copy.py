from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.interfaces import RowsDiffer
from mergeflow.methods.copy import Agree, Copy
from tests.conformance.method import MethodConformance
from tests.methods.reference import BF16, FP8, FP16, FP32, FP64, WIDE, FloatFormat, numbers, rows_of, same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


def copied(row: Tensor, out: torch.dtype) -> Tensor:
    made = torch.empty(len(row), dtype=out)
    Copy().merge(rows_of([row]), [1], made)
    return made


def agreed(values: Sequence[Tensor], out: torch.dtype) -> Tensor:
    made = torch.empty(len(values[0]), dtype=out)
    Agree().merge(rows_of(values), [1] * len(values), made)
    return made


# --- copy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [FP16, BF16], ids=lambda form: form.name)
def test_copy_keeps_every_bit_pattern_minus_zero_and_payloads_of_nan_included(form: FloatFormat) -> None:
    every = torch.arange(-(2**15), 2**15).short().view(form.dtype)
    assert same_bits(copied(every, form.dtype), every)


@pytest.mark.parametrize("form", [FP32, FP64], ids=lambda form: form.name)
def test_copy_keeps_the_bits_of_wide_formats(form: FloatFormat) -> None:
    integers = {4: torch.int32, 8: torch.int64}[form.dtype.itemsize]
    lowest, highest = torch.iinfo(integers).min, torch.iinfo(integers).max
    special = torch.tensor([0, lowest, highest, -1, 1, lowest + 1, highest // 3], dtype=integers).view(form.dtype)
    assert special.isnan().any()
    assert same_bits(copied(special, form.dtype), special)


@pytest.mark.parametrize("form", FP8, ids=lambda form: form.name)
def test_copy_keeps_every_fp8_value(form: FloatFormat) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(form.dtype)
    assert numbers(copied(every, form.dtype)) == numbers(every)
    numeric = ~every.float().isnan()
    assert same_bits(copied(every, form.dtype)[numeric], every[numeric])


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(WIDE), st.sampled_from(WIDE))
def test_copy_rounds_once(value: float, source: FloatFormat, out: FloatFormat) -> None:
    row = torch.tensor([value], dtype=torch.float64).to(source.dtype)
    if not row.isfinite().all():
        return
    rounded = out.rounded(Fraction(row.double().item()))
    negative_zero = rounded == 0 and math.copysign(1, row.double().item()) < 0
    assert numbers(copied(row, out.dtype)) == ["-0" if negative_zero else rounded]


@pytest.mark.parametrize("value", [1 + 2**-11 + 2**-40, 1 + 3 * 2**-11 - 2**-40])
def test_copy_of_fp64_does_not_round_by_way_of_fp32(value: float) -> None:
    assert numbers(copied(torch.tensor([value], dtype=torch.float64), torch.float16)) == [1 + Fraction(1, 1024)]


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_copy_skips_what_is_not_finite_by_leaving_nan(source: torch.dtype) -> None:
    row = torch.tensor([1.0, math.inf, math.nan, -math.inf, -0.0], dtype=source)
    made = torch.empty(5, dtype=torch.float16)
    Copy().skip(rows_of([row]), [1], made)
    assert numbers(made) == [1, "nan", "nan", "nan", "-0"]


def test_copy_skips_within_fp8() -> None:
    row = torch.tensor([1.0, math.inf, -2.0]).to(torch.float8_e5m2)
    made = torch.empty(3, dtype=torch.float8_e5m2)
    Copy().skip(rows_of([row]), [1], made)
    assert numbers(made) == [1, "nan", -2]


# --- agree ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.complex64, torch.float16, torch.float64])
def test_agree_copies_what_is_equal_in_any_dtype(dtype: torch.dtype) -> None:
    row = torch.tensor([0, 1, 1, 0, 1], dtype=torch.uint8).to(dtype)
    assert same_bits(agreed([row, row.clone(), row.clone()], dtype), row)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_agree_counts_by_value_whatever_the_dtype(dtype: torch.dtype) -> None:
    ids = torch.arange(77)
    for values in ([ids, ids.to(dtype)], [ids.to(dtype), ids], [ids.to(dtype)]):
        assert same_bits(agreed(values, torch.int64), ids)


@pytest.mark.parametrize(
    ("values", "row", "element", "value", "other"),
    [
        pytest.param([[1, 2, 3], [1, 5, 3]], 1, 1, 5, 2, id="one-differs"),
        pytest.param([[1, 2], [1, 2], [7, 8]], 2, 0, 7, 1, id="the-last-differs-from-the-start"),
        pytest.param([[2**53], [2**53 + 1]], 1, 0, 2**53 + 1, 2**53, id="beyond-fp64"),
    ],
)
def test_agree_names_the_first_place_where_rows_differ(
    values: list[list[int]], row: int, element: int, value: int, other: int
) -> None:
    with pytest.raises(RowsDiffer) as caught:
        agreed([torch.tensor(numbers) for numbers in values], torch.int64)
    assert (caught.value.row, caught.value.element) == (row, element)
    assert (caught.value.value, caught.value.expected) == (value, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(torch.tensor([2**53 + 1]), torch.tensor([2.0**53], dtype=torch.float64), id="int64-and-fp64"),
        pytest.param(torch.tensor([-1]), torch.tensor([2**64 - 1], dtype=torch.uint64), id="int64-and-uint64"),
        pytest.param(torch.tensor([2**62 + 1]), torch.tensor([2**62], dtype=torch.uint64), id="wide-and-wide"),
        pytest.param(torch.tensor([1 + 2j]), torch.tensor([1.0]), id="complex-and-real"),
        pytest.param(torch.tensor([0]), torch.tensor([math.nan]), id="integer-and-nan"),
        pytest.param(torch.tensor([0.0]), torch.tensor([-0.0]), id="the-bits-of-zeros-in-one-dtype"),
    ],
)
def test_agree_sees_what_a_comparison_in_fp64_would_not(one: Tensor, other: Tensor) -> None:
    with pytest.raises(RowsDiffer):
        agreed([one, other], one.dtype)
    assert same_bits(agreed([one, one], one.dtype), one)


@pytest.mark.parametrize("value", [2.998046875, math.nan, math.inf, 1e30])
def test_a_value_that_is_no_integer_cannot_be_made_one(value: float) -> None:
    broken = torch.tensor([0.0, 1.0, value], dtype=torch.float64)
    with pytest.raises(RowsDiffer) as caught:
        agreed([broken, torch.arange(3)], torch.int64)
    assert (caught.value.row, caught.value.element) == (0, 2)
    assert caught.value.value == value or math.isnan(value)


# --- conformance ----------------------------------------------------------------------------------------------------


class TestConformanceOfCopy(MethodConformance):
    source = torch.float16

    def make(self) -> Copy:
        return Copy()

    def values(self, length: int, seed: int) -> list[Tensor]:
        return [torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(self.source)]


class TestConformanceOfCopyThatRounds(TestConformanceOfCopy):
    source = torch.float64
    out_dtype = torch.bfloat16


class TestConformanceOfAgree(MethodConformance):
    out_dtype = torch.int64

    def make(self) -> Agree:
        return Agree()

    def values(self, length: int, seed: int) -> list[Tensor]:
        row = torch.randint(0, 2000, (length,), generator=torch.Generator().manual_seed(seed))
        return [row, row.half(), row.int(), row.clone()]
