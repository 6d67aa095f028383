"""Sums without rounding, and their quotients, which `rounding` rounds as if they were exact.

Why a sum can be exact. A finite value of a float format with p significant bits is an integer multiple of a
quantum: at least 2^-24 for every fp16, and 2^(e-p+1) for a row whose smallest nonzero magnitude lies in
[2^e, 2^(e+1)). Sums of multiples of q are multiples of q, and an accumulator with m bits holds every multiple of q
up to 2^m q. So as long as the magnitudes add up to less than 2^m q, no addition rounds, in any order. Shares are
integers: a share times a row is a multiple of q, too, and no more than the sum, so no product rounds either. Then it
does not matter who adds, in which order and whether multiplications and additions are fused, and the fastest that
torch has may do it, the product of a matrix and a vector:

    fp16 rows in fp32  (m = 24): exact while the magnitudes add up to less than 1
    fp16 rows in fp64  (m = 53): exact below 2^29, that is for 8,192 models at the very edge of fp16
    other rows           either: exact if the spread of the magnitudes allows it, which is looked up
    anything else: several words, each of which takes what every addition to the one before rounds away (TwoSum,
    Knuth, TAOCP 4.2.2). What n additions to a word of magnitude B round away adds up to at most n 2^-53 B, so the
    spread tells how many words there must be for the last one to add without rounding.

Why the division may round too. Let S be such a sum in m bits, a multiple of q with |S| < 2^m q; D < 2^(m-p) the
divisor; and t a point at which rounding to p bits turns (halfway between neighbours), in the binade 2^e of S / D. Then
t is a multiple of 2^(e-p), so that S - D t, unless it is 0, is at least min(q, 2^(e-p)), and S / D is away from t by
that over D. Rounding S / D to m bits moves it by at most 2^(e-m), which is less than 2^(e-p) / D because of D, and less
than q / D because of |S|. So the rounded quotient lies on the same side of t, or on t if the exact one does: rounding
it to p bits gives what rounding the exact quotient gives.

A sum that is zero is +0, whatever the signs of its terms: it must not depend on how they were grouped.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mergeflow.interfaces import Rows

Words: TypeAlias = Sequence[Tensor]
"""A sum, one value per element, as the sum of several rows."""

FP16_QUANTUM = 2.0**-24
FP32_BITS, FP64_BITS = 24, 53
SIGNIFICANT_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
INTEGER_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MARGIN_BITS = 1e-6
"""What the bookkeeping of magnitudes may itself have rounded, and far more."""
MOST_WORDS = 8
"""Enough for any values that fp32 and bf16 have; fp64 rows that span more than 2^350 in one place may round before."""
SHORTEST_RUN = 2
"""Rows; adding fewer of them in fp32 first costs more than it saves."""
WIDE_BYTES = 32
"""Bytes of widened values that are made at a time for each element, few enough that they stay in a core's own cache."""
FP32_RANGE = 2.0**-100, 2.0**126
"""Quanta from the one and sums up to the other are clear of fp32's subnormals and of its largest value."""
MOST_VIEWS = 256
"""Of scratch that are kept: making one takes longer than adding a short row."""
SPLIT = (1 << 27) - 1
"""Clearing 27 of 53 bits leaves a factor whose product with an integer below `SHARES_LIMIT` is exact in fp64."""


