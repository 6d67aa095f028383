"""How far two values are apart in units in the last place, and how many are how far.

The values of a float dtype are numbered in their order, with one number for both zeros; the distance is the difference
of these numbers, so neighbours are 1 apart, and infinity is one beyond the largest. Two float dtypes are measured in
the one with fewer significant bits (fp32 and fp16 in fp16, fp16 and bf16 in bf16): both are rounded to it, and what is
too large for it counts as its largest. So a file and its fp16 copy are 0 ULP apart although their values differ. An
integer is rounded to the float dtype that it is compared with; between integers a ULP is 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mergeflow.execute.block import torch_dtype
from mergeflow.methods.exact import INTEGER_VIEW
from mergeflow.methods.rounding import round_into
from mergeflow.methods.scratch import Scratch
from mergeflow.tensors import LAYOUT_ORDER, Dtype

if TYPE_CHECKING:
    from torch import Tensor

BOUNDS = (0, *(1 << power for power in range(33)))
"""The largest distance in each bin of a histogram; one more bin takes what is beyond the last."""
BINS = len(BOUNDS) + 1
FURTHEST = torch.iinfo(torch.int64).max
"""ULP; what is further apart, as only values of 64 bits can be, counts as this far (so do differences of integers)."""
SIGNIFICANT_BITS = {
    Dtype.F64: 53,
    Dtype.F32: 24,
    Dtype.F16: 11,
    Dtype.BF16: 8,
    Dtype.F8_E4M3: 4,
    Dtype.F8_E4M3FNUZ: 4,
    Dtype.F8_E5M2: 3,
    Dtype.F8_E5M2FNUZ: 3,
}
FP64_FRACTION_BITS = 52
HALF_EXPONENT = 1022
"""The biased exponent of 0.5 in fp64."""

_scratch = Scratch()


def ulp_dtype(a: Dtype, b: Dtype) -> Dtype | None:
    """The float dtype in whose ULP values of these dtypes are measured; None for integers, where a ULP is 1."""
    floats = [dtype for dtype in (a, b) if dtype.is_float]
    return min(floats, key=lambda dtype: (SIGNIFICANT_BITS[dtype], LAYOUT_ORDER[dtype]), default=None)


def ulp_distance(a: Tensor, b: Tensor, unit: Dtype | None) -> Tensor:
    """How many ULP of `unit` lie between the elements, as int32 or int64; meaningless where one is not finite."""
    if unit is None:
        return _integer_distance(a, b)
    one, other = _ordered(_rounded(a, unit)), _ordered(_rounded(b, unit))
    return one.sub_(other).abs_() if one.dtype == torch.int32 or unit is Dtype.F32 else _apart(one, other)


def histogram_of(distance: Tensor) -> list[int]:
    """How many of the distances (integers, not negative) fall into each bin."""
    # Less a half, the distances of one bin are the numbers of one binade, and 0 becomes negative.
    shifted = _scratch("shifted", distance).copy_(distance).sub_(0.5).view(torch.int64)
    index = shifted.bitwise_right_shift_(FP64_FRACTION_BITS).sub_(HALF_EXPONENT - 1).clamp_(0, BINS - 1)
    counts: list[int] = torch.bincount(index, minlength=BINS).tolist()
    return counts


def _rounded(values: Tensor, unit: Dtype) -> Tensor:
    """The values in the dtype of `unit`: to nearest, ties to even, and no further than its largest."""
    dtype = torch_dtype(unit)
    if values.dtype == dtype:
        return values
    exact = torch.float32 if values.is_floating_point() and values.element_size() < 8 else torch.float64
    limit = torch.finfo(dtype).max
    out = torch.empty(len(values), dtype=dtype)
    round_into(values.to(exact).clamp(-limit, limit), out)
    return out


def _ordered(values: Tensor) -> Tensor:
    """The bits of floats as integers in the order of the values, both zeros as 0; in int32 for up to 16 bits."""
    bits = values.view(INTEGER_VIEW[values.element_size()])
    largest = torch.iinfo(bits.dtype).max
    bits = bits.to(torch.int32 if bits.element_size() <= 2 else torch.int64)
    sign = bits >> (8 * bits.element_size() - 1)  # -1 for what is negative, 0 otherwise
    return (sign & largest).bitwise_xor_(bits).sub_(sign)


def _integer_distance(a: Tensor, b: Tensor) -> Tensor:
    one, other = a.to(torch.int64), b.to(torch.int64)  # what is 2^63 or more in U64 becomes negative
    if a.dtype == b.dtype == torch.uint64:
        lowest = torch.iinfo(torch.int64).min
        return _apart(one ^ lowest, other ^ lowest)
    distance = _apart(one, other)
    for dtype, values in ((a.dtype, one), (b.dtype, other)):
        if dtype == torch.uint64:
            distance.masked_fill_(values < 0, FURTHEST)
    return distance


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """How far int64 values are apart, up to `FURTHEST`."""
    distance = torch.maximum(one, other).sub_(torch.minimum(one, other))
    return distance.masked_fill_(distance < 0, FURTHEST)  # 2^63 and more have wrapped around
