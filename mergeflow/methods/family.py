"""Means whose sums are made of each other: what several of them have in common is added once.

Why that changes no bit. The sums of a family are S = sum(s_r x_r), each with its own shares s_r >= 0 of the rows x_r.
Each is made of another, or of nothing, by giving one row after the other the share that it has here. On the way, every
row has either the share from before or that from after. So let q be a quantum of all rows (see `exact`), M_r the
largest share that row r has in any of the sums, and B = sum(M_r |x_r|), with the row's peak for |x_r|. Then

    every value that a register passes through is a multiple of q, and at most B;
    so is what is added or subtracted, d x_r with |d| <= M_r, and d times a sum of rows that change by the same d.

As long as B < 2^m q, a register of m bits holds them all, and nothing rounds: afterwards it has S itself, the number
that the same rows make in any order, and so when they are merged alone. Otherwise the registers have two words, as sums
have several in `exact`, where n is how many rows are added and subtracted on the longest way to a sum; settling moves
what they hold between the words and loses nothing. If that does not suffice either, the sums are not made together.

What becomes of S does not depend on how it was made. Its quotient, rounded once more, is what the exact quotient rounds
to: by one word or by several, in fp32 or in fp64, here or alone. (The shares may be multiples of the cell's own, and
then so is the divisor.) Only an fp64 of a sum in two words is not claimed to be the nearest. It is made alone.

A register is never -0: it begins as +0, and a sum that rounds to nearest is -0 only if both of its terms are. So a sum
that is zero is +0, as it is alone.

A row that is not finite has no quantum, and what it does to each mean is for `Uniform` to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mergeflow.interfaces import SHARED_WORDS
from mergeflow.methods.exact import add_to, bound_of, divide, quantum_of, words_for
from mergeflow.methods.rounding import round_into
from mergeflow.methods.scratch import Scratch
from mergeflow.methods.uniform import LARGEST_SUM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeflow.interfaces import Rows, SharedSums
    from mergeflow.methods.exact import Words

_scratch = Scratch()


def merge_family(rows: Rows, family: SharedSums, outs: Sequence[Tensor]) -> bool:
    """Write the means of a family into those of `outs` that are its cells, to the bit as `Uniform.merge` does alone.

    False if it is not certain that they would be; then nothing is written.
    """
    needed = rows.take(family.rows)
    bound = bound_of(needed.peaks, family.most)
    if not bound < LARGEST_SUM:  # nor is NaN
        return False
    means = [
        (outs[cell].dtype, divisor)
        for step in family.steps
        for cell, divisor in zip(step.cells, step.divisors, strict=True)
    ]
    quantum = quantum_of(needed)
    count, dtype = words_for(bound, quantum, family.additions, means)
    if count > SHARED_WORDS or (count > 1 and any(out == torch.float64 for out, _ in means)):
        return False
    registers = [_register(index, count, dtype, rows.matrices[0][0]) for index in range(family.registers)]
    for step in family.steps:
        total = registers[step.into]
        base = registers[step.base] if step.base >= 0 else [word.zero_() for word in total]
        add_to(base, rows.take(step.rows), step.shares, quantum, total)
        for cell, divisor in zip(step.cells, step.divisors, strict=True):
            round_into(divide(total, divisor, outs[cell].dtype, keep=True), outs[cell])
    return True


def _register(index: int, words: int, dtype: torch.dtype, like: Tensor) -> Words:
    """The words of a register, in the same memory whatever their dtype."""
    return [_scratch(f"register {index} word {word}", like).view(dtype)[: like.numel()] for word in range(words)]