class Scratch(threading.local):
    """Buffers that every thread has once: what is allocated per call is what makes threads wait for each other."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """An uninitialised 1-D buffer of as many values as `like` has; the same memory for the same name."""
        return self._view(name, dtype, (like.numel(),))

    def matrix(self, name: str, rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """As a call, with so many rows."""
        return self._view(name, dtype, (rows, like.numel()))

    def _view(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        key = (name, dtype, shape)
        view = self._views.get(key)
        if view is None:
            count = math.prod(shape)
            held = self._buffers.get((name, dtype))
            if held is None or held.numel() < count or len(self._views) > MOST_VIEWS:
                self._views.clear()  # of a buffer that is no more, or simply too many
            if held is None or held.numel() < count:
                held = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
            view = self._views[key] = held[:count].view(shape)
        return view


_scratch = Scratch()


def add_exactly(rows: Rows, shares: Sequence[int], out: torch.dtype) -> Words:
    """The sum of `share * row` over rows of finite values, without rounding, in one word or more.

    The rows are fp16, bf16, fp32 or fp64; shares and their sum are below `SHARES_LIMIT`. `out` is what the mean will be
    rounded to. The sum is that of all words, the first of which is next to it. They live in this thread's scratch: they
    are gone with the next call.
    """
    bound = bound_of(rows.peaks, shares)
    quantum = quantum_of(rows)
    count, dtype = words_for(bound, quantum, len(shares), [(out, sum(shares))])
    like = rows.matrices[0][0]
    words = [_scratch(f"word {index}", like, dtype).zero_() for index in range(count)]
    add_to(words, rows, shares, quantum, words)
    return words


def bound_of(peaks: Sequence[float], shares: Sequence[int]) -> float:
    """What no sum of the rows exceeds, in whatever order."""
    return float(sum(map(operator.mul, peaks, shares)))


def words_for(
    bound: float, quantum: float, additions: int, outs: Iterable[tuple[torch.dtype, int]]
) -> tuple[int, torch.dtype]:
    """How many words of which dtype it takes so that no addition loses anything.

    `bound` is what the magnitudes of all terms add up to, at most; `quantum` that of the terms. `outs` are the dtypes
    and divisors of the means that will be made of the sums.
    """
    if _fits_fp32(bound, quantum) and all(_may_divide_in_fp32(out, by, quantum) for out, by in outs):
        return 1, torch.float32
    if _fits(FP64_BITS, bound, quantum):
        return 1, torch.float64
    return _count(bound, quantum, additions), torch.float64


def add_to(base: Words, rows: Rows, shares: Sequence[int], quantum: float, total: Words) -> None:
    """Make `total` the sum `base` and of `share * row` over all rows; it may be `base`, or other memory.

    The words are as many as `words_for` says, and the quantum is that of these rows or less.
    """
    if len(total) == 1:
        _add_in_one_word(base[0], rows, shares, quantum, total[0])
        return
    for before, word in zip(base, total, strict=True):
        if word is not before:
            word.copy_(before)
    for value, share in zip(rows.values, shares, strict=True):
        for term in _terms(value, share):
            for word in total[:-1]:
                _two_sum(word, term)
            total[-1].add_(term)
    _settle(total)


def _fits(bits: int, bound: float, quantum: float) -> bool:
    """Whether multiples of `quantum` below `bound` are exact in so many bits."""
    return bound == 0 or math.log2(bound) - math.log2(quantum) + MARGIN_BITS < bits


def _fits_fp32(bound: float, quantum: float) -> bool:
    """Whether multiples of `quantum` below `bound` are exact in fp32, and none of them is subnormal there."""
    least, most = FP32_RANGE
    return _fits(FP32_BITS, bound, quantum) and (bound == 0 or (quantum >= least and bound <= most))


def _may_divide_in_fp32(out: torch.dtype, divisor: int, quantum: float) -> bool:
    """See "Why the division may round too"; quotients must stay clear of fp32's own subnormals, too."""
    bits = SIGNIFICANT_BITS.get(out, 4)  # fp8 has fewer
    return bits <= 11 and divisor < 1 << (FP32_BITS - bits) and quantum >= FP32_RANGE[0]


def _count(bound: float, quantum: float, rows: int) -> int:
    """How many words it takes so that no addition loses anything."""
    excess = math.log2(bound) - math.log2(quantum) + MARGIN_BITS - FP64_BITS
    per_word = FP64_BITS - math.log2(2 * rows)
    return min(2 + math.floor(min(excess / per_word, MOST_WORDS)), MOST_WORDS)


def quantum_of(rows: Rows) -> float:
    """A power of two of which every value is a multiple; infinite if all are 0."""
    least = math.inf
    first = 0
    for matrix in rows.matrices:
        floor = min(rows.floors[first : first + matrix.shape[0]]) if rows.floors else 0.0
        first += matrix.shape[0]
        if matrix.dtype == torch.float16:
            least = min(least, FP16_QUANTUM)  # worth no look: some value is nearly always that small
        else:
            least = min(least, _quantum(floor or smallest_magnitude(matrix), matrix.dtype))
    return least


