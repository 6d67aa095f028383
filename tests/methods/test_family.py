"""Means made together have the bits that they have alone, in one word of fp32, one of fp64 or two."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mergeflow.interfaces import Rows, SharedSums
from mergeflow.methods import family
from mergeflow.methods.exact import words_for
from mergeflow.methods.family import merge_family
from mergeflow.methods.uniform import Uniform
from mergeflow.plan.families import shared_sums
from mergeflow.plan.plan import Cell
from mergeflow.recipe.request import UNIFORM
from mergeflow.tensors import Dtype
from tests.methods.means import as_in_a_block, expected, stacks
from tests.methods.reference import BF16, FP16, FP32, FP64, FloatFormat, numbers, rows_of, same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ONE_FP32, ONE_FP64, TWO_FP64, ALONE = (1, torch.float32), (1, torch.float64), (2, torch.float64), None
Path = tuple[int, torch.dtype] | None
"""The words that the sums had, or `ALONE`."""


class Made(NamedTuple):
    """What came of a family."""

    outs: list[Tensor]
    path: Path


def cell(rows: Sequence[int], shares: Sequence[int] = ()) -> Cell:
    return Cell(UNIFORM, Dtype.F16, tuple(rows), tuple(shares) or (1,) * len(rows), ())


def without_each(shares: Sequence[int]) -> list[Cell]:
    """All rows but one, for each; it does not matter here whether the shares could be smaller integers."""
    rows = range(len(shares))
    return [cell([row for row in rows if row != left], [*shares[:left], *shares[left + 1 :]]) for left in rows]


def are_family(cells: Sequence[Cell]) -> bool:
    """Whether planning makes all of them together."""
    sums = shared_sums(cells)
    return len(sums) == 1 and sum(len(step.cells) for step in sums[0].steps) == len(cells)


def together(rows: Rows, cells: Sequence[Cell], *dtypes: torch.dtype) -> Made:
    """What the family makes, in these dtypes by turns, and in how many words it was added."""
    assert are_family(cells)
    (sums,) = shared_sums(cells)
    outs = [torch.full((len(rows.values[0]),), 77).to(dtypes[index % len(dtypes)]) for index in range(len(cells))]
    words: list[tuple[int, torch.dtype]] = []
    with pytest.MonkeyPatch.context() as patch:

        def noted(*arguments: Any) -> tuple[int, torch.dtype]:
            words.append(words_for(*arguments))
            return words[0]

        patch.setattr(family, "words_for", noted)
        done = merge_family(rows, sums, outs)
    if not done:
        assert all(same_bits(out, torch.full_like(out, 77)) for out in outs), "it must not have begun"
        return Made(outs, ALONE)
    return Made(outs, words[0])


def merged_alone(rows: Rows, cell: Cell, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(rows.values[0]), dtype=dtype)
    Uniform().merge(rows.take(cell.rows), cell.shares, out)
    return out


def check(values: Sequence[Tensor], cells: Sequence[Cell], *dtypes: torch.dtype) -> Path:
    """See that every mean has the bits that it has alone, and in which words they were made."""
    rows = rows_of(as_in_a_block(values))
    made = together(rows, cells, *dtypes)
    if made.path is not ALONE:
        for one, out in zip(cells, made.outs, strict=True):
            assert same_bits(out, merged_alone(rows, one, out.dtype))
    return made.path


OUTS = st.lists(st.sampled_from([FP16, BF16, FP32]), min_size=1, max_size=3).map(lambda outs: [o.dtype for o in outs])


# --- any values -----------------------------------------------------------------------------------------------------


@given(stacks([FP16], most=40), OUTS)
def test_means_of_any_fp16_values_are_made_together_and_in_one_word_where_their_sums_fit(
    stack: tuple[list[Tensor], list[int]], outs: list[torch.dtype]
) -> None:
    values, shares = stack
    cells = without_each(shares)
    assume(len(values) > 1 and are_family(cells))
    path = check(values, cells, *outs)
    (sums,) = shared_sums(cells)  # sums of uneven shares are multiples of those that one mean alone has
    fits = torch.finfo(torch.float16).max * sum(sums.most) < 2**29
    assert path in (ONE_FP32, ONE_FP64) or not fits


@given(stacks([FP16, BF16, FP32], most=30), OUTS)
def test_means_of_mixed_dtypes_have_the_bits_they_have_alone(
    stack: tuple[list[Tensor], list[int]], outs: list[torch.dtype]
) -> None:
    values, shares = stack
    assume(len(values) > 1 and are_family(without_each(shares)))
    check(values, without_each(shares), *outs)


@given(st.data(), st.sampled_from([FP16, BF16, FP32, FP64]), st.integers(4, 20), OUTS)
def test_values_of_weights_with_any_lists_have_the_bits_they_have_alone(
    data: st.DataObject, format: FloatFormat, count: int, outs: list[torch.dtype]
) -> None:
    cells = []
    for _ in range(data.draw(st.integers(2, 8))):
        rows = data.draw(st.lists(st.integers(0, count - 1), min_size=count // 2, max_size=count, unique=True))
        cycle = data.draw(st.sampled_from([[1], [1], [2, 1], [3, 1, 1, 7]]))
        cells.append(cell(rows, [cycle[row % len(cycle)] for row in rows]))
    assume(are_family(cells))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    decades = data.draw(st.sampled_from([0, 3, 8]))
    scales = [0.05 * 10.0 ** -(decades * torch.rand(7, generator=generator)) for _ in range(count)]
    values = [(torch.randn(7, generator=generator) * scale).to(format.dtype) for scale in scales]
    path = check(values, cells, *outs)
    assert path is not ALONE or format is FP64


@given(stacks([FP16, FP32], most=12), st.sampled_from([FP16, BF16, FP32]))
def test_the_means_are_those_of_fractions(stack: tuple[list[Tensor], list[int]], out: FloatFormat) -> None:
    values, _ = stack
    assume(len(values) > 3)
    cells = without_each([1] * len(values))
    made = together(rows_of(values), cells, out.dtype)
    if made.path is not ALONE:
        for one, mean in zip(cells, made.outs, strict=True):
            assert numbers(mean) == expected([values[row] for row in one.rows], out)


# --- which words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peak", "count", "share", "path"),
    [
        pytest.param(0.125, 7, 1, ONE_FP32, id="below-what-fp32-holds"),
        pytest.param(0.125, 8, 1, ONE_FP64, id="at-what-fp32-holds"),
        pytest.param(0.0625, 5, 3, ONE_FP32, id="shares-below-what-fp32-holds"),
        pytest.param(0.0625, 6, 3, ONE_FP64, id="shares-beyond-what-fp32-holds"),
        pytest.param(2.0**-14, 9, 1000, ONE_FP32, id="divisors-below-what-fp32-may-divide-by"),
        pytest.param(2.0**-14, 10, 1000, ONE_FP64, id="divisors-that-fp32-may-divide-by-for-bf16-only"),
        pytest.param(32768.0, 8, 2**11 - 1, ONE_FP64, id="below-what-fp64-holds"),
        pytest.param(32768.0, 8, 2**11, TWO_FP64, id="at-what-fp64-holds"),
        pytest.param(32768.0, 9, 2**22, TWO_FP64, id="far-beyond-what-fp64-holds"),
    ],
)
def test_the_bound_of_fp16_tells_how_many_words_there_are(peak: float, count: int, share: int, path: Path) -> None:
    least = 2.0**-24
    values = [torch.tensor([peak, -peak, (-1) ** row * peak, least, -least, 0.0, -0.0]).half() for row in range(count)]
    assert check(values, without_each([share] * count), torch.float16, torch.bfloat16) == path


@pytest.mark.parametrize(("count", "path"), [(7, ONE_FP64), (8, TWO_FP64), (9, TWO_FP64)])
def test_the_bound_of_fp32_is_held_against_its_smallest_magnitude(count: int, path: Path) -> None:
    # The quantum of 1 is 2^-23, so that one word takes sums below 2^30.
    values = [torch.tensor([2.0**27, -(2.0**27), (-1) ** row * 2.0**27, 1.0, 0.0]) for row in range(count)]
    assert check(values, without_each([1] * count), torch.float16, torch.float32) == path


def test_fp32_values_of_weights_take_one_word_and_wide_ones_two_and_the_widest_are_made_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(300, generator=generator).mul_(0.02).clamp_(min=1e-5) for _ in range(9)]
    cells = without_each([1] * 9)
    assert check(values, cells, torch.float16, torch.float32) == ONE_FP64
    values[3][::7] = 1e-12
    assert check(values, cells, torch.float16, torch.float32) == TWO_FP64
    values[5][::5] = 1e-30
    assert check(values, cells, torch.float16, torch.float32) is ALONE


def test_bf16_that_spans_all_its_exponents_is_made_alone() -> None:
    values = [torch.tensor([3e38, 1e-40, -3e38, 1.0]).bfloat16()] * 5
    assert check(values, without_each([1] * 5), torch.bfloat16) is ALONE


@pytest.mark.parametrize(("least", "path"), [(2.0**-20, ONE_FP64), (2.0**-45, ALONE)])
def test_an_fp64_of_a_sum_in_two_words_is_made_alone(least: float, path: Path) -> None:
    values = [torch.tensor([least, 1 + index / 8, -3.0]) for index in range(6)]
    assert check(values, without_each([1] * 6), torch.float32, torch.float64) == path
    assert check(values, without_each([1] * 6), torch.float32) in (ONE_FP64, TWO_FP64)


def test_fp64_rows_are_made_together_where_their_sums_fit() -> None:
    values = [torch.tensor([1.0 + index / 64, -0.5], dtype=torch.float64) for index in range(6)]
    cells = without_each([1] * 6)
    assert check([value.mul(1.0) for value in values], cells, torch.float32) == TWO_FP64  # 2^-53 is the quantum of 0.5
    wide = [value + 2.0**-40 * index for index, value in enumerate(values)]
    assert check(wide, without_each([3, 3, 3, 3, 3, 3]), torch.float16, torch.bfloat16) == TWO_FP64
    assert check([value.zero_() for value in wide], cells, torch.float64) in (ONE_FP32, ONE_FP64)
    assert check([*wide[:5], torch.full((2,), 1e308, dtype=torch.float64)], cells, torch.float16) is ALONE


# --- zeros, cancellation, subnormals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**20])
def test_a_sum_that_is_zero_is_plus_zero_also_after_subtraction(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16 and scale != 1:
        scale = 2.0**-10
    columns: list[list[float]] = [
        [1, -1, 1, -1, 5, 0],
        [0, 0, 0, 0, 0, 0],
        [-0.0] * 6,
        [0, -0.0, 0, -0.0, 0, -0.0],
        [3, -0.0, -3, 0, 0, 7],
    ]
    values = [torch.tensor([column[row] * scale for column in columns], dtype=dtype) for row in range(6)]
    cells = [cell(rows) for rows in ([0, 1, 2, 3], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5], [1, 2, 3, 0, 4], [0, 1, 2, 4])]
    made = together(rows_of(values), cells, torch.float32 if dtype == torch.float64 else dtype)
    assert made.path is not ALONE
    for one, out in zip(cells, made.outs, strict=True):
        for mean, column in zip(numbers(out), columns, strict=True):
            if sum(column[row] for row in one.rows) == 0:
                assert mean == 0, "not '-0'"


def test_what_is_subtracted_leaves_nothing_behind() -> None:
    # The largest row hides the smallest in any sum that rounds.
    values = [torch.full((5,), value).half() for value in (65504.0, 2.0**-24, 2.0**-24, 2.0**-24, 65504.0, -65504.0)]
    made = together(rows_of(values), without_each([1] * 6), torch.float32)
    assert made.path == ONE_FP64
    for left, out in enumerate(made.outs):
        assert numbers(out) == expected(values[:left] + values[left + 1 :], FP32)


@pytest.mark.parametrize("share", [1, 5, 1001])
def test_a_large_fp64_leaves_nothing_behind_either(share: int) -> None:
    # All 53 bits of the large one are used, so that no fp64 holds its multiples.
    generator = torch.Generator().manual_seed(share)
    large = torch.rand(50, generator=generator, dtype=torch.float64) + 1
    values = [(torch.rand(50, generator=generator).double() + 1) * 2.0**-30 for _ in range(6)]
    values[4] = large
    cells = without_each([share] * 6)
    made = together(rows_of(values), cells, torch.float32)
    assert made.path == TWO_FP64
    for one, out in zip(cells, made.outs, strict=True):
        assert numbers(out) == expected([values[row] for row in one.rows], FP32)


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_subnormal_values_have_the_bits_they_have_alone(dtype: torch.dtype, out: torch.dtype) -> None:
    least = {torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}[dtype]
    values = [torch.arange(-9, 9).mul(row + 1).double().mul(least).to(dtype) for row in range(7)]
    assert check(values, without_each([1] * 7), out) in (ONE_FP32, ONE_FP64)


# --- what is left to `Uniform` ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_row_that_is_not_finite_stops_the_family(bad: float, at: int) -> None:
    values = [torch.ones(4).half() for _ in range(6)]
    values[at][2] = bad
    assert together(rows_of(values), without_each([1] * 6), torch.float16).path is ALONE


def test_a_row_that_is_not_finite_and_in_no_list_stops_nothing() -> None:
    values = [torch.ones(4).half() for _ in range(6)] + [torch.full((4,), math.nan).half()]
    assert check(values, without_each([1] * 6), torch.float16) is not ALONE


# --- what every method keeps ------------------------------------------------------------------------------------------


def weights(length: int, seed: int, *dtypes: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(length, generator=generator) * 0.05).to(dtypes[index % len(dtypes)])
        for index in range(3 * len(dtypes) + 3)
    ]


KINDS = [(torch.float16,), (torch.float16, torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtypes", KINDS)
@pytest.mark.parametrize("length", [1, 2, 7, 1025, 16411, 32768])
def test_rows_of_any_length_anywhere_in_memory_and_untouched(length: int, dtypes: tuple[torch.dtype, ...]) -> None:
    values = weights(length, 1, *dtypes)
    before = [value.clone() for value in values]
    cells = without_each([1] * len(values))
    assert check(values, cells, torch.float16) is not ALONE
    apart = [torch.stack([value, value], dim=1).flatten()[::2] for value in values]
    made = together(rows_of(apart), cells, torch.float16)
    assert all(
        same_bits(out, merged_alone(rows_of(values), one, torch.float16))
        for one, out in zip(cells, made.outs, strict=True)
    )
    assert all(same_bits(value, copy) for value, copy in zip(values, before, strict=True))


def test_what_was_merged_before_does_not_matter() -> None:
    for dtypes, length in ((KINDS[0], 300), (KINDS[1], 16411), (KINDS[0], 9), (KINDS[1], 300), (KINDS[0], 16411)):
        values = weights(length, length, *dtypes)
        assert check(values, without_each([1] * len(values)), torch.bfloat16, torch.float32) is not ALONE


def test_peaks_decide_only_how_not_what() -> None:
    values = [torch.tensor([0.5, -0.25 * index]) for index in range(6)]
    cells = without_each([1] * 6)
    for peak in (1.25, 1e3, 1e9):
        made = together(Rows.of(values, [peak] * 6), cells, torch.float32)
        assert made.path is not ALONE
        assert all(
            same_bits(out, merged_alone(rows_of(values), one, torch.float32))
            for one, out in zip(cells, made.outs, strict=True)
        )


def test_threads_do_not_disturb_each_other() -> None:
    threads = 6
    work = [weights(3000 + seed, seed, *KINDS[seed % 2]) for seed in range(threads)]
    sums = [shared_sums(without_each([1] * len(values)))[0] for values in work]

    def made(index: int) -> list[Tensor]:
        values = work[index]
        outs = [torch.empty(len(values[0]), dtype=torch.float16) for _ in values]
        assert merge_family(rows_of(values), sums[index], outs)
        return outs

    known = [made(index) for index in range(threads)]
    start = Barrier(threads)

    def often(index: int) -> bool:
        start.wait()
        return all(same_bits(out, told) for _ in range(8) for out, told in zip(made(index), known[index], strict=True))

    with ThreadPoolExecutor(threads) as pool:
        assert all(pool.map(often, range(threads)))


def test_a_cell_that_is_in_no_family_is_not_touched() -> None:
    cells = [cell([7]), *without_each([1] * 6), cell([6])]
    values = [torch.ones(3) for _ in range(8)]
    outs = [torch.full((3,), 77.0) for _ in cells]
    (sums,) = shared_sums(cells)
    assert isinstance(sums, SharedSums)
    assert merge_family(rows_of(values), sums, outs)
    assert [out[0].item() for out in outs] == [77, 1, 1, 1, 1, 1, 1, 77]
