"""Operations on one tensor as a graph, and the graph as steps that need few registers.

Planning writes down what is rounded to what; `methods.pairwise` carries it out. A tree of N leaves needs about
log2(N) registers, because of two inputs the one that needs more is made first (Sethi and Ullman, "The generation of
optimal code for arithmetic expressions", 1970).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from mergeflow.interfaces import Step

if TYPE_CHECKING:
    from mergeflow.tensors import Dtype

Operation = Literal["scale", "add", "subtract", "lerp", "round"]


class Grown(NamedTuple):
    """How one tensor is made."""

    steps: tuple[Step, ...]
    """Empty where it is its only source as it is."""
    sources: tuple[int, ...]
    """The checkpoints that it is made of, each once: the rows that the steps' operands count."""
    dtype: Dtype
    """What it is saved as, unless something else is asked for."""


class Refused(Exception):
    """A tensor that the tool in question cannot merge."""

    def __init__(self, source: int, dtype: Dtype) -> None:
        super().__init__(source, dtype)
        self.source, self.dtype = source, dtype


class Value(NamedTuple):
    """A tensor on its way: a row as it was read, or the result of an operation."""

    dtype: Dtype
    """What it is held in."""
    kept: Dtype
    """What it would be saved as; another one where it is held in a wider one on purpose."""
    source: int = -1
    operation: Operation | None = None
    inputs: tuple[int, ...] = ()
    factor: float = 1.0


class Graph:
    """The values of one tensor, inputs before what is made of them; they are told by their number."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self._refused: dict[int, Refused] = {}

    def row(self, source: int, dtype: Dtype) -> int:
        """The tensor of a checkpoint."""
        return self._add(Value(dtype, dtype, source))

    def do(
        self,
        operation: Operation,
        inputs: tuple[int, ...],
        dtype: Dtype,
        kept: Dtype | None = None,
        factor: float = 1.0,
    ) -> int:
        """The result of an operation, rounded to `dtype`; `kept` is the same unless told."""
        factor += 0.0  # makes 0.0 of -0.0: steps are looked up by what they equal, and these two are equal
        return self._add(Value(dtype, kept or dtype, -1, operation, inputs, factor))

    def rounded(self, value: int, dtype: Dtype, kept: Dtype | None = None) -> int:
        """`value` in `dtype`, which may be its own already."""
        return value if self.values[value].dtype is dtype else self.do("round", (value,), dtype, kept)

    def refuse(self, value: int) -> None:
        """No operation takes the row `value`; that matters only where one would, since files carry anything."""
        self._refused[value] = Refused(self.values[value].source, self.values[value].dtype)

    def grown(self, top: int) -> Grown:
        """The steps that make `top`, and of what; raises `Refused`."""
        order = self._order(top)
        for value in order:
            for one in self.values[value].inputs:
                if one in self._refused:
                    raise self._refused[one]
        rows = self._rows(order or [top])
        steps = self._steps(order, rows)
        return Grown(tuple(steps), tuple(rows), self.values[top].kept)

    def _add(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _order(self, top: int) -> list[int]:
        """The operations that `top` needs, in an order that keeps few results waiting."""
        need = self._needs()
        order: list[int] = []
        done = {number for number, value in enumerate(self.values) if value.operation is None}
        stack = [top]
        while stack:
            number = stack[-1]
            waiting = [one for one in self.values[number].inputs if one not in done]
            if number in done:
                stack.pop()
            elif waiting:
                stack += sorted(reversed(waiting), key=lambda one: need[one])
            else:
                stack.pop()
                done.add(number)
                order.append(number)
        return order

    def _needs(self) -> list[int]:
        """How many registers each value needs, if nothing is used twice."""
        need: list[int] = []
        for value in self.values:
            below = sorted(need[number] for number in value.inputs)
            if value.operation is None:
                need.append(0)
            elif len(below) == 2 and below[0] == below[1] > 0:
                need.append(below[0] + 1)
            else:
                need.append(max(1, *below))
        return need

    def _rows(self, order: list[int]) -> dict[int, int]:
        """The row of every source, in the order of first use."""
        rows: dict[int, int] = {}
        for number in order:
            for one in self.values[number].inputs or (number,):
                if self.values[one].operation is None:
                    rows.setdefault(self.values[one].source, len(rows))
        return rows

    def _steps(self, order: list[int], rows: dict[int, int]) -> list[Step]:
        uses = Counter(one for number in order for one in self.values[number].inputs)
        held: dict[int, int] = {}
        free: list[int] = []
        count = 0
        steps = []
        for number in order:
            operation, inputs = self.values[number].operation, self.values[number].inputs
            assert operation is not None
            operands = tuple(-1 - held[one] if one in held else rows[self.values[one].source] for one in inputs)
            uses.subtract(inputs)
            for one in set(inputs):
                if one in held and not uses[one]:
                    free.append(held.pop(one))
            if not free:
                free.append(count)
                count += 1
            held[number] = into = min(free)
            free.remove(into)
            steps.append(Step(operation, operands, self.values[number].factor, self.values[number].dtype, into))
        return steps
