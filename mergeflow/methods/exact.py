"""Sums without rounding, and the one rounding at the end.

Why a sum can be exact. A finite value of a float format with p significant bits is an integer multiple of a
quantum: at least 2^-24 for every fp16, and 2^(e-p+1) for a row whose smallest nonzero magnitude lies in
[2^e, 2^(e+1)). Sums of multiples of q are multiples of q, and an accumulator with m bits holds every multiple of q
up to 2^m q. So as long as the magnitudes add up to no more than 2^m q, no addition rounds, in any order:

    fp16 rows in fp32  (m = 24): exact while the magnitudes add up to at most 1
    fp16 rows in fp64  (m = 53): exact up to 2^29, that is for 8,192 models at the very edge of fp16
    other rows in fp64 (m = 53): exact if the spread of the magnitudes allows it, which is looked up
    anything else: hi + lo, where lo gathers what every addition to hi rounds away (TwoSum, Knuth, TAOCP 4.2.2)

Why one rounding is enough. torch converts fp64 to fp16 or bf16 by way of fp32, which rounds twice. Rounding to odd
first (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008) makes the second rounding right: the
last bit kept is set whenever anything nonzero was cut off, so no tie can be made or lost.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FP16_QUANTUM = 2.0**-24
FP32_BITS, FP64_BITS = 24, 53
SIGNIFICANT_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}
INTEGER_VIEW = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALLEST_GROUP = 4
"""Rows; adding fewer of them in fp32 first costs more than it saves."""
CUT_BITS = FP64_BITS - FP32_BITS
CUT = (1 << CUT_BITS) - 1
SPLIT = (1 << 27) - 1
"""Clearing 27 of 53 bits leaves a factor whose product with an integer below 2^26 is exact in fp64."""
BF16_SMALLEST_NORMAL, BF16_QUANTUM = 2.0**-126, 2.0**-133


class Sum(NamedTuple):
    """`hi + lo`: an exact sum, one value per element. `lo` is None when hi alone is exact."""

    hi: Tensor
    lo: Tensor | None


class Scratch(threading.local):
    """Buffers that every thread has once: what is allocated per call is what makes threads wait for each other."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """An uninitialised 1-D buffer as long as `like`; the same memory for the same name."""
        held = self._buffers.get((name, dtype))
        if held is None or len(held) < len(like):
            held = self._buffers[name, dtype] = torch.empty(len(like), dtype=dtype)
        return held[: len(like)]


_scratch = Scratch()


def exact_sum(values: Sequence[Tensor], peaks: Sequence[float], shares: Sequence[int]) -> Sum:
    """The sum of `share * value` over rows of finite values, without rounding.

    `values` are 1-D, of one length, each fp16, bf16, fp32 or fp64; `peaks` are their largest magnitudes. The result
    is fp64 and lives in this thread's scratch: it is gone with the next call.
    """
    bound = math.fsum(peak * share for peak, share in zip(peaks, shares, strict=True))
    quantum = min((_quantum(value) for value in values), default=1.0)
    hi = _scratch("hi", values[0]).fill_(-0.0)  # the neutral element of addition: 0 + -0.0 would lose a sign
    if bound <= math.ldexp(quantum, FP64_BITS):
        _add_exactly(hi, values, peaks, shares)
        return Sum(hi, None)
    lo = _scratch("lo", hi).zero_()
    for value, share in zip(values, shares, strict=True):
        _add_with_error(hi, lo, value, share)
    return Sum(hi, lo)


def _quantum(row: Tensor) -> float:
    """A power of two of which every value of `row` is a multiple; looked up where the dtype alone tells too little."""
    if row.dtype == torch.float16:
        return FP16_QUANTUM
    integers = INTEGER_VIEW[row.element_size()]
    mask = torch.iinfo(integers).max
    magnitudes = torch.bitwise_and(row.view(integers), mask, out=_scratch("magnitudes", row, integers))
    # Zero has every quantum: less one, it becomes the largest magnitude of all.
    least = magnitudes.sub_(1).bitwise_and_(mask).amin().add_(1).view(row.dtype).item()
    if not math.isfinite(least):
        return 1.0
    smallest_normal = torch.finfo(row.dtype).smallest_normal
    exponent = math.frexp(max(least, smallest_normal))[1] - 1
    return max(math.ldexp(1.0, exponent - SIGNIFICANT_BITS[row.dtype] + 1), 5e-324)


def _add_exactly(hi: Tensor, values: Sequence[Tensor], peaks: Sequence[float], shares: Sequence[int]) -> None:
    """Add rows of which it is known that no addition rounds; runs of fp16 rows go through fp32, which is faster."""
    part = _scratch("part", hi, torch.float32)
    index = 0
    while index < len(values):
        end = _run(values, peaks, shares, index)
        if end - index < SMALLEST_GROUP:
            hi.add_(values[index], alpha=shares[index])
            index += 1
            continue
        part.copy_(values[index])
        for row in values[index + 1 : end]:
            part.add_(row)
        hi.add_(part, alpha=shares[index])
        index = end


def _run(values: Sequence[Tensor], peaks: Sequence[float], shares: Sequence[int], start: int) -> int:
    """The end of the longest run of fp16 rows with one share whose magnitudes add up to at most 1."""
    limit = math.ldexp(FP16_QUANTUM, FP32_BITS)
    total = 0.0
    end = start
    while end < len(values) and values[end].dtype == torch.float16 and shares[end] == shares[start]:
        total += peaks[end]
        if total > limit:
            break
        end += 1
    return end


def _add_with_error(hi: Tensor, lo: Tensor, row: Tensor, share: int) -> None:
    """`hi + lo += share * row`; what the addition to `hi` rounds away goes to `lo`."""
    if row.dtype == torch.float64 and share != 1:
        high = _scratch("high", hi)
        torch.bitwise_and(row.view(torch.int64), ~SPLIT, out=high.view(torch.int64))
        low = torch.sub(row, high, out=_scratch("low", hi)).mul_(share)
        _two_sum(hi, lo, high.mul_(share))
        _two_sum(hi, lo, low)
    else:
        _two_sum(hi, lo, _scratch("high", hi).copy_(row).mul_(share))


def _two_sum(hi: Tensor, lo: Tensor, term: Tensor) -> None:
    total = torch.add(hi, term, out=_scratch("total", hi))
    seen = torch.sub(total, hi, out=_scratch("seen", hi))
    error = torch.sub(total, seen, out=_scratch("error", hi))
    torch.sub(hi, error, out=error)
    lo.add_(error.add_(torch.sub(term, seen, out=seen)))
    hi.copy_(total)


def divide_into(sum: Sum, divisor: int | Tensor, out: Tensor, *, direct: bool) -> None:
    """Write `sum / divisor`, rounded once to the dtype of `out` (ties to even).

    `divisor` is below 2^26. `direct` says that every row was fp16 and that the divisor is at most 8,192: then the
    fp64 quotient is right up to its last bit and cannot lie on a tie unless the exact quotient does. (Quotients that
    are no tie differ from one by at least 2^-25 / 8,192, and from their fp64 rounding by at most 2^-38.)
    """
    hi, lo = sum
    quotient = torch.div(hi, divisor, out=_scratch("quotient", hi))
    if not direct and out.dtype != torch.float64:
        _to_odd(quotient, hi, lo, divisor)
    round_into(quotient, out)


def _to_odd(quotient: Tensor, hi: Tensor, lo: Tensor | None, divisor: int | Tensor) -> None:
    """Turn `quotient`, the nearest fp64, into (hi + lo) / divisor rounded to odd, by the sign of the remainder."""
    bits = quotient.view(torch.int64)
    high = _scratch("high", hi)
    torch.bitwise_and(bits, ~SPLIT, out=high.view(torch.int64))
    low = torch.sub(quotient, high, out=_scratch("low", hi)).mul_(divisor)
    remainder = torch.sub(hi, high.mul_(divisor), out=_scratch("total", hi)).sub_(low)
    if lo is not None:
        remainder.add_(lo)
    outward = (remainder > 0) == (quotient > 0)
    step = torch.where(outward, 1, -1).mul_((remainder != 0) & (bits & 1 == 0) & quotient.isfinite())
    bits.add_(step)


def round_into(value: Tensor, out: Tensor) -> None:
    """Write fp64 `value` into `out`, rounded once to its dtype (ties to even). `value` is overwritten."""
    if out.dtype in (torch.float32, torch.float64):
        out.copy_(value)
        return
    if out.dtype == torch.bfloat16:
        _settle_bf16_subnormals(value)
    bits = value.view(torch.int64)
    sticky = torch.bitwise_and(bits, CUT, out=_scratch("sticky", value, torch.int64)).add_(CUT)
    bits.bitwise_or_(sticky).bitwise_and_(~CUT)
    out.copy_(_scratch("part", value, torch.float32).copy_(value))


def _settle_bf16_subnormals(value: Tensor) -> None:
    """Round what is subnormal in bf16 here: fp32 is subnormal there too and would round a first time."""
    tiny = value.abs() < BF16_SMALLEST_NORMAL
    if bool(tiny.any()):
        magic = math.ldexp(1.5 * BF16_QUANTUM, FP64_BITS - 1)
        value.copy_(torch.where(tiny, ((value + magic) - magic).copysign(value), value))
