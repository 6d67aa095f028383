"""Means by `Uniform` and by `Means`, means by fractions, and rows to try them on."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from mergeflow.methods.means import Means, alone, can_make
from mergeflow.methods.uniform import Uniform
from tests.methods.reference import (
    BF16,
    FP16,
    FP32,
    FloatFormat,
    expected_mean,
    from_bits,
    rows_of,
    same_bits,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from torch import Tensor

    from mergeflow.interfaces import SharedSums

EXPONENT_TOP = {1: 0x40, 2: 0x4000, 4: 0x4000_0000, 8: 0x4000_0000_0000_0000}
"""The highest bit of the exponent, by bytes of the format: clearing it makes any bits finite."""

OUTS = st.sampled_from([FP16, BF16, FP32])


def mean(values: Sequence[Tensor], out: torch.dtype, shares: Sequence[int] | None = None) -> Tensor:
    """What `Uniform` makes of the rows, laid out as a block has them, and `Means`, too, where it is certain."""
    laid = as_in_a_block(values)
    made = mean_as_they_lie(laid, out, shares)
    at_once = mean_at_once(laid, out, shares)
    assert at_once is None or same_bits(at_once, made)
    return made


def mean_at_once(values: Sequence[Tensor], out: torch.dtype, shares: Sequence[int] | None = None) -> Tensor | None:
    """What `Means` makes of the rows, if it is certain."""
    weights = shares or [1] * len(values)
    if not can_make(weights, {value.dtype for value in values}, out):
        return None
    made = torch.empty(len(values[0]), dtype=out)
    return made if made_at_once([alone(0, range(len(values)), weights)], values, [made]) else None


def made_at_once(families: Sequence[SharedSums], values: Sequence[Tensor], outs: Sequence[Tensor]) -> bool:
    """Whether `Means` is certain of what it has made of the rows in `outs`."""
    means = Means(families, [value.dtype for value in values], [out.dtype for out in outs])
    return means.make([value.data_ptr() for value in values], [out.data_ptr() for out in outs], len(values[0]))


def mean_as_they_lie(values: Sequence[Tensor], out: torch.dtype, shares: Sequence[int] | None = None) -> Tensor:
    """What `Uniform` makes of the rows."""
    made = torch.empty(len(values[0]), dtype=out)
    Uniform().merge(rows_of(values), shares or [1] * len(values), made)
    return made


def skipped(values: Sequence[Tensor], out: torch.dtype, shares: Sequence[int] | None = None) -> Tensor:
    """What `Uniform` makes of what is finite in the rows, laid out as a block has them."""
    made = torch.empty(len(values[0]), dtype=out)
    Uniform().skip(rows_of(as_in_a_block(values)), shares or [1] * len(values), made)
    return made


def as_in_a_block(values: Sequence[Tensor]) -> list[Tensor]:
    """The same rows, of which neighbours of one dtype lie evenly spaced in one memory."""
    laid: list[Tensor] = []
    for dtype, rows in groupby(values, key=lambda row: row.dtype):
        run = list(rows)
        room = torch.zeros(len(run), len(run[0]) + 5, dtype=dtype)
        for place, row in zip(room, run, strict=True):
            place[: len(row)] = row
        laid += room[:, : len(run[0])].unbind()
    return laid


def expected(values: Sequence[Tensor], out: FloatFormat, shares: Sequence[int] | None = None) -> list[Fraction | str]:
    """The same, by fractions."""
    columns = zip(*(value.double().tolist() for value in values), strict=True)
    return [expected_mean(column, shares or [1] * len(values), out) for column in columns]


def finite(raw: bytes, dtype: torch.dtype) -> Tensor:
    """The values that these bytes are; where one is not finite, the nearest of its bits that are."""
    row = from_bits(raw, dtype)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = row.view(integers)
    top = torch.tensor(EXPONENT_TOP[dtype.itemsize], dtype=integers)
    bad = ~row.float().isfinite() if dtype.itemsize < 8 else ~row.isfinite()
    made = torch.where(bad, bits ^ (bits & top), bits).view(dtype)
    return torch.where(made.double().isnan(), torch.zeros(1, dtype=torch.float64), made.double()).to(dtype)


@st.composite
def stacks(
    draw: st.DrawFn, formats: Sequence[FloatFormat], most: int = 300, elements: int = 3
) -> tuple[list[Tensor], list[int]]:
    """Up to `most` rows of any bits, each in one of `formats`, and their shares: equal ones, or as composites make."""
    count = draw(st.integers(1, most))
    pool = draw(st.lists(st.sampled_from(formats), min_size=1, max_size=4))
    raw = draw(st.binary(min_size=8 * count * elements, max_size=8 * count * elements))
    values = []
    for index in range(count):
        dtype = pool[index % len(pool)].dtype
        begin = 8 * index * elements
        values.append(finite(raw[begin : begin + elements * dtype.itemsize], dtype))
    shares = draw(st.one_of(st.just([1]), st.lists(st.integers(1, 60), min_size=1, max_size=5)))
    return values, [shares[index % len(shares)] for index in range(count)]
