"""The one rounding at the end.

torch converts fp64 to fp16 or bf16 by way of fp32, which rounds twice. Rounding to odd first (Boldo and Melquiond,
"Emulation of FMA and correctly rounded sums", 2008) makes the conversion right: the last bit kept is set whenever
anything nonzero was cut off, so no tie can be made or lost.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from mergeflow.methods.exact import FP64_BITS
from mergeflow.methods.scratch import Scratch

if TYPE_CHECKING:
    from torch import Tensor

FP32_BITS = 24
CUT_BITS = FP64_BITS - FP32_BITS
CUT = torch.tensor((1 << CUT_BITS) - 1)
KEPT = ~CUT
"""Tensors, which torch takes faster than numbers."""
BF16_SMALLEST_NORMAL, BF16_QUANTUM = 2.0**-126, 2.0**-133
E4M3_ROUNDS_TO_LARGEST = 464.0
"""Above this a value is beyond `float8_e4m3fn`, which has no infinity; some versions of torch make 448 of it."""

_scratch = Scratch()


def round_into(value: Tensor, out: Tensor) -> None:
    """Write `value`, fp64 or fp32, into `out`, rounded once to its dtype (ties to even). `value` is overwritten."""
    if out.dtype in (torch.float32, torch.float64):
        out.copy_(value)
        return
    if value.dtype == torch.float32:
        _narrow_into(value, out)
        return
    if out.dtype == torch.bfloat16:
        _settle_bf16_subnormals(value)
    bits = value.view(torch.int64)
    sticky = torch.bitwise_and(bits, CUT, out=_scratch("sticky", value, torch.int64)).add_(CUT)
    bits.bitwise_or_(sticky).bitwise_and_(KEPT)
    _narrow_into(_scratch("part", value, torch.float32).copy_(value), out)


def _narrow_into(value: Tensor, out: Tensor) -> None:
    if out.dtype == torch.float8_e4m3fn:
        value.masked_fill_(value.abs() > E4M3_ROUNDS_TO_LARGEST, math.nan)
    out.copy_(value)


def _settle_bf16_subnormals(value: Tensor) -> None:
    """Round what is subnormal in bf16 here: fp32 is subnormal there too and would round a first time."""
    tiny = value.abs() < BF16_SMALLEST_NORMAL
    if bool(tiny.any()):
        magic = math.ldexp(1.5 * BF16_QUANTUM, FP64_BITS - 1)
        value.copy_(torch.where(tiny, ((value + magic) - magic).copysign(value), value))
