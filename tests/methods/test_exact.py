"""The mean is exact, on every path to it: judged by fractions, and by numpy where that is exact itself."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeflow.methods import exact
from tests.methods.reference import (
    BF16,
    E4M3,
    E5M2,
    FP8,
    FP16,
    FP32,
    FP64,
    FloatFormat,
    number,
    numbers,
    same_bits,
)

if TYPE_CHECKING:
    from torch import Tensor

from tests.methods.means import OUTS, expected, mean, mean_as_they_lie, skipped, stacks

ONE_BIT = 2.0**-52
"""The relative distance of fp64 neighbours."""

# --- exactness ----------------------------------------------------------------------------------------------------


@given(stacks([FP16]), OUTS)
def test_the_mean_of_any_fp16_values_is_exact(stack: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, shares = stack
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


EDGES = [65504.0, 65472.0, 32768.0, 1.0, 1 / 3, 2.0**-14, 2.0**-14 - 2.0**-24, 3 * 2.0**-24, 2.0**-24, 0.0]
"""The largest of fp16, one, and what lies on both sides of its smallest normal value."""


@given(
    st.lists(st.sampled_from([*EDGES, *(-edge for edge in EDGES)]), min_size=1, max_size=300),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    OUTS,
)
def test_the_mean_of_fp16_values_at_the_edges_is_exact(column: list[float], cycle: list[int], out: FloatFormat) -> None:
    shares = [cycle[index % len(cycle)] for index in range(len(column))]
    values = [torch.tensor([value], dtype=torch.float16) for value in column]
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


@given(stacks([BF16], most=60), OUTS)
def test_the_mean_of_any_bf16_values_is_exact(stack: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, shares = stack
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


@given(stacks([FP32], most=60), OUTS)
def test_the_mean_of_any_fp32_values_is_exact(stack: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, shares = stack
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


@given(stacks(FP8, most=60), st.sampled_from([FP16, BF16, FP32, *FP8]))
def test_the_mean_of_any_fp8_values_is_exact(stack: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, shares = stack
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


@given(stacks([FP16, BF16, FP32, *FP8], most=60), st.sampled_from([FP16, BF16, FP32, *FP8]))
def test_the_mean_of_mixed_dtypes_is_exact(stack: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, shares = stack
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


NARROW_FP64 = st.builds(
    lambda sign, exponent, mantissa: sign * math.ldexp(2**52 + mantissa, exponent - 52),
    st.sampled_from([1, -1]),
    st.integers(-150, 20),
    st.integers(0, 2**52 - 1),
)
"""fp64 of all 53 bits, with magnitudes between fp32's subnormals and a million."""


@given(
    st.lists(NARROW_FP64, min_size=1, max_size=40),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.sampled_from([FP16, BF16, FP32, *FP8]),
)
def test_the_mean_of_fp64_values_is_exact(column: list[float], cycle: list[int], out: FloatFormat) -> None:
    shares = [cycle[index % len(cycle)] for index in range(len(column))]
    values = [torch.tensor([value], dtype=torch.float64) for value in column]
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


@given(st.lists(NARROW_FP64, min_size=1, max_size=40))
def test_an_fp64_mean_is_within_one_rounding(column: list[float]) -> None:
    values = [torch.tensor([value], dtype=torch.float64) for value in column]
    made = number(mean(values, torch.float64))
    exact_mean = sum(map(Fraction, column), Fraction(0)) / len(column)
    assert not isinstance(made, str) or exact_mean == 0
    if isinstance(made, Fraction):
        # A hair more than half a last bit: a sum in several words is divided in two steps.
        assert abs(made - exact_mean) <= FP64.quantum(exact_mean) * (Fraction(1, 2) + Fraction(1, 2**40))


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=100), st.integers(-100, 100))
def test_an_fp64_mean_whose_sum_fits_is_the_nearest(numerators: list[int], exponent: int) -> None:
    values = [torch.tensor([math.ldexp(n, exponent)], dtype=torch.float64) for n in numerators]
    assert numbers(mean(values, torch.float64)) == expected(values, FP64)


