"""One model as it is, and tensors that are no numbers to average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mergeflow.interfaces import RowsDiffer
from mergeflow.methods.exact import round_into

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeflow.interfaces import Rows


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
        self.merge(rows, shares, out)
        out.masked_fill_(~rows.values[0].isfinite(), float("nan"))


class Agree:
    """The value that all rows have; `RowsDiffer` if they do not. It counts by value: 2.0 agrees with the integer 2."""

    name = "agree"
    takes_any_dtype = True

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the first row into `out`, after all others were compared with it if this is strict."""
        first = next((row for row in rows.values if row.dtype == out.dtype), rows.values[0])
        out.copy_(first)
        self._check(0 if first is rows.values[0] else -1, first, out)
        if not self.strict:
            return
        for index, row in enumerate(rows.values):
            if row is not first:
                self._check(index, row, out)

    def skip(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """As `merge`: a value that is not finite agrees with no integer."""
        self.merge(rows, shares, out)

    def _check(self, index: int, row: Tensor, expected: Tensor) -> None:
        if row.dtype == expected.dtype:
            same = (row.view(torch.uint8) == expected.view(torch.uint8)).view(len(row), -1).all(1)
        else:
            same = row.double() == expected.double()
        if not bool(same.all()):
            at = int((~same).nonzero()[0])
            raise RowsDiffer(max(index, 0), at, _number(row[at]), _number(expected[at]))


def _number(value: Tensor) -> float:
    return float(value.real if value.is_complex() else value)
