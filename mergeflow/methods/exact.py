"""Sums without rounding, and their quotients, which `rounding` rounds as if they were exact.

`compiled` makes nearly all means. This is for what it leaves: sums of which two words of fp64 do not suffice, means of
what is finite among values that are not, and results in fp8.

Why a sum can be exact. A finite value of a float format with p significant bits is an integer multiple of a quantum:
at least 2^-24 for every fp16, and 2^(e-p+1) for a row whose smallest nonzero magnitude lies in [2^e, 2^(e+1)). Sums of
multiples of q are multiples of q, and fp64 holds every multiple of q up to 2^53 q. So as long as the magnitudes add up
to less, no addition rounds, in any order. Shares are integers: a share times a row is a multiple of q, too, and no
more than the sum, so no product rounds either. Otherwise there are several words, each of which takes what every
addition to the one before rounds away (TwoSum, Knuth, TAOCP 4.2.2). What n additions to a word of magnitude B round
away adds up to at most n 2^-53 B, so the spread of the magnitudes tells how many words there must be for the last one
to add without rounding.

Why the division may round too. Let S be a sum in one word of m bits, a multiple of q with |S| < 2^m q; D < 2^(m-p) the
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
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from mergeflow.methods.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.interfaces import Rows

Words: TypeAlias = Sequence[Tensor]
"""A sum, one value per element, as the sum of several rows."""

FP16_QUANTUM = 2.0**-24
FP64_BITS = 53
MARGIN_BITS = 1e-6
"""What the bookkeeping of magnitudes may itself have rounded, and far more."""
SIGNIFICANT_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
INTEGER_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MOST_WORDS = 8
"""Enough for any values that fp32 and bf16 have; fp64 rows that span more than 2^350 in one place may round before."""
SPLIT = (1 << 27) - 1
"""Clearing 27 of 53 bits leaves a factor whose product with an integer below `SHARES_LIMIT` is exact in fp64."""


_scratch = Scratch()


def add_exactly(rows: Rows, shares: Sequence[int]) -> Words:
    """The sum of `share * row` over rows of finite values, without rounding, in one word of fp64 or more.

    The rows are fp16, bf16, fp32 or fp64; shares and their sum are below `SHARES_LIMIT`. The sum is that of all words,
    the first of which is next to it. They live in this thread's scratch: they are gone with the next call.
    """
    count = _words_for(bound_of(rows.peaks, shares), _quantum_of(rows), len(shares))
    like = rows.matrices[0][0]
    words = [_scratch(f"word {index}", like).zero_() for index in range(count)]
    for value, share in zip(rows.values, shares, strict=True):
        for term in _terms(value, share):
            for word in words[:-1]:
                _two_sum(word, term)
            words[-1].add_(term)
    _settle(words)
    return words


def bound_of(peaks: Sequence[float], shares: Sequence[int]) -> float:
    """What no sum of the rows exceeds, in whatever order."""
    return float(sum(map(operator.mul, peaks, shares)))


def _words_for(bound: float, quantum: float, additions: int) -> int:
    """How many words it takes so that no addition loses anything.

    `bound` is what the magnitudes of all terms add up to, at most; `quantum` that of the terms.
    """
    if bound == 0:
        return 1
    excess = math.log2(bound) - math.log2(quantum) + MARGIN_BITS - FP64_BITS
    if excess < 0:
        return 1
    per_word = FP64_BITS - math.log2(2 * additions)
    return min(2 + math.floor(min(excess / per_word, MOST_WORDS)), MOST_WORDS)


def _quantum_of(rows: Rows) -> float:
    """A power of two of which every value is a multiple; infinite if all are 0."""
    least = math.inf
    for matrix in rows.matrices:
        if matrix.dtype == torch.float16:
            least = min(least, FP16_QUANTUM)  # worth no look: some value is nearly always that small
        else:
            least = min(least, _quantum(_smallest_magnitude(matrix), matrix.dtype))
    return least


def _quantum(magnitude: float, dtype: torch.dtype) -> float:
    """Of what values of `dtype` are multiples that are not below `magnitude`, or 0."""
    if magnitude == math.inf:
        return math.inf
    info = torch.finfo(dtype)
    _, exponent = math.frexp(max(magnitude, info.smallest_normal))
    return math.ldexp(1.0, max(exponent - SIGNIFICANT_BITS[dtype], -1074))


def _smallest_magnitude(matrix: Tensor) -> float:
    """That of all values that are not 0; infinite if there are none."""
    integers = INTEGER_VIEW[matrix.element_size()]
    mask = torch.iinfo(integers).max
    least = mask
    for row in matrix.view(integers) if matrix.stride(-1) == 1 else matrix.contiguous().view(integers):
        magnitudes = torch.bitwise_and(row, mask, out=_scratch("magnitudes", row, integers))
        # Zero is no magnitude that counts: less one, it becomes the largest of all.
        least = min(least, int(magnitudes.sub_(1).bitwise_and_(mask).amin()))
    return math.inf if least == mask else float(torch.tensor(least + 1, dtype=integers).view(matrix.dtype))


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


def divide(words: Words, divisor: int | Tensor, out: torch.dtype) -> Tensor:
    """The sum of `words` (see `add_exactly`) over `divisor`, fit to be rounded once more, to `out`; fp64, in scratch.

    `divisor` is below `SHARES_LIMIT`.
    """
    if len(words) == 1:
        return words[0].div_(divisor)
    quotient = torch.div(words[0], divisor, out=_scratch("quotient", words[0]))
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
