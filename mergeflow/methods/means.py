"""Every uniform mean of a tile at once, by `compiled`, where it is certain of them."""

from __future__ import annotations

import threading
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from mergeflow.interfaces import SharedSums, SumStep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet
    from typing import Any

    from numpy.typing import NDArray

CHUNK = 8192
"""Elements that are summed at a time, in 64 KiB for each register: a core's own cache keeps them."""
CHUNK_OF_MANY = 2048
"""The same where there are several registers."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class Means:
    """The uniform means of one strip, as `compiled` wants to be told of them.

    Args:
        families: The sums of which the means are made; together they have every cell that is a uniform mean. Families
            may have registers in common, since one is done when the next begins.
        dtypes: What the rows are.
        outs: What the cells of the strip are to be.
    """

    def __init__(
        self, families: Sequence[SharedSums], dtypes: Sequence[torch.dtype], outs: Sequence[torch.dtype]
    ) -> None:
        from mergeflow.methods import compiled

        steps = [step for family in families for step in family.steps]
        terms = np.array([0, *accumulate(len(step.rows) for step in steps)])
        results = np.array([0, *accumulate(len(step.cells) for step in steps)])
        registers = [(step.base, step.into) for step in steps]
        self.cells = [cell for step in steps for cell in step.cells]
        self._steps = np.column_stack([np.array(registers), terms[:-1], terms[1:], results[:-1], results[1:]])
        self._terms = np.array([row for step in steps for row in step.rows])
        self._shares = np.array([share for step in steps for share in step.shares], dtype=np.float64)
        self._divisors = np.array([divisor for step in steps for divisor in step.divisors], dtype=np.float64)
        self._certain = all(dtype == torch.float16 for dtype in dtypes) and all(
            sum(family.most) <= compiled.EXACT_FP16_SHARES for family in families
        )
        self._registers = max(family.registers for family in families)
        self._rows = _places(dtypes)
        self._results = _places([outs[cell] for cell in self.cells])
        self._make = compiled.means

    def make(self, rows: Sequence[int], outs: Sequence[int], elements: int) -> bool:
        """Write the means of so many elements of rows at these addresses to the addresses in `outs` of all `cells`.

        False where it is not certain of all of them, because a sum needs more than two words of fp64, a value is not
        finite or a mean too large. Then nothing that was written is of use.
        """
        registers, row = _room(self._registers)
        given, made = self._rows.copy(), self._results.copy()  # threads share this, and each has rows of its own
        given[0] = rows
        made[0] = [outs[cell] for cell in self.cells]
        doubtful = self._make(
            elements,
            self._certain,
            self._steps,
            self._terms,
            self._shares,
            given,
            made,
            self._divisors,
            registers,
            row,
            _values_of_fp8(),
        )
        return bool(doubtful < 0)


def alone(cell: int, rows: Sequence[int], shares: Sequence[int]) -> SharedSums:
    """The sum of a mean that shares it with no other."""
    step = SumStep(-1, tuple(rows), tuple(shares), 0, (cell,), (sum(shares),))
    return SharedSums((step,), tuple(rows), tuple(shares), 1)


def can_make(shares: Sequence[int], rows: AbstractSet[torch.dtype], out: torch.dtype) -> bool:
    """Whether `Means` knows how to make a mean of rows of these dtypes; they may still prove too much for it."""
    kinds = _kinds()
    whole = all(abs(share) == 1 for share in shares) or torch.float64 not in rows  # or a product might round
    return whole and out in kinds and out.itemsize > 1 and kinds.keys() >= rows


@cache
def _kinds() -> dict[torch.dtype, int]:
    """What `compiled` calls the dtypes that it knows, on this machine."""
    from mergeflow.methods import compiled

    if not compiled.available():
        return {}
    return {
        torch.float16: compiled.FP16,
        torch.bfloat16: compiled.BF16,
        torch.float32: compiled.FP32,
        torch.float64: compiled.FP64,
        **{dtype: compiled.FP8 + index for index, dtype in enumerate(FP8)},
    }


@cache
def _values_of_fp8() -> NDArray[np.float64]:
    """Of all 256 bytes, in each dtype of fp8."""
    every = torch.arange(256, dtype=torch.uint8)
    tables = [every.view(dtype).to(torch.float64) for dtype in FP8]
    found: NDArray[np.float64] = torch.stack(tables).numpy()
    return found


def _places(dtypes: Sequence[torch.dtype]) -> NDArray[np.int64]:
    """`(3, rows)`: room for the address, then kind and bytes of an element, of every row."""
    kinds = _kinds()
    return np.array([[0] * len(dtypes), [kinds[dtype] for dtype in dtypes], [dtype.itemsize for dtype in dtypes]])


_threads = threading.local()


def _room(registers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """This thread's own memory for so many sums of two words, and for one row."""
    rooms: dict[Any, Any] = _threads.__dict__
    found: tuple[NDArray[np.float64], NDArray[np.float64]] | None = rooms.get(registers)
    if found is None:
        chunk = CHUNK if registers == 1 else CHUNK_OF_MANY
        found = rooms[registers] = (np.empty((2, registers, chunk)), np.empty(chunk))
    return found
