"""What shared sums save: several targets of one run, each of which leaves out another model.

    python -m benchmarks.shared_sums [--models 44] [--dtype fp16]

Arithmetic only, on one thread, in rows of 32,768 values that are weights' usual size. Nothing is read or written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch

from benchmarks import tables
from benchmarks.figures import figure, ratio
from mergeflow.execute.arithmetic import Arithmetic
from mergeflow.execute.block import Block
from mergeflow.plan.families import shared_sums
from mergeflow.plan.plan import Cell, Memory, Place, Plan, Strip, Tile
from mergeflow.plan.tiles import PIECE
from mergeflow.recipe.request import UNIFORM, Budget
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = {"fp16": Dtype.F16, "bf16": Dtype.BF16, "fp32": Dtype.F32}
TARGETS = (1, 2, 4, 8, 16, 44)
SPREAD = 0.03
"""The standard deviation of the values."""
CALLS, SECONDS = 10, 1.0
"""How often each is measured, and how long, at least."""


def leaving_one_out(models: int, targets: int, dtype: Dtype) -> Strip:
    """One tensor of so many models, and targets each of which is the mean of all but one."""
    cells = tuple(
        Cell(UNIFORM, dtype, tuple(row for row in range(models) if row != out), (1,) * (models - 1), (Place(out, 0),))
        for out in range(targets)
    )
    sources = tuple(range(models))
    return Strip("weight", PIECE, sources, (dtype,) * models, (0,) * models, cells, shared_sums(cells))


def work(strip: Strip) -> Callable[[], None]:
    """What merges one piece of `strip` for all its targets."""
    dtypes = [*strip.dtypes, *(cell.dtype for cell in strip.cells)]
    block = Block(sum(PIECE * dtype.itemsize for dtype in dtypes))
    rows = block.rows(dtypes, PIECE)
    given, made = rows[: len(strip.dtypes)], rows[len(strip.dtypes) :]
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(PIECE, generator=generator)
    for group in block.groups(strip.dtypes, given):
        for row in group.values:
            row.copy_((common + 0.2 * torch.randn(PIECE, generator=generator)) * SPREAD)
    plan = Plan((), (), (strip,), (), Memory(0, 0, 0, 0), Budget(1, 1, 0), "error")
    arithmetic = Arithmetic(plan)
    return lambda: arithmetic.merge(strip, Tile(0, 0, PIECE), block, given, made, Counter())


def seconds(act: Callable[[], None]) -> float:
    """What one call takes: the fastest of many, since others may use the machine meanwhile."""
    act()
    best, ends = float("inf"), time.perf_counter() + SECONDS
    calls = 0
    while calls < CALLS or time.perf_counter() < ends:
        began = time.perf_counter()
        act()
        best = min(best, time.perf_counter() - began)
        calls += 1
    return best


def table(models: int, dtype: Dtype, targets: Sequence[int]) -> tables.Table:
    """Times, each also as a multiple of what one target takes."""
    rows: list[tuple[tables.Cell, ...]] = []
    one = 0.0
    for count in targets:
        strip = leaving_one_out(models, count, dtype)
        alone, shared = seconds(work(strip._replace(sums=()))), seconds(work(strip))
        one = one or alone
        times = (figure([alone]), ratio([alone], [one]), figure([shared]), ratio([shared], [one]))
        rows.append((count, *times, f"{1 - shared / alone:.0%}"))
    title = f"{models} models in {dtype.code}, {PIECE:,} values of each, one thread"
    return tables.Table(("targets", "alone", "to 1", "shared", "to 1", "saved"), tuple(rows), title)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What shared sums save, with targets that leave out one model each.")
    parser.add_argument("--models", type=int, default=44)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets = [count for count in TARGETS if count <= options.models]
    sys.stdout.write(tables.markdown(table(options.models, DTYPES[options.dtype], targets)) + "\n")


if __name__ == "__main__":
    main()
