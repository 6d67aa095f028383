"""Sums of rows in one word, by matrix-vector products: where no addition rounds, they are the fastest that torch has.

`exact` says when that is so.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from mergeflow.methods.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeflow.interfaces import Rows

FP32_BITS = 24
SHORTEST_RUN = 2
"""Rows; adding fewer of them in fp32 first costs more than it saves."""
WIDE_BYTES = 32
"""Bytes of widened values that are made at a time for each element, few enough that they stay in a core's own cache."""
FP32_RANGE = 2.0**-100, 2.0**126
"""Quanta from the one and sums up to the other are clear of fp32's subnormals and of its largest value."""
MARGIN_BITS = 1e-6
"""What the bookkeeping of magnitudes may itself have rounded, and far more."""

_scratch = Scratch()


def add_in_one_word(base: Tensor, rows: Rows, shares: Sequence[int], quantum: float, total: Tensor) -> None:
    """Make `total` the sum of `base` and the rows, of which it is known that no addition in its dtype rounds.

    As many rows at a time as fp32 holds the sum of are added there first, because it is several times faster.
    """
    if total.dtype == torch.float32:
        _add_products(base, rows, shares, 0, len(shares), total)
        return
    most = WIDE_BYTES // total.element_size()
    parts = _scratch.matrix("parts", most, total, torch.float32)
    start, held = 0, 0
    while start < len(shares):
        stop = _run(rows.peaks, shares, start, quantum)
        if stop - start >= SHORTEST_RUN:
            _add_products(None, rows, shares, start, stop, parts[held])
            held += 1
        else:
            stop = min(start + most, len(shares))
            base = _add_products(base, rows, shares, start, stop, total)
        start = stop
        if held == most or (held and start == len(shares)):
            wide = _scratch.matrix("wide", held, total, total.dtype).copy_(parts[:held])
            base = torch.addmv(base, wide.T, _vector((1,) * held, total.dtype), out=total)
            held = 0


def _run(peaks: Sequence[float], shares: Sequence[int], start: int, quantum: float) -> int:
    """The end of the longest run of rows whose magnitudes add up to what fp32 holds exactly."""
    least, most = FP32_RANGE
    limit = min(math.ldexp(quantum, FP32_BITS) * (1 - MARGIN_BITS), most) if quantum >= least else 0.0
    total = 0.0
    for index in range(start, len(peaks)):
        total += peaks[index] * abs(shares[index])
        if total >= limit:
            return index
    return len(peaks)


def _add_products(
    base: Tensor | None, rows: Rows, shares: Sequence[int], start: int, stop: int, total: Tensor
) -> Tensor:
    """Make `total` the sum of `base`, if any, and of some of the rows, and return it; nothing rounds in its dtype."""
    most = WIDE_BYTES // total.element_size()
    for first in range(start, stop, most):
        last = min(first + most, stop)
        wide, vector = _widened(rows, first, last, total), _vector(tuple(shares[first:last]), total.dtype)
        base = torch.mv(wide.T, vector, out=total) if base is None else torch.addmv(base, wide.T, vector, out=total)
    return total


@lru_cache(maxsize=1024)
def _vector(shares: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Shares as a vector. One that fp32 does not hold belongs to a row of zeros, or its products would not fit."""
    return torch.tensor(shares, dtype=dtype)


def _widened(rows: Rows, first: int, last: int, like: Tensor) -> Tensor:
    """Some of the rows as one matrix of the dtype of `like`, which holds their values: as they lie, or in scratch."""
    at = 0
    wide: Tensor | None = None
    for matrix in rows.matrices:
        height = matrix.shape[0]
        begin, end = max(first - at, 0), min(last - at, height)
        if begin < end:
            some = matrix[begin:end]
            if end - begin == last - first:
                same = some.dtype == like.dtype
                return some if same else _widen(some, _scratch.matrix("wide", end - begin, like, like.dtype))
            if wide is None:
                wide = _scratch.matrix("wide", last - first, like, like.dtype)
            _widen(some, wide[at + begin - first : at + end - first])
        at += height
    assert wide is not None, "these rows are not empty"
    return wide


def _widen(rows: Tensor, wide: Tensor) -> Tensor:
    if rows.dtype == torch.float16 and wide.dtype == torch.float64:
        # By way of fp32, which takes torch half the time.
        rows = _scratch.matrix("half", rows.shape[0], rows[0], torch.float32).copy_(rows)
    return wide.copy_(rows)
