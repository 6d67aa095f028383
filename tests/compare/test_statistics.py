from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeflow.compare import statistics
from mergeflow.compare.statistics import Peak, Statistics, combined, measured
from mergeflow.compare.ulp import BINS, BOUNDS, FURTHEST, histogram_of, ulp_distance, ulp_dtype
from mergeflow.execute.block import torch_dtype
from mergeflow.tensors import Dtype
from tests.methods.reference import BF16, E4M3, E4M3FNUZ, E5M2, E5M2FNUZ, FP16, FP32, FP64, FloatFormat, numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

FORMATS = {
    Dtype.F64: FP64,
    Dtype.F32: FP32,
    Dtype.F16: FP16,
    Dtype.BF16: BF16,
    Dtype.F8_E4M3: E4M3,
    Dtype.F8_E5M2: E5M2,
    Dtype.F8_E4M3FNUZ: E4M3FNUZ,
    Dtype.F8_E5M2FNUZ: E5M2FNUZ,
}
INTEGERS = (Dtype.U64, Dtype.I64, Dtype.U32, Dtype.I32, Dtype.U16, Dtype.I16, Dtype.U8, Dtype.I8)
SAME = [(dtype, dtype) for dtype in (*FORMATS, *INTEGERS)]
MIXED = [
    (Dtype.F32, Dtype.F16),
    (Dtype.F16, Dtype.BF16),
    (Dtype.BF16, Dtype.F64),
    (Dtype.F64, Dtype.F32),
    (Dtype.F16, Dtype.F64),
    (Dtype.F8_E4M3, Dtype.F32),
    (Dtype.BF16, Dtype.F8_E5M2),
    (Dtype.F8_E4M3FNUZ, Dtype.F8_E5M2),
    (Dtype.F64, Dtype.F8_E5M2FNUZ),
    (Dtype.F16, Dtype.I16),
    (Dtype.I32, Dtype.F64),
    (Dtype.U8, Dtype.F8_E4M3),
    (Dtype.I64, Dtype.U8),
    (Dtype.U64, Dtype.I64),
]


def by_name(value: object) -> str:
    return value.code if isinstance(value, Dtype) else str(value)


# --- the reference: fractions, and nothing of torch but the bits ----------------------------------------------------


def rank(value: Fraction, float_format: FloatFormat) -> int:
    """The number of a value among those of its format, 0 being 0: binades of equally many values each."""
    if value < 0:
        return -rank(-value, float_format)
    if value == 0:
        return 0
    quantum = float_format.quantum(value)
    smallest = Fraction(2) ** (float_format.smallest_exponent - float_format.precision + 1)
    binades = (quantum / smallest).numerator.bit_length() - 1
    return int(value / quantum) + (binades << (float_format.precision - 1))


def expected_distance(a: Fraction, b: Fraction, unit: Dtype | None) -> int:
    """In ULP; what is beyond the largest counts as the largest."""
    if unit is None:
        return min(int(abs(a - b)), FURTHEST)
    ranks = []
    for value in (a, b):
        kept = max(-FORMATS[unit].largest, min(value, FORMATS[unit].largest))
        rounded = FORMATS[unit].rounded(kept)
        assert isinstance(rounded, Fraction)
        ranks.append(rank(rounded, FORMATS[unit]))
    return min(abs(ranks[0] - ranks[1]), FURTHEST)


def exactly(values: Tensor) -> list[Fraction | str]:
    if values.is_floating_point():
        return [Fraction(0) if value == "-0" else value for value in numbers(values)]
    return [Fraction(value) for value in values.tolist()]


class Expected(NamedTuple):
    differing: int
    nonfinite: int
    distances: list[int]
    differences: list[Fraction]
    squares: tuple[Fraction, Fraction, Fraction]


def expected(a: Tensor, b: Tensor, unit: Dtype | None) -> Expected:
    pairs = list(zip(exactly(a), exactly(b), strict=True))
    finite = [(x, y) for x, y in pairs if isinstance(x, Fraction) and isinstance(y, Fraction)]
    odd = [(x, y) for x, y in pairs if isinstance(x, str) or isinstance(y, str)]
    return Expected(
        differing=sum(x != y for x, y in pairs),
        nonfinite=sum(x != y for x, y in odd),
        distances=[expected_distance(x, y, unit) for x, y in finite] + [0 for x, y in odd if x == y],
        differences=[abs(x - y) for x, y in finite],
        squares=(
            sum((x * x for x, _ in finite), Fraction(0)),
            sum((y * y for _, y in finite), Fraction(0)),
            sum(((x - y) ** 2 for x, y in finite), Fraction(0)),
        ),
    )


