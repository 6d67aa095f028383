from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.interfaces import Rows
from mergeflow.methods.uniform import Uniform
from tests.conformance.method import MethodConformance
from tests.methods.reference import (
    BF16,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FP8,
    FP16,
    FP32,
    INFINITY,
    FloatFormat,
    expected_mean,
    number,
    numbers,
    same_bits,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from torch import Tensor

from tests.methods.means import OUTS, expected, mean, skipped, stacks

# --- limits -------------------------------------------------------------------------------------------------------


def test_forty_two_times_2000_is_2000_in_fp16() -> None:
    assert numbers(mean([torch.full((3,), 2000.0, dtype=torch.float16)] * 42, torch.float16)) == [2000] * 3


@pytest.mark.parametrize(
    ("out", "value", "becomes"),
    [
        pytest.param(FP16, 65520.0, "inf", id="fp16"),
        pytest.param(FP16, -1e6, "-inf", id="fp16-negative"),
        pytest.param(BF16, 3.4e38, "inf", id="bf16"),
        pytest.param(FP32, 3.5e38, "inf", id="fp32"),
        pytest.param(E4M3, 465.0, "nan", id="e4m3"),
        pytest.param(E4M3, -1e9, "nan", id="e4m3-far-below"),
        pytest.param(E5M2, 61440.0, "inf", id="e5m2"),
        pytest.param(E4M3FNUZ, 248.0, "nan", id="e4m3fnuz"),
        pytest.param(E5M2FNUZ, 61440.0, "nan", id="e5m2fnuz"),
    ],
)
def test_what_the_output_cannot_hold_is_not_finite(out: FloatFormat, value: float, becomes: str) -> None:
    values = [torch.tensor([value, 1.0], dtype=torch.float64)] * 2
    assert numbers(mean(values, out.dtype)) == [becomes, 1]


@given(stacks([FP16, FP32], most=8), st.integers(2**22, 2**23 - 1), OUTS)
def test_large_shares_are_exact_too(stack: tuple[list[Tensor], list[int]], large: int, out: FloatFormat) -> None:
    values, _ = stack
    shares = [large - index for index in range(len(values))]
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


# --- NaN and infinity -----------------------------------------------------------------------------------------------

ANY_FLOAT = st.sampled_from([0.0, -0.0, 1.0, -2.5, 65504.0, 2.0**-24, math.inf, -math.inf, math.nan])


def ieee_mean(column: Sequence[float], shares: Sequence[int], out: FloatFormat) -> Fraction | str:
    """The mean as IEEE 754 has it."""
    if any(map(math.isnan, column)) or {math.inf, -math.inf} <= set(column):
        return "nan"
    infinite = [value for value in column if math.isinf(value)]
    if infinite:
        return out.beyond if out.beyond != INFINITY else number(torch.tensor(infinite[0]))
    return expected_mean(column, shares, out)


@given(st.lists(ANY_FLOAT, min_size=1, max_size=12), st.lists(st.integers(1, 9), min_size=12, max_size=12), st.data())
def test_merge_lets_nan_and_infinity_travel_as_ieee_has_it(
    column: list[float], shares: list[int], data: st.DataObject
) -> None:
    out = data.draw(st.sampled_from([FP16, BF16, FP32, *FP8]))
    shares = shares[: len(column)]
    values = [torch.tensor([value, 1.0], dtype=torch.float16) for value in column]
    assert numbers(mean(values, out.dtype, shares)) == [ieee_mean(column, shares, out), 1]


@given(st.lists(ANY_FLOAT, min_size=1, max_size=12), st.lists(st.integers(1, 9), min_size=12, max_size=12), st.data())
def test_skip_is_the_mean_of_what_is_finite_with_shares_renewed(
    column: list[float], shares: list[int], data: st.DataObject
) -> None:
    out = data.draw(st.sampled_from([FP16, BF16, FP32, *FP8]))
    shares = shares[: len(column)]
    values = [torch.tensor([value, 1.0], dtype=torch.float16) for value in column]
    left = [(value, share) for value, share in zip(column, shares, strict=True) if math.isfinite(value)]
    told = expected_mean([value for value, _ in left], [share for _, share in left], out) if left else "nan"
    assert numbers(skipped(values, out.dtype, shares)) == [told, 1]


@pytest.mark.parametrize("rows", [3, 500])
def test_nan_in_one_place_changes_no_other(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    values = [torch.randn(700, generator=generator) for _ in range(rows)]
    clean = mean(values, torch.float32)
    values[1][::7] = torch.nan
    values[2][3] = torch.inf
    touched = torch.zeros(700, dtype=torch.bool)
    touched[::7] = touched[3] = True
    for made in (mean(values, torch.float32), skipped(values, torch.float32)):
        assert same_bits(made[~touched], clean[~touched])
    assert mean(values, torch.float32)[touched].isfinite().sum() == 0
    assert skipped(values, torch.float32).isfinite().all()


# --- conformance ----------------------------------------------------------------------------------------------------


class TestConformance(MethodConformance):
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)

    def make(self) -> Uniform:
        return Uniform()

    def values(self, length: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(length, generator=generator) * 0.1).to(dtype) for dtype in self.dtypes * 3]


class TestConformanceOfTheFp16Path(TestConformance):
    dtypes = (torch.float16,) * 3


class TestConformanceOfTheSlowPath(TestConformance):
    """Rows whose magnitudes are too far apart for one word."""

    dtypes = (torch.float32, torch.float64)

    def values(self, length: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.randn(length, generator=generator) * 1e10 ** (index - 3)).to(dtype)
            for index, dtype in enumerate(self.dtypes * 3)
        ]

    out_dtype = torch.bfloat16


def test_peaks_decide_only_how_not_what() -> None:
    values = [torch.tensor([0.5, -0.25]), torch.tensor([0.125, 3.0])]
    told = torch.empty(2)
    Uniform().merge(Rows.of(values, [1e30, 1e30]), [1, 2], told)
    assert same_bits(told, mean(values, torch.float32, [1, 2]))
