"""Steps carried out by numpy, by integers and by fractions: what `Pairwise` is judged by; and rows to try it on.

Nothing in what it is judged by uses torch's arithmetic or conversions. torch only carries the bits.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from mergeflow.tensors import Dtype
from tests.methods.reference import BITS, FP32, from_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeflow.interfaces import Step

Array: TypeAlias = NDArray[Any]
TORCH = {dtype: getattr(torch, dtype.torch_name) for dtype in Dtype}
DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH.items()}
NATIVE = {Dtype.F16: np.float16, Dtype.F32: np.float32, Dtype.F64: np.float64}
CUT_BITS = 45
"""What fp64 has more of than bf16 in its significand."""
BF16_SMALLEST_NORMAL, BF16_QUANTUM = 2.0**-126, 2.0**-133


class Vector(NamedTuple):
    """Values and what they are held in; bf16, which numpy does not have, as the fp32 values that it shares."""

    dtype: Dtype
    values: Array


def carried_out(steps: Sequence[Step], rows: Sequence[Tensor], out: torch.dtype) -> Tensor:
    """What the last of `steps` makes of `rows`, in `out`."""
    registers: dict[int, Vector] = {}
    given = [_vector(row) for row in rows]
    with np.errstate(all="ignore"):
        for step in steps:
            operands = [given[place] if place >= 0 else registers[-1 - place] for place in step.operands]
            registers[step.into] = _step(step, operands)
        return _tensor(_rounded(registers[steps[-1].into].values, DTYPES[out]))


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two rows of one dtype have the same bits, signs of zero included, where any NaN is as good as another."""
    if one.dtype != other.dtype or not torch.equal(one.isnan(), other.isnan()):
        return False
    differ = one.view(BITS[one.element_size()]) != other.view(BITS[one.element_size()])
    return not bool((differ & ~one.isnan()).any())


def _step(step: Step, operands: Sequence[Vector]) -> Vector:
    held = {step.dtype, *(operand.dtype for operand in operands)}
    computed = np.dtype(np.float64 if Dtype.F64 in held and step.operation != "lerp" else np.float32)
    wide: list[Array] = [operand.values.astype(computed) for operand in operands]
    x, *rest = wide
    made: Array
    if step.operation == "scale":
        made = x * np.array(step.factor, computed)
    elif step.operation == "round":
        made = x
    elif step.operation == "add":
        made = x + rest[0]
    elif step.operation == "subtract":
        made = x - rest[0]
    else:
        made = _lerp(x, rest[0], np.float32(step.factor))
    assert made.dtype == computed
    return _rounded(made, step.dtype)


def _lerp(x: Array, y: Array, factor: np.float32) -> Array:
    difference = y - x
    if abs(factor) < 0.5:
        return fused_multiply_add(factor, difference, x)
    return fused_multiply_add(factor - np.float32(1), difference, y)


def fused_multiply_add(factor: np.float32, x: Array, y: Array) -> Array:
    """`factor * x + y` in fp32, rounded once."""
    near = np.float64(factor) * x.astype(np.float64) + y.astype(np.float64)  # right about zeros, infinity and NaN
    made = [
        _once(Fraction(float(factor)) * Fraction(float(one)) + Fraction(float(other)), rough)
        if np.isfinite(rough)
        else rough
        for one, other, rough in zip(x, y, near, strict=True)
    ]
    return np.array(made, dtype=np.float32)


def _once(value: Fraction, rough: np.float64) -> float:
    rounded = FP32.rounded(value) if value else float(rough)
    return float(np.copysign(float(rounded), rough))


def _rounded(values: Array, dtype: Dtype) -> Vector:
    """fp32 or fp64 values, or such as are held in a 16-bit dtype, rounded once to `dtype`."""
    return Vector(dtype, _bf16(values) if dtype is Dtype.BF16 else values.astype(NATIVE[dtype]))


def _bf16(values: Array) -> Array:
    wide = values.astype(np.float64)
    bits = wide.view(np.uint64)
    half, last = np.uint64((1 << (CUT_BITS - 1)) - 1), (bits >> np.uint64(CUT_BITS)) & np.uint64(1)
    normal = ((bits + half + last) >> np.uint64(CUT_BITS) << np.uint64(CUT_BITS)).view(np.float64)
    made = np.where(np.abs(wide) < BF16_SMALLEST_NORMAL, np.rint(wide / BF16_QUANTUM) * BF16_QUANTUM, normal)
    return np.where(np.isnan(wide), np.nan, made).astype(np.float32)


def _vector(row: Tensor) -> Vector:
    if row.dtype == torch.bfloat16:
        bits = row.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        return Vector(Dtype.BF16, (bits << np.uint32(16)).view(np.float32))
    return Vector(DTYPES[row.dtype], row.contiguous().numpy())


def _tensor(vector: Vector) -> Tensor:
    values = np.ascontiguousarray(vector.values)
    if vector.dtype is Dtype.BF16:
        bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(np.int16)
        return torch.from_numpy(bits).view(torch.bfloat16)
    return torch.from_numpy(values)


# --- rows -----------------------------------------------------------------------------------------------------------


def f32(value: float) -> float:
    """`value` rounded to fp32."""
    return float(np.float32(value))


def f16(value: float) -> float:
    """`value` rounded to fp16."""
    return float(np.float16(value))


def bits(dtype: Dtype, *hexadecimal: str) -> Tensor:
    """The values whose bits, as they are written, are these."""
    return from_bits(b"".join(bytes.fromhex(word)[::-1] for word in hexadecimal), TORCH[dtype])


def as_hex(row: Tensor) -> list[str]:
    """The bits of every value, as they are written."""
    integers = row.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[row.element_size()]).tolist()
    return [f"{word % (1 << 8 * row.element_size()):0{2 * row.element_size()}x}" for word in integers]


def every(dtype: Dtype) -> Tensor:
    """Every bit pattern of 16 bits."""
    return torch.arange(-(2**15), 2**15).short().view(TORCH[dtype])


def shuffled(row: Tensor, seed: int) -> Tensor:
    """The same values in another order."""
    return row[torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))]


def some_of(dtype: Dtype, count: int, seed: int) -> Tensor:
    """Any bits, half of them bent to the size of weights, and then what is special in this dtype or another."""
    generator = torch.Generator().manual_seed(seed)
    torch_dtype = TORCH[dtype]
    if not dtype.is_float:
        raw = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) >> (torch.arange(count) % 60)
        edges = torch.tensor([0, 1, -1, 76, 2**24 + 1, 2**24 + 3, 2**53 + 1, 2**62 + 2**38 + 1, 2**63 - 1, -(2**63)])
        return torch.cat([raw, edges]).to(torch_dtype)
    size = dtype.itemsize
    raw = torch.randint(0, 256, (count // 2 * size,), generator=generator, dtype=torch.uint8).view(torch_dtype)
    weights = (torch.randn(count - count // 2, generator=generator, dtype=torch.float64) * 0.05).to(torch_dtype)
    special = [0.0, 1.0, 65504.0, 65519.0, 65520.0, 3.4e38, 1.7e308, math.inf, math.nan]
    special += [mantissa * 2.0**e for e in (-10, -13, -14, -24, -25, -126, -133, -149, -1074) for mantissa in (1, 3)]
    row = torch.tensor([*special, *(-value for value in special)], dtype=torch.float64).to(torch_dtype)
    return torch.cat([shuffled(torch.cat([raw, weights]), seed), row])
