"""One model as it is, and tensors that are no numbers to average."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mergeflow.interfaces import Rows, RowsDiffer
from mergeflow.methods.exact import INTEGER_VIEW
from mergeflow.methods.rounding import round_into

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Copy:
    """The one row, rounded once to the dtype of the output; the bits themselves where that is the row's own."""

    name = "copy"
    takes_any_dtype = False

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the only row into `out`."""
        (row,) = rows.values
        if row.dtype == torch.float64 and out.dtype != torch.float64:
            round_into(row.clone(), out)
        else:
            out.copy_(row)

    def skip(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """As `merge`, with NaN where the only value is not finite."""
        (row,) = rows.values
        self.merge(Rows.of([row.masked_fill(~row.isfinite(), math.nan)], rows.peaks), shares, out)


class Agree:
    """The value that all rows have; `RowsDiffer` if they do not. It counts by value: 2.0 agrees with the integer 2."""

    name = "agree"
    takes_any_dtype = True

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the first row into `out`, and compare every row with what was written."""
        out.copy_(rows.values[0])
        for index, row in enumerate(rows.values):
            same = _same(row, out)
            if not bool(same.all()):
                at = int((~same).nonzero()[0])
                raise RowsDiffer(index, at, _number(row[at]), _number(out[at]))

    def skip(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """As `merge`: a value that is not finite agrees with no integer."""
        self.merge(rows, shares, out)


class Whole(Agree):
    """The whole numbers that all rows are nearest to.

    Merging bends `position_ids` (2.998 in fp16 instead of 3), and who cuts off the fraction then reads another one.
    """

    name = "whole"

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """As `Agree.merge`, after rounding every row to whole numbers."""
        values = [row.double().round() if row.is_floating_point() else row for row in rows.values]
        super().merge(Rows.of(values, rows.peaks), shares, out)


def _same(row: Tensor, expected: Tensor) -> Tensor:
    """Where the two have one value, whatever their dtypes; in one dtype, where they have the same bits."""
    if row.dtype == expected.dtype:
        integers = INTEGER_VIEW[row.element_size()]
        return row.view(integers) == expected.view(integers)
    # fp64 holds every value of every other dtype but the largest 64-bit integers; those must agree as integers too.
    widest = torch.complex128 if row.is_complex() or expected.is_complex() else torch.float64
    same = row.to(widest) == expected.to(widest)
    return same & (row.long() == expected.long()) if _wide(row) or _wide(expected) else same


def _wide(row: Tensor) -> bool:
    return row.dtype in (torch.int64, torch.uint64)


def _number(value: Tensor) -> float:
    number = value.item()
    return number.real if isinstance(number, complex) else number