def test_a_mean_of_fp64_is_found_although_the_sum_is_beyond_fp64() -> None:
    values = [torch.tensor([1.7e308, -1.7e308, 1.0], dtype=torch.float64)] * 3
    assert numbers(mean(values, torch.float64)) == expected(values, FP64)
    assert numbers(skipped(values, torch.float64)) == expected(values, FP64)


# Near ties -------------------------------------------------------------------------------------------------------


@st.composite
def midpoints(draw: st.DrawFn, out: FloatFormat) -> Fraction:
    """A value half way between two neighbours of `out`, subnormal ones among them."""
    exponent = draw(st.integers(out.smallest_exponent, min(out.smallest_exponent + 40, 12)))
    low = draw(st.sampled_from([0, 2 ** (out.precision - 1)]))  # below the first is subnormal, if the exponent is least
    steps = draw(st.integers(low, 2**out.precision - 1))
    return (steps + Fraction(1, 2)) * Fraction(2) ** (exponent - out.precision + 1) * draw(st.sampled_from([1, -1]))


@given(st.data(), st.sampled_from([FP16, BF16, FP32, E4M3, E5M2]))
def test_a_mean_just_beside_a_tie_goes_to_its_side(data: st.DataObject, out: FloatFormat) -> None:
    # One of the rows is off the tie by its last bit: rounding the quotient to fp64 or fp32 first would lose it.
    tie = float(data.draw(midpoints(out)))
    count = data.draw(st.integers(1, 50))
    nudge = data.draw(st.sampled_from([-ONE_BIT, 0.0, ONE_BIT]))
    column = [*[tie] * (count - 1), tie * (1 + nudge)]
    values = [torch.tensor([value], dtype=torch.float64) for value in column]
    assert numbers(mean(values, out.dtype)) == expected(values, out)


@given(st.data(), st.sampled_from([FP16, BF16, FP32, E4M3, E5M2]))
def test_a_tie_is_seen_through_all_that_cancels(data: st.DataObject, out: FloatFormat) -> None:
    # Large values that cancel, and next to the tie something up to 2^-200 of them.
    huge = [math.ldexp(data.draw(st.integers(1, 2**53)), data.draw(st.integers(-40, 60))) for _ in range(3)]
    count = data.draw(st.integers(8, 40))
    nudge = data.draw(st.sampled_from([-1, 0, 1])) * math.ldexp(1, data.draw(st.integers(-140, -60)))
    tie = float(data.draw(midpoints(out))) * count
    column = [tie, nudge, *huge, *(-value for value in huge), *[0.0] * (count - 8)]
    values = [torch.tensor([value], dtype=torch.float64) for value in data.draw(st.permutations(column))]
    assert numbers(mean(values, out.dtype)) == expected(values, out)


DIVISORS = st.integers(2, 19).flatmap(lambda bits: st.integers(2**bits, 2 ** (bits + 1) - 1))


@given(st.data(), DIVISORS, st.sampled_from([FP16, BF16, BF16, E4M3, E5M2]))
@settings(max_examples=500)
def test_a_sum_of_fp16_just_beside_a_tie_of_its_mean_goes_to_its_side(
    data: st.DataObject, divisor: int, out: FloatFormat
) -> None:
    steps = data.draw(st.integers(2 ** (out.precision - 1), 2**out.precision - 1)) + Fraction(1, 2)
    tie = steps / 2 ** (out.precision + divisor.bit_length())  # so that the sum is below 1
    nearest = round(tie * divisor * 2**24) + data.draw(st.integers(-1, 1))
    parts = [nearest & 0xFF0000, nearest & 0xFF00, nearest & 0xFF, 0]
    values = [torch.tensor([part * 2.0**-24]).half() for part in parts]
    shares = [1, 1, 1, divisor - 3]
    assert numbers(mean(values, out.dtype, shares)) == expected(values, out, shares)


@given(st.lists(st.tuples(st.integers(-2048, 2048), st.integers(10, 24)), min_size=1, max_size=60), OUTS)
def test_sums_of_fp16_about_as_large_as_fp32_holds_are_exact(terms: list[tuple[int, int]], out: FloatFormat) -> None:
    values = [torch.tensor([math.ldexp(value, -exponent)]).half() for value, exponent in terms]
    assert numbers(mean(values, out.dtype)) == expected(values, out)


