"""The uniform mean: exact, rounded once."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from mergeflow.methods.exact import divide_into, exact_sum

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from mergeflow.interfaces import Rows

DIRECT_LIMIT = 8192
"""Up to this sum of shares a mean of fp16 rows needs no remainder; see `divide_into`."""


class Uniform:
    """The mean of the rows, each with its exact share: sum(share * row) / sum(shares), rounded once."""

    name = "uniform"
    takes_any_dtype = False

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the mean of `rows` into `out`; NaN and infinity travel as in any IEEE sum."""
        if all(map(math.isfinite, rows.peaks)):
            _mean(rows.values, rows.peaks, shares, sum(shares), out)
            return
        finite = [row.isfinite() for row in rows.values]
        _mean_of(rows.values, finite, shares, sum(shares), out)
        # A sum is NaN if a term is, or if infinities of both signs meet; else it is the infinity it contains.
        up, down, nan = (_any(map(kind, rows.values)) for kind in (torch.isposinf, torch.isneginf, torch.isnan))
        out.masked_fill_(up, math.inf).masked_fill_(down, -math.inf).masked_fill_(nan | (up & down), math.nan)

    def skip(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Write the mean of what is finite, element by element, with shares renewed; NaN where nothing is."""
        finite = [row.isfinite() for row in rows.values]
        total = torch.zeros(len(out), dtype=torch.float64)
        for mask, share in zip(finite, shares, strict=True):
            total.add_(mask, alpha=share)
        _mean_of(rows.values, finite, shares, total, out)


def _mean_of(
    values: Sequence[Tensor], finite: Sequence[Tensor], shares: Sequence[int], total: int | Tensor, out: Tensor
) -> None:
    """The sum over the finite values only, divided by `total`."""
    zero = {value.dtype: torch.tensor(-0.0, dtype=value.dtype) for value in values}
    cleaned = [torch.where(mask, value, zero[value.dtype]) for value, mask in zip(values, finite, strict=True)]
    _mean(cleaned, [float(row.abs().amax()) for row in cleaned], shares, total, out)


def _mean(
    values: Sequence[Tensor], peaks: Sequence[float], shares: Sequence[int], total: int | Tensor, out: Tensor
) -> None:
    direct = sum(shares) <= DIRECT_LIMIT and all(value.dtype == torch.float16 for value in values)
    divide_into(exact_sum(values, peaks, shares), total, out, direct=direct)


def _any(masks: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.logical_or, masks)