def as_float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def bins_of(distances: Sequence[int]) -> list[int]:
    counts = [0] * BINS
    for distance in distances:
        counts[next((n for n, bound in enumerate(BOUNDS) if distance <= bound), BINS - 1)] += 1
    return counts


def tensor(raw: bytes, dtype: Dtype) -> Tensor:
    count = len(raw) // dtype.itemsize
    return torch.frombuffer(bytearray(raw[: count * dtype.itemsize]), dtype=torch_dtype(dtype))


@st.composite
def pairs(draw: st.DrawFn, a: Dtype, b: Dtype) -> tuple[Tensor, Tensor]:
    """Any bits; some elements of b are as near to those of a as b's dtype has them."""
    count = draw(st.integers(1, 12))
    one = tensor(draw(st.binary(min_size=count * a.itemsize, max_size=count * a.itemsize)), a)
    other = tensor(draw(st.binary(min_size=count * b.itemsize, max_size=count * b.itemsize)), b)
    if a is b:
        for element in draw(st.lists(st.integers(0, count - 1))):
            other[element] = one[element]
    return one, other


# --- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(Dtype.F16, np.float16), (Dtype.F32, np.float32), (Dtype.F64, np.float64)],
    ids=["F16", "F32", "F64"],
)
@given(data=st.data())
def test_the_distance_is_the_number_of_steps_from_one_value_to_the_other(
    dtype: Dtype, kind: Callable[[float], float], data: st.DataObject
) -> None:
    begin = kind(data.draw(st.floats(-60000, 60000, width=16)))
    steps = data.draw(st.integers(0, 40))
    end = begin
    for _ in range(steps):
        end = np.nextafter(end, kind(np.inf))
    a, b = (torch.from_numpy(np.array([value])) for value in (begin, end))
    assert ulp_distance(a, b, dtype).tolist() == [steps]
    assert ulp_distance(b, a, dtype).tolist() == [steps]


@pytest.mark.parametrize(("a", "b"), [*SAME, *MIXED], ids=by_name)
@given(data=st.data())
def test_the_distance_is_that_of_the_ranks_in_the_coarser_dtype(a: Dtype, b: Dtype, data: st.DataObject) -> None:
    unit = ulp_dtype(a, b)
    one, other = data.draw(pairs(a, b))
    found = ulp_distance(one, other, unit).tolist()
    for x, y, distance in zip(exactly(one), exactly(other), found, strict=True):
        if isinstance(x, Fraction) and isinstance(y, Fraction) and {a, b} != {Dtype.U64, Dtype.I64}:
            assert distance == expected_distance(x, y, unit)


@pytest.mark.parametrize(
    ("a", "b", "unit"),
    [
        (Dtype.F16, Dtype.F16, Dtype.F16),
        (Dtype.F32, Dtype.F16, Dtype.F16),
        (Dtype.F16, Dtype.BF16, Dtype.BF16),
        (Dtype.F64, Dtype.F32, Dtype.F32),
        (Dtype.BF16, Dtype.F8_E4M3, Dtype.F8_E4M3),
        (Dtype.F8_E4M3, Dtype.F8_E5M2, Dtype.F8_E5M2),
        (Dtype.I64, Dtype.F16, Dtype.F16),
        (Dtype.BOOL, Dtype.F32, Dtype.F32),
        (Dtype.I64, Dtype.U8, None),
    ],
    ids=by_name,
)
def test_the_dtype_with_fewer_significant_bits_is_the_measure(a: Dtype, b: Dtype, unit: Dtype | None) -> None:
    assert ulp_dtype(a, b) is unit
    assert ulp_dtype(b, a) is unit