@pytest.mark.parametrize("large", [0.5, 0.999, 1.0, 1.5, 3.0, 30.0])
def test_no_row_is_lost_beside_larger_ones(large: float) -> None:
    # The smallest fp16 is 2^-24, and fp32 holds 24 bits: what is larger than 1 must not be added to it in fp32.
    values = [torch.tensor([value]).half() for value in (large, -large, large, 2**-24, 2**-24, 2**-24, large, -large)]
    assert numbers(mean(values, torch.float32)) == expected(values, FP32)


@pytest.mark.parametrize(
    ("out", "column", "rounded"),
    [
        pytest.param(FP16, [1 + 2**-11], 1, id="fp16-tie-to-even"),
        pytest.param(FP16, [1 + 2**-11 + 2**-40], 1 + 2**-10, id="fp16-above-a-tie-by-less-than-fp32-holds"),
        pytest.param(FP16, [1 + 3 * 2**-11 - 2**-40], 1 + 2**-10, id="fp16-below-a-tie-by-less-than-fp32-holds"),
        pytest.param(FP16, [2**-25 * (1 + 2**-52), 2**-25], 2**-24, id="fp16-above-half-the-smallest-by-half-a-bit"),
        pytest.param(BF16, [1 + 2**-8], 1, id="bf16-tie-to-even"),
        pytest.param(BF16, [1 + 2**-8 + 2**-40], 1 + 2**-7, id="bf16-above-a-tie-by-less-than-fp32-holds"),
        pytest.param(BF16, [2**-134 * (1 + 2**-40)], 2**-133, id="bf16-above-half-the-smallest"),
        pytest.param(BF16, [2**-134], 0, id="bf16-half-the-smallest"),
        pytest.param(BF16, [2**-126 - 2**-150], 2**-126, id="bf16-up-to-the-smallest-normal"),
        pytest.param(FP32, [1 + 2**-24, 1 + 2**-24 + 2**-52], 1 + 2**-23, id="fp32-above-a-tie"),
        pytest.param(FP16, [-(2**-25), -(2**-26)], "-0", id="fp16-what-is-too-small-keeps-its-sign"),
        pytest.param(FP32, [5e-324, 0.0, 0.0], 0, id="fp32-of-the-smallest-fp64-over-three"),
        pytest.param(FP32, [1e20, 3.0, -1e20], 1, id="fp32-what-cancels-leaves-the-rest"),
        pytest.param(FP32, [1e300, 2.0**-150, -1e300], 0, id="fp32-beyond-what-a-few-words-hold"),
    ],
)
def test_double_rounding_traps(out: FloatFormat, column: list[float], rounded: float | str) -> None:
    values = [torch.tensor([value], dtype=torch.float64) for value in column]
    assert number(mean(values, out.dtype)) == rounded


@pytest.mark.parametrize("partner", [0.0, 1.0, -1 / 3, 2.0**-24, 65504.0, 0.0999755859375])
@pytest.mark.parametrize("out", [FP16, FP32], ids=lambda out: out.name)
def test_the_mean_of_every_fp16_value_and_another_is_that_of_numpy(out: FloatFormat, partner: float) -> None:
    # The sum of two fp16 and its half are exact in fp64, and numpy rounds fp64 to fp16 and to fp32 at once.
    every = torch.arange(-(2**15), 2**15).short().view(torch.float16)
    every = every[every.isfinite()]
    other = torch.full_like(every, partner)
    kind = {FP16: np.float16, FP32: np.float32}[out]
    told = ((every.double().numpy() + other.double().numpy()) / 2).astype(kind)
    assert same_bits(mean([every, other], out.dtype), torch.from_numpy(told))


def test_forty_two_models_have_the_mean_that_an_fp32_sum_gives() -> None:
    generator = torch.Generator().manual_seed(42)
    values = [(torch.randn(50_000, generator=generator) * 0.02).half() for _ in range(42)]
    total = torch.zeros(50_000)
    for value in values:
        total += value
    assert same_bits(mean(values, torch.float16), (total / 42).half())


