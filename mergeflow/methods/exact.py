"""Sums without rounding, and their quotients, which `rounding` rounds as if they were exact.

Why a sum can be exact. A finite value of a float format with p significant bits is an integer multiple of a
quantum: at least 2^-24 for every fp16, and 2^(e-p+1) for a row whose smallest nonzero magnitude lies in
[2^e, 2^(e+1)). Sums of multiples of q are multiples of q, and an accumulator with m bits holds every multiple of q
up to 2^m q. So as long as the magnitudes add up to less than 2^m q, no addition rounds, in any order:

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
import threading
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
SHORTEST_RUN = 3
"""Rows; adding fewer of them in fp32 first costs more than it saves."""
QUANTUM_ROWS = 4
"""Rows whose smallest magnitude is looked up together; few enough that they stay in a core's own cache."""
SPLIT = (1 << 27) - 1
"""Clearing 27 of 53 bits leaves a factor whose product with an integer below `SHARES_LIMIT` is exact in fp64."""


class Scratch(threading.local):
    """Buffers that every thread has once: what is allocated per call is what makes threads wait for each other."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """An uninitialised 1-D buffer of as many values as `like` has; the same memory for the same name."""
        count = like.numel()
        held = self._buffers.get((name, dtype))
        if held is None or len(held) < count:
            held = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
        return held[:count]


_scratch = Scratch()


def add_exactly(values: Sequence[Tensor], peaks: Sequence[float], shares: Sequence[int], out: torch.dtype) -> Words:
    """The sum of `share * value` over rows of finite values, without rounding, in one word or more.

    `values` are 1-D, of one length, each fp16, bf16, fp32 or fp64; `peaks` are their largest magnitudes; shares and
    their sum are below `SHARES_LIMIT`. `out` is what the mean will be rounded to. The sum is that of all words, the
    first of which is next to it. They live in this thread's scratch: they are gone with the next call.
    """
    bound = sum(peak * share for peak, share in zip(peaks, shares, strict=True))
    quantum = quantum_of(values)
    count, dtype = words_for(bound, quantum, len(values), [(out, sum(shares))])
    words = [_scratch(f"word {index}", values[0], dtype).zero_() for index in range(count)]
    add_to(words, values, peaks, shares, quantum, words)
    return words


def words_for(
    bound: float, quantum: float, additions: int, outs: Iterable[tuple[torch.dtype, int]]
) -> tuple[int, torch.dtype]:
    """How many words of which dtype it takes so that no addition loses anything.

    `bound` is what the magnitudes of all terms add up to, at most; `quantum` that of the terms. `outs` are the dtypes
    and divisors of the means that will be made of the sums.
    """
    if _fits(FP32_BITS, bound, quantum) and all(_may_divide_in_fp32(out, by, quantum) for out, by in outs):
        return 1, torch.float32
    if _fits(FP64_BITS, bound, quantum):
        return 1, torch.float64
    return _count(bound, quantum, additions), torch.float64


def add_to(
    base: Words, values: Sequence[Tensor], peaks: Sequence[float], shares: Sequence[int], quantum: float, total: Words
) -> None:
    """Make `total` the sum `base` and of `share * value` over all rows; it may be `base`, or other memory.

    The words are as many as `words_for` says, and the quantum is that of these rows or less.
    """
    if len(total) == 1:
        _add_runs(base[0], values, peaks, shares, quantum, total[0])
        return
    for before, word in zip(base, total, strict=True):
        if word is not before:
            word.copy_(before)
    for value, share in zip(values, shares, strict=True):
        for term in _terms(value, share):
            for word in total[:-1]:
                _two_sum(word, term)
            total[-1].add_(term)
    _settle(total)


def _fits(bits: int, bound: float, quantum: float) -> bool:
    """Whether multiples of `quantum` below `bound` are exact in so many bits."""
    return bound == 0 or math.log2(bound) - math.log2(quantum) + MARGIN_BITS < bits


def _may_divide_in_fp32(out: torch.dtype, divisor: int, quantum: float) -> bool:
    """See "Why the division may round too"; quotients must stay clear of fp32's own subnormals."""
    bits = SIGNIFICANT_BITS.get(out, 4)  # fp8 has fewer
    return bits <= 11 and divisor < 1 << (FP32_BITS - bits) and quantum >= 2.0**-100