@pytest.mark.parametrize("one", FORMATS, ids=by_name)
@pytest.mark.parametrize("other", FORMATS, ids=by_name)
def test_the_measure_does_not_depend_on_the_order_of_the_files(one: Dtype, other: Dtype) -> None:
    assert ulp_dtype(one, other) is ulp_dtype(other, one)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "distance"),
    [
        (torch.float16, 0.0, -0.0, 0),
        (torch.float16, 2.0**-24, -(2.0**-24), 2),
        (torch.float16, 65504.0, -65504.0, 2 * 0x7BFF),
        (torch.float32, 1.0, 1.0 + 2.0**-23, 1),
        (torch.float32, 1.0, 1.0 - 2.0**-24, 1),
        (torch.float32, 3.4028234663852886e38, -3.4028234663852886e38, 2 * 0x7F7FFFFF),
        (torch.float64, 1.0, -1.0, 2 * 0x3FF0000000000000),
        (torch.float64, 1e308, -1e308, FURTHEST),
        (torch.bfloat16, 1.0, 1.0078125, 1),
        (torch.float8_e4m3fn, 448.0, 416.0, 1),
        (torch.float8_e5m2, 1.0, 1.25, 1),
        (torch.int64, -(2**63), 2**63 - 1, FURTHEST),
        (torch.int64, 2**53, 2**53 + 1, 1),
        (torch.uint64, 0, 2**63 + 2**62, FURTHEST),
        (torch.uint64, 2**64 - 1, 2**64 - 3, 2),
        (torch.uint8, 255, 0, 255),
        (torch.bool, True, False, 1),
    ],
)
def test_a_distance_as_one_would_count_it(dtype: torch.dtype, a: float, b: float, distance: int) -> None:
    one, other = torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype)
    unit = next((unit for unit in FORMATS if torch_dtype(unit) is dtype), None)
    assert ulp_distance(one, other, unit).tolist() == [distance]


def test_an_unsigned_number_beyond_all_signed_ones_is_as_far_as_can_be() -> None:
    one = torch.tensor([2**63, 2**64 - 1, 7], dtype=torch.uint64)
    other = torch.tensor([2**63 - 1, -1, 5])
    assert ulp_distance(one, other, None).tolist() == [FURTHEST, FURTHEST, 2]
    assert measured(one, other, None).differing == 3