def _quantum(magnitude: float, dtype: torch.dtype) -> float:
    """Of what values of `dtype` are multiples that are not below `magnitude`, or 0."""
    if magnitude == math.inf:
        return math.inf
    info = torch.finfo(dtype)
    _, exponent = math.frexp(max(magnitude, info.smallest_normal))
    return math.ldexp(1.0, max(exponent - SIGNIFICANT_BITS[dtype], -1074))


def smallest_magnitude(matrix: Tensor) -> float:
    """That of all values that are not 0; infinite if there are none."""
    integers = INTEGER_VIEW[matrix.element_size()]
    mask = torch.iinfo(integers).max
    least = mask
    for row in matrix.view(integers) if matrix.stride(-1) == 1 else matrix.contiguous().view(integers):
        magnitudes = torch.bitwise_and(row, mask, out=_scratch("magnitudes", row, integers))
        # Zero is no magnitude that counts: less one, it becomes the largest of all.
        least = min(least, int(magnitudes.sub_(1).bitwise_and_(mask).amin()))
    return math.inf if least == mask else float(torch.tensor(least + 1, dtype=integers).view(matrix.dtype))


def _add_in_one_word(base: Tensor, rows: Rows, shares: Sequence[int], quantum: float, total: Tensor) -> None:
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
                return (
                    some
                    if some.dtype == like.dtype
                    else _widen(some, _scratch.matrix("wide", end - begin, like, like.dtype))
                )
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


def _terms(row: Tensor, share: int) -> Iterator[Tensor]:
    """`share * row` in terms that fp64 holds; each is overwritten by who takes it."""
    if row.dtype == torch.float64 and abs(share) != 1:
        high = torch.bitwise_and(row.view(torch.int64), ~SPLIT, out=_scratch("high", row, torch.int64))
        low = torch.sub(row, high.view(torch.float64), out=_scratch("low", row))
        yield high.view(torch.float64).mul_(share)
        yield low.mul_(share)
    else:
        yield _scratch("low", row).copy_(row).mul_(share)


def _two_sum(word: Tensor, term: Tensor) -> None:
    """Add `term` to `word`, and leave in `term` what that rounded away."""
    total = torch.add(word, term, out=_scratch("total", word))
    seen = torch.sub(total, word, out=_scratch("seen", word))
    term.sub_(seen)
    term.add_(word.sub_(torch.sub(total, seen, out=seen)))
    word.copy_(total)


def _settle(words: Words) -> None:
    """Move what the words hold upwards, until each is at most half a last bit of the one before."""
    moving = True
    while moving:
        moving = False
        for upper, lower in reversed(list(pairwise(words))):
            before = _scratch("before", upper).copy_(upper)
            _two_sum(upper, lower)
            moving |= bool(((before != upper) & upper.isfinite()).any())


def divide(words: Words, divisor: int | Tensor, out: torch.dtype, keep: bool = False) -> Tensor:
    """The sum of `words` (see `add_exactly`) over `divisor`, fit to be rounded once more, to `out`; in scratch.

    `divisor` is below `SHARES_LIMIT`. The result is fp64, or fp32 where that is enough. It may take the place of the
    sum, which stays in the cache so, unless that is to be kept.
    """
    by = divisor.to(words[0].dtype) if isinstance(divisor, Tensor) else divisor
    room = _scratch("quotient", words[0], words[0].dtype) if keep or len(words) > 1 else words[0]
    quotient = torch.div(words[0], by, out=room)
    if len(words) == 1:
        return quotient
    quotient.sub_(_excess(quotient, words, divisor).div_(divisor))
    if out != torch.float64:
        excess = _excess(quotient, words, divisor)
        bits = quotient.view(torch.int64)
        outward = (excess < 0) == (bits >= 0)
        bits.add_(torch.where(outward, 1, -1).mul_((excess != 0) & (bits & 1 == 0) & quotient.isfinite()))
    return quotient


def _excess(quotient: Tensor, words: Words, divisor: int | Tensor) -> Tensor:
    """`quotient * divisor` less the sum of `words`, of which the sign and all but the last bits are right."""
    high = torch.bitwise_and(quotient.view(torch.int64), ~SPLIT, out=_scratch("high", quotient, torch.int64))
    low = torch.sub(quotient, high.view(torch.float64), out=_scratch("low", quotient)).mul_(divisor)
    excess = high.view(torch.float64).mul_(divisor).sub_(words[0]).add_(low)
    for word in words[1:]:
        excess.sub_(word)
    return excess