def _count(bound: float, quantum: float, rows: int) -> int:
    """How many words it takes so that no addition loses anything."""
    excess = math.log2(bound) - math.log2(quantum) + MARGIN_BITS - FP64_BITS
    per_word = FP64_BITS - math.log2(2 * rows)
    return min(2 + math.floor(min(excess / per_word, MOST_WORDS)), MOST_WORDS)


def quantum_of(values: Sequence[Tensor]) -> float:
    """A power of two of which every value is a multiple; infinite if all are 0."""
    least = math.inf
    for dtype, rows in groupby(values, key=lambda row: row.dtype):
        if dtype == torch.float16:
            least = min(least, FP16_QUANTUM)  # worth no look: some value is nearly always that small
            continue
        for run in _stacks(list(rows), QUANTUM_ROWS):
            least = min(least, _looked_up(run))
    return least


def _looked_up(rows: Tensor) -> float:
    """The quantum of the smallest nonzero magnitude in a matrix."""
    integers = INTEGER_VIEW[rows.element_size()]
    mask = torch.iinfo(integers).max
    room = _scratch("magnitudes", rows, integers)[: rows.numel()].view(rows.shape)
    magnitudes = torch.bitwise_and(rows.view(integers), mask, out=room)
    # Zero has every quantum: less one, it becomes the largest magnitude of all.
    least = int(magnitudes.sub_(1).bitwise_and_(mask).amin())
    if least == mask:
        return math.inf
    info = torch.finfo(rows.dtype)
    exponent = (least + 1) >> (SIGNIFICANT_BITS[rows.dtype] - 1)
    return math.ldexp(info.smallest_normal * info.eps, max(exponent - 1, 0))


def _add_runs(
    base: Tensor, values: Sequence[Tensor], peaks: Sequence[float], shares: Sequence[int], quantum: float, total: Tensor
) -> None:
    """Make `total` the sum of `base` and the rows, of which it is known that no addition in its dtype rounds.

    Rows of equal shares are added in fp32 first as far as that is exact, because it is several times faster.
    """
    index = 0
    while index < len(values):
        end = _run(peaks, shares, index, quantum)
        if end - index < SHORTEST_RUN and total.dtype != torch.float32:
            end = index + 1
        for run in _stacks(values[index:end], end - index):
            base = torch.add(base, _part(run), alpha=shares[index], out=total)
        index = end


def _part(run: Tensor) -> Tensor:
    """The sum of the rows of a matrix, which fp32 holds if there are several."""
    if len(run) == 1 and run.dtype != torch.float16:
        return run[0]
    part = _scratch("part", run[0], torch.float32)
    # A lone row of fp16 goes by way of fp32, too: that takes torch half the time.
    return part.copy_(run[0]) if len(run) == 1 else torch.sum(run, 0, dtype=torch.float32, out=part)


def _run(peaks: Sequence[float], shares: Sequence[int], start: int, quantum: float) -> int:
    """The end of the longest run of equal shares whose magnitudes add up to what fp32 holds exactly; at least one."""
    limit = math.ldexp(quantum, FP32_BITS) * (1 - MARGIN_BITS)
    total = 0.0
    end = start
    while end < len(peaks) and shares[end] == shares[start]:
        total += peaks[end]
        if total >= limit and end > start:
            break
        end += 1
    return end


def _stacks(rows: Sequence[Tensor], most: int) -> Iterator[Tensor]:
    """The rows as matrices of at most `most` rows, without a copy: neighbours of one dtype in evenly spaced memory."""
    first = 0
    while first < len(rows):
        row = rows[first]
        place = row.data_ptr()
        step = max(rows[first + 1].data_ptr() - place, 0) if first + 1 < len(rows) else 0
        last = first
        while (
            step > 0
            and last + 1 < len(rows)
            and last + 2 - first <= most
            and rows[last + 1].dtype == row.dtype
            and rows[last + 1].stride() == row.stride()
            and rows[last + 1].data_ptr() - place == step * (last + 1 - first)
            and rows[last + 1].untyped_storage().data_ptr() == row.untyped_storage().data_ptr()
        ):
            last += 1
        yield row.as_strided((last + 1 - first, len(row)), (step // row.element_size(), row.stride(0)))
        first = last + 1


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
