"""What a merge by hand makes of one tensor, with every rounding that the tools do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.byhand.floats import (
    FLOATS,
    INTEGERS,
    STORED,
    Tensor,
    as_float32,
    as_float64,
    converted,
    fused_multiply_add,
    quantised,
    rounded,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.byhand.floats import Array, Scalars

    Operation = Callable[[Array, Array], Array]


def weighted_sum(a: Tensor, b: Tensor, m: float, scalars: Scalars) -> Tensor:
    """`((1 - M) * A) + (M * B)`: three operations, each rounded to the dtype that torch gives its result."""
    return _combined(scaled(a, 1 - m, scalars), scaled(b, m, scalars), np.add)


def add_difference(a: Tensor, b: Tensor, c: Tensor | None, m: float, scalars: Scalars) -> Tensor:
    """`A + (M * (B - C))`; where C lacks the tensor, the difference is nothing, rather than all of B."""
    difference = Tensor(b.dtype, np.zeros_like(b.values)) if c is None else _combined(b, c, np.subtract)
    return _combined(a, scaled(difference, m, scalars), np.add)


def to_half(value: Tensor, enable: bool = True) -> Tensor:
    """What "save as float16" does: only fp32 becomes fp16, everything else is left alone."""
    return converted(value, "F16") if enable and value.dtype == "F32" else value


def comfyui(a: Tensor, b: Tensor, m: float) -> Tensor:
    """ComfyUI's sum, whose ratio is the share of A: in fp32 without another rounding, and left in it."""
    ratio = 1.0 - m
    return _unrounded(a, b, np.float32(ratio), np.float32(1.0 - ratio), as_float32)


def float32(a: Tensor, b: Tensor, m: float) -> Tensor:
    """The weighted sum in fp32, left in it."""
    return _unrounded(a, b, np.float32(1 - m), np.float32(m), as_float32)


def float64(a: Tensor, b: Tensor, m: float) -> Tensor:
    """The weighted sum in fp64, left in it."""
    return _unrounded(a, b, np.float64(1 - m), np.float64(m), as_float64)


@np.errstate(all="ignore")
def supermerger(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Supermerger's "weight sum": at 0 or 1 A or B itself, else torch's lerp in fp32, rounded to the dtype of A."""
    _agree(a, b)
    if alpha in (0, 1):
        return b if alpha == 1 else a
    if a.dtype not in FLOATS:
        raise ValueError(f"there is no lerp of {a.dtype}")
    start, end, weight = as_float32(a), as_float32(b), np.float32(alpha)
    way = np.asarray(end - start)
    if abs(weight) < 0.5:
        merged = fused_multiply_add(weight, way, start)
    else:
        merged = fused_multiply_add(np.float32(weight - np.float32(1)), way, end)
    return rounded(merged, a.dtype)


def scaled(value: Tensor, scalar: float, scalars: Scalars) -> Tensor:
    """A tensor times a Python float; integers become fp32."""
    dtype = "F32" if value.dtype in INTEGERS else value.dtype
    widened = as_float64(value) if dtype == "F64" else as_float32(value)
    with np.errstate(all="ignore"):
        return rounded(np.asarray(widened * quantised(scalar, dtype, scalars)), dtype)


def _combined(x: Tensor, y: Tensor, operation: Operation) -> Tensor:
    """Two tensors of one shape, in the dtype that torch promotes them to."""
    _agree(x, y)
    dtype = _promoted(x.dtype, y.dtype)
    with np.errstate(all="ignore"):
        if dtype in INTEGERS:
            stored = STORED[dtype]
            return Tensor(dtype, np.asarray(operation(x.values.astype(stored), y.values.astype(stored))))
        widened = as_float64 if dtype == "F64" else as_float32
        return rounded(np.asarray(operation(widened(converted(x, dtype)), widened(converted(y, dtype)))), dtype)


def _promoted(x: str, y: str) -> str:
    """Floats beat integers however wide, the wider float beats the narrower, and of fp16 and bf16 neither beats."""
    floats = {x, y} & set(FLOATS)
    if len(floats) == 2:
        return "F64" if "F64" in floats else "F32"
    if floats:
        return floats.pop()
    wider = np.promote_types(STORED[x], STORED[y])
    if wider.kind not in "iu" or {x, y} - set(INTEGERS) or "BOOL" in (x, y):
        raise ValueError(f"torch does not subtract {x} and {y}")
    return next(name for name in INTEGERS if STORED[name] == wider)


def _unrounded(
    a: Tensor,
    b: Tensor,
    first: np.floating[Any],
    second: np.floating[Any],
    widened: Callable[[Tensor], Array],
) -> Tensor:
    _agree(a, b)
    with np.errstate(all="ignore"):
        merged = np.asarray(first * widened(a) + second * widened(b))
    return Tensor("F64" if merged.dtype == np.float64 else "F32", merged)


def _agree(a: Tensor, b: Tensor) -> None:
    if a.values.shape != b.values.shape:
        raise ValueError(f"shapes {a.values.shape} and {b.values.shape} differ")
