"""A tree of pairwise merges, carried out as the programs that people merge with do: rounding for rounding.

It must not depend on which torch is installed, so it uses only what no version does differently: conversions, which
round to nearest even, and sums and products of tensors, which round once. Not so the product of a half precision
tensor and a number: up to 2.0 torch rounds the number to half precision first, since 2.1 it does not (pytorch #98820).
Unless the tensor's dtype holds the number, as it holds 1/2: then there is nothing to round first, and every version
makes the same of it, in one pass instead of three. Sums of half precision are made in fp32 and rounded once more,
which is what a step asks for; hardware that rounded them once would make the same of them, because 24 >= 2 * 11 + 2
(Figueroa, "When is double rounding innocuous?", 1995).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mergeflow.methods.rounding import round_into
from mergeflow.methods.scratch import Scratch
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mergeflow.interfaces import Rows, Step

KEPT = {dtype: getattr(torch, dtype.torch_name) for dtype in (Dtype.F16, Dtype.BF16, Dtype.F32, Dtype.F64)}
"""What a step may keep its result in, and what torch calls it."""
SIGN_SHIFT = 63
"""Takes an fp64's sign, as its bits, to -1 or 0."""
ABOVE, BELOW = (torch.tensor(1 + sign * 2.0**-52, dtype=torch.float64) for sign in (1, -1))
"""Factors that lead to a neighbour in fp64, or to the next but one."""

_scratch = Scratch()