# --- order, grouping, fast and slow paths ---------------------------------------------------------------------------


@given(stacks([FP16, BF16, FP32, E5M2], most=40), st.randoms(use_true_random=False), OUTS)
def test_order_does_not_matter(stack: tuple[list[Tensor], list[int]], random: object, out: FloatFormat) -> None:
    values, shares = stack
    pairs = list(zip(values, shares, strict=True))
    random.shuffle(pairs)  # type: ignore[attr-defined]
    shuffled, moved = zip(*pairs, strict=True)
    assert same_bits(mean(shuffled, out.dtype, moved), mean(values, out.dtype, shares))


@given(stacks([FP16, BF16, FP32], most=30), st.integers(2, 7), OUTS)
def test_only_the_proportion_of_shares_matters(
    stack: tuple[list[Tensor], list[int]], factor: int, out: FloatFormat
) -> None:
    values, shares = stack
    multiplied = mean(values, out.dtype, [share * factor for share in shares])
    repeated = mean(values * factor, out.dtype, shares * factor)
    assert same_bits(multiplied, mean(values, out.dtype, shares))
    assert same_bits(repeated, multiplied)


@given(stacks([FP16, BF16], most=80, elements=8), OUTS)
@settings(max_examples=60)
def test_few_words_give_the_bits_of_many(stack: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, shares = stack
    few = mean(values, out.dtype, shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_words_for", lambda *_: exact.MOST_WORDS)
        assert same_bits(mean(values, out.dtype, shares), few)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_may_lie_anyhow_in_one_memory(dtype: torch.dtype) -> None:
    memory = torch.randn(4000, generator=torch.Generator().manual_seed(1)).to(dtype)
    matrix = memory.view(40, 100)
    layouts = {
        "rows of a matrix": list(matrix),
        "every third row": list(matrix[::3]),
        "parts of rows": list(matrix[:, 7:50]),
        "columns": list(matrix.T),
        "from the last to the first": list(matrix.flip(0)) + list(matrix)[::-1],
        "one row often": [matrix[3]] * 5,
        "overlapping": list(memory.unfold(0, 500, 3)[:200]),
        "at uneven distances": [memory[start : start + 40] for start in (0, 40, 80, 130, 500, 960, 1000)],
        "at even distances with other steps": [memory[:20], memory[40:80:2], memory[80:120:2], memory[120:140]],
        "of another memory": [memory[:40], memory.clone()[40:80], memory[80:120]],
    }
    for values in layouts.values():
        for out in (FP16, FP32):
            apart = [value.clone() for value in values]
            assert same_bits(mean_as_they_lie(values, out.dtype), mean_as_they_lie(apart, out.dtype))
            assert same_bits(mean_as_they_lie(values, out.dtype), mean(values, out.dtype))


def test_few_words_are_taken_where_few_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("this sum needs no second word")

    monkeypatch.setattr(exact, "_two_sum", refuse)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(1000, generator=generator) for _ in range(20)]
    edge = [torch.full((3,), 65504.0, dtype=torch.float16)] * 8192
    mean([*(weight.bfloat16() for weight in weights), torch.zeros(1000)], torch.float16)
    mean([torch.zeros(4), torch.zeros(4).bfloat16(), torch.zeros(4).double()], torch.float32)
    mean([torch.full((4,), 1.5)] * 300, torch.bfloat16)
    assert numbers(mean(edge, torch.float16)) == [65504] * 3


@pytest.mark.parametrize("out", [BF16, FP32], ids=lambda out: out.name)
@pytest.mark.parametrize("count", [2, 3, 300])
def test_a_sum_of_bf16_may_be_beyond_fp32(count: int, out: FloatFormat) -> None:
    values = [torch.tensor([3e38, -3e38, 3e38]).bfloat16()] * count
    assert numbers(mean(values, out.dtype)) == expected(values, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_sum_that_is_zero_is_plus_zero_whatever_the_signs_of_its_terms(dtype: torch.dtype) -> None:
    zero, one = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
    for values in ([zero, zero], [zero, -zero], [-zero, -zero], [-zero], [one, -zero, -one], [-one, one]):
        assert numbers(mean(values, dtype)) == [0] * 5