def test_what_the_coarser_dtype_cannot_hold_counts_as_its_largest() -> None:
    wide, narrow = torch.tensor([1e6, -1e6, 65519.0, 65504.0]), torch.tensor([65504, -65472, 65504, 65504]).half()
    assert ulp_distance(wide, narrow, Dtype.F16).tolist() == [0, 1, 0, 0]
    assert measured(wide, narrow, Dtype.F16).differing == 3


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 8, 9, 1024, 1025, 2**32, 2**32 + 1, 2**53 + 1, FURTHEST])
def test_a_distance_falls_into_the_bin_that_ends_at_the_next_power_of_two(number: int) -> None:
    assert histogram_of(torch.tensor([number, 0, number])) == bins_of([number, 0, number])


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """So that a dozen elements are several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "PIECE", 5)
        yield


@pytest.mark.parametrize(("a", "b"), [*SAME, *MIXED], ids=by_name)
@given(data=st.data())
def test_what_is_measured_is_what_fractions_say(a: Dtype, b: Dtype, data: st.DataObject) -> None:
    one, other = data.draw(pairs(a, b))
    if Dtype.U64 in (a, b) and a is not b:
        one = (one.view(torch.int64) & (2**62 - 1)).view(one.dtype)  # beyond, see the test on unsigned numbers
    unit = ulp_dtype(a, b)
    found, wanted = measured(one, other, unit, "key", 100), expected(one, other, unit)
    assert found.elements == len(one)
    assert found.nonfinite == wanted.nonfinite
    assert found.differing == wanted.differing
    assert list(found.histogram) == bins_of(wanted.distances)
    assert (found.furthest.size if found.furthest else 0) == max(wanted.distances, default=0)
    largest = as_float(max(wanted.differences, default=Fraction(0)))
    if unit is not None or largest < FURTHEST:
        assert (found.largest.size if found.largest else 0.0) == pytest.approx(largest, rel=2**-52, abs=0)
    if largest < (1e150 if unit else FURTHEST):  # beyond, squares leave fp64
        sums = (found.squares_a, found.squares_b, found.squares_difference)
        for have, want in zip(sums, wanted.squares, strict=True):
            if want < Fraction(10) ** 300:
                assert have == pytest.approx(float(want), rel=1e-14, abs=1e-300)


def test_a_peak_tells_the_first_of_the_largest_differences() -> None:
    a, b = torch.zeros(23), torch.zeros(23)
    b[[4, 13, 21]] = torch.tensor([1.0, -8.0, 8.0])
    found = measured(a, b, Dtype.F32, "w", start=1000)
    assert found.largest == Peak(8.0, "w", 1013, 0.0, -8.0)
    assert found.furthest == Peak((127 + 3) << 23, "w", 1013, 0.0, -8.0)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "differing", "nonfinite"),
    [
        ([0.0, 1.0], [-0.0, 1.0], 0, 0),
        ([NAN, NAN], [NAN, -NAN], 0, 0),
        ([INF, -INF], [INF, -INF], 0, 0),
        ([INF, 1.0], [-INF, 1.0], 1, 1),
        ([NAN, 1.0], [INF, 1.5], 2, 1),
        ([1.0, 2.0, NAN], [NAN, 3.0, 1.0], 3, 2),
    ],
)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float16, torch.float16), (torch.float32, torch.float16), (torch.float8_e5m2, torch.float64)],
    ids=str,
)
def test_values_that_are_not_finite_are_counted_and_left_out_of_all_else(
    a: list[float], b: list[float], differing: int, nonfinite: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    one, other = torch.tensor(a).to(dtypes[0]), torch.tensor(b).to(dtypes[1])
    found = measured(one, other, Dtype.F8_E5M2 if torch.float8_e5m2 in dtypes else Dtype.F16)
    assert (found.differing, found.nonfinite) == (differing, nonfinite)
    assert sum(found.histogram) == len(a) - nonfinite
    finite = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]
    assert found.l2 == math.sqrt(sum((x - y) ** 2 for x, y in finite))
    assert found.norm == math.sqrt(sum(x * x for x, _ in finite))


def test_nothing_is_written_to_what_is_measured() -> None:
    one, other = torch.tensor([1.0, NAN, 3.0]), torch.tensor([2.0, 1.0, INF])
    before = [one.clone(), other.clone()]
    measured(one, other, Dtype.F32)
    assert all(torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in zip((one, other), before, strict=True))


def test_no_elements_are_no_difference() -> None:
    found = measured(torch.empty(0), torch.empty(0), Dtype.F32)
    assert found == Statistics()
    assert (found.share, found.l2, found.relative_l2, found.cosine) == (0.0, 0.0, 0.0, None)


@pytest.mark.parametrize(
    ("a", "b", "relative", "cosine"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0, 1.0),
        ([3.0, 4.0], [6.0, 8.0], 1.0, 1.0),
        ([3.0, 4.0], [-3.0, -4.0], 2.0, -1.0),
        ([3.0, 0.0], [0.0, 3.0], math.sqrt(2), 0.0),
        ([0.0, 0.0], [1.0, 0.0], INF, None),
        ([1.0, 0.0], [0.0, 0.0], 1.0, None),
        ([0.0, 0.0], [0.0, -0.0], 0.0, None),
        ([1e200, 1.0], [1e201, 1.0], INF, None),
    ],
)
def test_lengths_and_angles_are_never_divided_by_zero(
    a: list[float], b: list[float], relative: float, cosine: float | None
) -> None:
    found = measured(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), Dtype.F64)
    assert found.relative_l2 == pytest.approx(relative)
    assert found.cosine == (None if cosine is None else pytest.approx(cosine))


def test_parts_add_up_to_the_same_in_any_order_and_grouping() -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(400, generator=generator) * torch.logspace(-6, 6, 400)
    b = a * (1 + torch.randn(400, generator=generator) * 1e-3)
    whole = measured(a, b, Dtype.F32, "w")
    parts = [measured(a[n : n + 20], b[n : n + 20], Dtype.F32, "w", n) for n in range(0, 400, 20)]
    assert combined(parts).counts() == whole.counts()
    assert sums(combined(parts)) == pytest.approx(sums(whole), rel=1e-14)
    for seed in range(5):
        random.Random(seed).shuffle(parts)
        assert sums(combined(parts)) == pytest.approx(sums(whole), rel=1e-14)
        assert combined(parts) == combined(parts[::-1])


def sums(found: Statistics) -> dict[str, float]:
    return {
        "squares_a": found.squares_a,
        "squares_b": found.squares_b,
        "products": found.products,
        "squares_difference": found.squares_difference,
    }