class Pairwise:
    """What the last of `steps` makes of the rows, rounded once more if it was kept in another dtype than the output's.

    Every register has its own room for every dtype that it takes: so much per element, and 32 bytes for what is
    computed on the way. A thread keeps it, for the next piece and for every other tree.
    """

    name = "pairwise"
    takes_any_dtype = False

    def __init__(self, steps: Sequence[Step]) -> None:
        self._rooms: dict[tuple[str, torch.dtype], int] = {}
        self._acts: list[_Act] = []
        held: dict[int, int] = {}
        for step in steps:
            operands = tuple(place if place >= 0 else held[place] for place in step.operands)
            key = (f"register {step.into}", KEPT[step.dtype])
            into = held[-1 - step.into] = -1 - self._rooms.setdefault(key, len(self._rooms))
            self._acts.append(_Act(_OPERATIONS[step.operation], _Factor(step.factor), operands, into))
        self._made, self._made_in = self._acts[-1].into, KEPT[steps[-1].dtype]

    def merge(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """Carry out the steps on `rows` and write what the last one makes into `out`; shares are of no use here."""
        rooms = [_scratch(name, out, dtype) for name, dtype in self._rooms]
        held = [*rows.values, *reversed(rooms)]  # rows count from the front, rooms from the end
        if out.dtype == self._made_in:
            held[self._made] = out
        for carry_out, factor, operands, into in self._acts:
            carry_out(factor, [held[place] for place in operands], held[into])
        made = held[self._made]
        if made is not out:
            round_into(_widened(made, _widest(made.dtype), 0), out)

    def skip(self, rows: Rows, shares: Sequence[int], out: Tensor) -> None:
        """A tree cannot leave values out: it would have to say what else to merge."""
        raise NotImplementedError("a tree has no mean of the finite values; planning refuses it")


class _Act(NamedTuple):
    """A step, looked up once for all the pieces that it is carried out on."""

    carry_out: Callable[[_Factor, Sequence[Tensor], Tensor], None]
    factor: _Factor
    operands: tuple[int, ...]
    """Rows from the front, rooms from the end: what holds a register is known beforehand."""
    into: int


class _Factor:
    """A number as tensors, which multiply faster than it does."""

    def __init__(self, number: float) -> None:
        self.number = number
        self._made: dict[torch.dtype, Tensor | None] = {}

    def held_by(self, dtype: torch.dtype) -> Tensor | None:
        """The number in `dtype`; None if that does not hold it."""
        if dtype not in self._made:
            scalar = torch.tensor(self.number, dtype=dtype)
            self._made[dtype] = scalar if scalar.item() == self.number else None
        return self._made[dtype]

    def exact(self, dtype: torch.dtype) -> Tensor:
        """The number in what a step is computed in, where it must be exact."""
        scalar = self.held_by(dtype)
        if scalar is None:
            raise ValueError(f"the factor {self.number!r} of a step computed in {dtype} is not exact there")
        return scalar


# --- operations -----------------------------------------------------------------------------------------------------
#
# `result` may lie where an operand does, but only if they are of one dtype and the same tensor.


def _scale(factor: _Factor, operands: Sequence[Tensor], result: Tensor) -> None:
    (x,) = operands
    if x.dtype == result.dtype and (scalar := factor.held_by(x.dtype)) is not None:
        torch.mul(x, scalar, out=result)
        return
    dtype = _widest(x.dtype, result.dtype)
    room = _room(result, dtype, 0)
    torch.mul(_widened(x, dtype, 0), factor.exact(dtype), out=room)
    _round(room, result)


def _add(factor: _Factor, operands: Sequence[Tensor], result: Tensor) -> None:
    _combine(torch.add, operands, result)


def _subtract(factor: _Factor, operands: Sequence[Tensor], result: Tensor) -> None:
    _combine(torch.sub, operands, result)


def _combine(function: Callable[..., Tensor], operands: Sequence[Tensor], result: Tensor) -> None:
    x, y = operands
    if x.dtype == y.dtype == result.dtype:
        function(x, y, out=result)
        return
    dtype = _widest(x.dtype, y.dtype, result.dtype)
    room = _room(result, dtype, 0)
    function(_widened(x, dtype, 0), _widened(y, dtype, 1), out=room)
    _round(room, result)


def _round_only(factor: _Factor, operands: Sequence[Tensor], result: Tensor) -> None:
    (x,) = operands
    if x.dtype == result.dtype:
        result.copy_(x)
    else:
        round_into(_spare(x, _widest(x.dtype, result.dtype), 0).copy_(x), result)


def _lerp(factor: _Factor, operands: Sequence[Tensor], result: Tensor) -> None:
    x, y = (_widened(operand, torch.float32, index) for index, operand in enumerate(operands))
    weight = factor.exact(torch.float32)
    if abs(factor.number) < 0.5:
        made = _multiply_add(weight, torch.sub(y, x, out=_spare(x, torch.float32, 1)), x)
    else:
        made = _multiply_add(weight - 1, torch.sub(y, x, out=_spare(x, torch.float32, 0)), y)
    round_into(made, result)


_OPERATIONS = {"scale": _scale, "add": _add, "subtract": _subtract, "lerp": _lerp, "round": _round_only}


def _multiply_add(factor: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`factor * x + y` in fp32, rounded once (IEEE 754 fma), in a spare buffer; the first two may hold `x` and `y`.

    The product of two fp32 is exact in fp64 and the sum of fp64 is off by half a last bit at most. If what lies on
    either side of it rounds to the same fp32, so does the exact one (Ziv, "Fast evaluation of elementary mathematical
    functions with correctly rounded last bit", 1991), and mostly it does.
    """
    inner, outer = _spare(x, torch.float32, 2), _spare(x, torch.float32, 3)
    product, term = _spare(x, torch.float64, 2), _spare(x, torch.float64, 3)
    total = product.copy_(x).mul_(factor).add_(term.copy_(y))
    outer.copy_(torch.mul(total, ABOVE, out=term))
    inner.copy_(total.mul_(BELOW))
    if not torch.equal(inner, outer):  # nor are NaN
        product.copy_(x).mul_(factor)
        term.copy_(y)
        total = _spare(x, torch.float64, 0)  # where `x` and `y` were
        _add_to_odd(product, term, total, _spare(x, torch.float64, 1))
        inner.copy_(total)
    return inner


def _add_to_odd(one: Tensor, other: Tensor, total: Tensor, room: Tensor) -> None:
    """Write the sum into `total`, rounded to odd (see `rounding`): cut, and the last bit set if that lost anything.

    All are fp64 and apart in memory; all but `total` are good for nothing afterwards.
    """
    torch.add(one, other, out=total)
    seen = torch.sub(total, one, out=room)
    error = other.sub_(seen).add_(one.sub_(torch.sub(total, seen, out=seen)))  # TwoSum (Knuth, TAOCP 4.2.2)
    bits, lost, beyond = total.view(torch.int64), one.view(torch.int64), seen.view(torch.int64)
    torch.bitwise_xor(bits, error.view(torch.int64), out=beyond).bitwise_right_shift_(SIGN_SHIFT)
    lost.copy_(error.abs_().gt_(0))  # not where the total is infinite: the error is NaN there
    bits.sub_(beyond.bitwise_and_(lost)).bitwise_or_(lost)


# --- widening and rounding ------------------------------------------------------------------------------------------


def _widest(*dtypes: torch.dtype) -> torch.dtype:
    """What a step on such values is computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _spare(like: Tensor, dtype: torch.dtype, index: int) -> Tensor:
    """A buffer for intermediate values: the same memory makes four of fp64 or eight of fp32."""
    many = torch.float64.itemsize // dtype.itemsize
    count = like.numel()
    return _scratch(f"spare {index // many}", like).view(dtype)[index % many * count :][:count]


def _widened(x: Tensor, dtype: torch.dtype, index: int) -> Tensor:
    """The values in `dtype`: themselves, not to be written to, or in a spare buffer."""
    return x if x.dtype == dtype else _spare(x, dtype, index).copy_(x)


def _room(result: Tensor, dtype: torch.dtype, index: int) -> Tensor:
    """Where to compute `result` in `dtype`: in its own place, or in a spare buffer to be rounded from."""
    return result if result.dtype == dtype else _spare(result, dtype, index)


def _round(room: Tensor, result: Tensor) -> None:
    if room is not result:
        round_into(room, result)
