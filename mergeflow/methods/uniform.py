"""The uniform mean: exact, rounded once."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from mergeflow.interfaces import Rows
from mergeflow.methods.exact import add_exactly, bound_of, divide
from mergeflow.methods.rounding import round_into

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

COPIED = 1 << 17
"""Values of all rows together that are copied at a time, without NaN and infinity: at most 1 MiB."""
LARGEST_SUM, SCALE = 2.0**1023, 2.0**64
"""A mean of fp64 may be in range although the sum is not; such rows are divided by `SCALE` first."""


class Uniform:
    """The mean of the rows, each with its exact share: sum(share * row) / sum(shares), rounded once."""

    name = "uniform"
    takes_any_dtype = False

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the mean of `rows` into `out`; NaN and infinity travel as in any IEEE sum."""
        if bound_of(rows.peaks, shares) < LARGEST_SUM:  # which no sum is that holds NaN or infinity
            round_into(_mean(rows, shares, sum(shares), out.dtype), out)
            return
        for values, result in _narrowed(rows.values, out):
            mean = _mean_of_finite(values, shares, sum(shares), out.dtype)
            # A sum is NaN if a term is, or if infinities of both signs meet; else it is the infinity it contains.
            up, down, nan = (_any(kind, values) for kind in (torch.isposinf, torch.isneginf, torch.isnan))
            mean.masked_fill_(up, math.inf).masked_fill_(down, -math.inf).masked_fill_(nan | (up & down), math.nan)
            round_into(mean, result)

    def skip(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the mean of what is finite, element by element, with shares renewed; NaN where nothing is."""
        for values, result in _narrowed(rows.values, out):
            total = torch.zeros(len(result), dtype=torch.float64)
            for value, share in zip(values, shares, strict=True):
                total.add_(value.isfinite(), alpha=share)
            round_into(_mean_of_finite(values, shares, total, out.dtype), result)


def _narrowed(values: Sequence[Tensor], out: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Rows and result in slices of which copies may be made: what they take does not grow with the rows."""
    width = max(COPIED // len(values), 1)
    for start in range(0, len(out), width):
        yield [value[start : start + width] for value in values], out[start : start + width]


def _mean_of_finite(values: Sequence[Tensor], shares: Sequence[int], total: int | Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the finite values only, divided by `total`."""
    cleaned = [torch.where(value.isfinite(), value, 0.0) for value in values]
    peaks = [float(row.abs().amax()) for row in cleaned]
    if bound_of(peaks, shares) < LARGEST_SUM:
        return _mean(Rows.of(cleaned, peaks), shares, total, dtype)
    scaled = [row.double().div_(SCALE) for row in cleaned]
    return _mean(Rows.of(scaled, [peak / SCALE for peak in peaks]), shares, total, dtype).mul_(SCALE)


def _mean(rows: Rows, shares: Sequence[int], total: int | Tensor, dtype: torch.dtype) -> Tensor:
    """The mean, fit to be rounded once more, to `dtype`."""
    return divide(add_exactly(rows, shares), total, dtype)


def _any(kind: Callable[[Tensor], Tensor], values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.logical_or, map(kind, values))
