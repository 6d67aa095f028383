"""What the arithmetic alone takes: the exact mean and a tree of pairwise merges beside torch's sum in fp32.

    python -m benchmarks.arithmetic [--rounds 7] [--json FILE]

Bytes of input per second of one core, by the CPU time of one thread, so that what else runs on the machine counts
little. Everything lies in memory, in a block larger than a core's caches, as a worker has it when it has read its
rows. The mean is all that a worker does with a block: the look at the magnitudes, the sum, the quotient, its rounding
and the check of the result. torch's sum is taken in the same pieces: over the whole block it is several times slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mergeflow.execute.arithmetic import Arithmetic
from mergeflow.execute.block import Block
from mergeflow.plan.plan import Cell, Memory, Place, Plan, Strip, Tile
from mergeflow.plan.steps import Graph
from mergeflow.plan.tiles import PIECE
from mergeflow.recipe.request import PAIRWISE, UNIFORM, Budget
from mergeflow.tensors import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mergeflow.interfaces import Step

DTYPES = {"fp16": Dtype.F16, "bf16": Dtype.BF16, "fp32": Dtype.F32}
MODELS = (5, 42, 257)
SCALES = {"weights": (0.03,), "mixed": (0.03,) * 6 + (1.0, 10.0)}
"""The standard deviation of the values, piece after piece: all like most weights, or a quarter of them larger."""
APART = 0.2
"""How far models are from what they have in common, as a part of it."""
BLOCK_BYTES = 64 << 20
ROUNDS = 7


class Input(NamedTuple):
    """A block that is filled, and what is to be made of it."""

    block: Block
    strip: Strip
    elements: int

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return self.elements * sum(dtype.itemsize for dtype in self.strip.dtypes)


def filled(dtype: Dtype, models: int, scales: Sequence[float]) -> Input:
    """Rows whose values are normal, with as many pieces of every scale."""
    pieces = max(BLOCK_BYTES // (models * dtype.itemsize * PIECE * len(scales)), 1) * len(scales)
    elements = pieces * PIECE
    dtypes = (dtype,) * models
    block = Block(sum(elements * each.itemsize for each in (*dtypes, dtype)))
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor(scales).repeat(pieces // len(scales)).repeat_interleave(PIECE)
    common = torch.randn(elements, generator=generator) * spread
    noise = torch.empty(elements)
    for group in block.groups(dtypes, block.rows(dtypes, elements)):
        for row in group.values:
            row.copy_(noise.normal_(generator=generator).mul_(spread).mul_(APART).add_(common))
    return Input(block, Strip("weight", elements, tuple(range(models)), dtypes, (0,) * models, (), ()), elements)


def merging(given: Input, method: str, steps: tuple[Step, ...] = ()) -> Callable[[], None]:
    """What merges the block by a method."""
    dtypes = given.strip.dtypes
    count = len(dtypes)
    cell = Cell(method, dtypes[0], tuple(range(count)), (1,) * count, (Place(0, 0),), steps)
    strip = given.strip._replace(cells=(cell,))
    rows = given.block.rows([*dtypes, cell.dtype], given.elements)
    arithmetic = Arithmetic(Plan((), (), (strip,), (), Memory(0, 0, 0, 0), Budget(1, 1, 0), "error"))
    tile = Tile(0, 0, given.elements)
    return lambda: arithmetic.merge(strip, tile, given.block, rows[:-1], rows[-1:], Counter())


def summing(given: Input) -> Callable[[], None]:
    """What adds the rows in fp32 by torch's own sum."""
    (group,) = given.block.groups(given.strip.dtypes, given.block.rows(given.strip.dtypes, given.elements))
    out = torch.empty(given.elements)

    def act() -> None:
        for start in range(0, given.elements, PIECE):
            part = slice(start, start + PIECE)
            torch.sum(group.values[:, part], 0, dtype=torch.float32, out=out[part])

    return act


def tree(models: int, dtype: Dtype) -> tuple[Step, ...]:
    """The steps of a tree whose result is about the mean, with torch's rounding: (1 - M) A + M B in `dtype`."""
    graph = Graph()
    level = [(graph.row(source, dtype), 1) for source in range(models)]
    while len(level) > 1:
        above = []
        for (a, left), (b, right) in zip(level[::2], level[1::2], strict=False):
            share = right / (left + right)
            scaled = [graph.do("scale", (x,), dtype, factor=_fp32(by)) for x, by in ((a, 1 - share), (b, share))]
            above.append((graph.do("add", (scaled[0], scaled[1]), dtype), left + right))
        level = above + level[2 * len(above) :]
    return graph.grown(level[0][0]).steps


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def measure(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """For every dtype, number of models and mix of values: the speed of each method in bytes of input per second.

    A figure is a map of `median`, `low` and `high`, with its `unit`. Methods take turns within a round; the ratio is
    that of the exact mean and torch's sum in the same round.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measured(name, models, values, rounds) for name in DTYPES for models in MODELS for values in SCALES]
    finally:
        torch.set_num_threads(threads)


def _measured(name: str, models: int, values: str, rounds: int) -> dict[str, Any]:
    dtype = DTYPES[name]
    given = filled(dtype, models, SCALES[values])
    acts = {
        "exact mean": merging(given, UNIFORM),
        "torch.sum in fp32": summing(given),
        "pairwise": merging(given, PAIRWISE, tree(models, dtype)),
    }
    for act in acts.values():
        act()
    speeds: dict[str, list[float]] = {kind: [] for kind in acts}
    for _ in range(rounds):
        for kind, act in acts.items():
            began = time.thread_time()
            act()
            speeds[kind].append(given.bytes / (time.thread_time() - began))
    ratios = [mean / other for mean, other in zip(speeds["exact mean"], speeds["torch.sum in fp32"], strict=True)]
    return (
        {"dtype": name, "models": models, "values": values}
        | {kind: _figure(every, "B/s") for kind, every in speeds.items()}
        | {"mean / sum": _figure(ratios, "")}
    )


def _figure(every: Sequence[float], unit: str) -> dict[str, Any]:
    return {"median": statistics.median(every), "low": min(every), "high": max(every), "unit": unit}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown; speeds in GB/s, each with the slowest and the fastest round."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return lines + ["| " + " | ".join(map(_shown, row.values())) + " |" for row in rows]


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    unit, factor = (" GB/s", 1e-9) if value["unit"] else ("", 1.0)
    low, median, high = (f"{value[which] * factor:.2f}" for which in ("low", "median", "high"))
    return f"{median}{unit} ({low} to {high})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="where to write the figures, too")
    wanted = parser.parse_args()
    rows = measure(wanted.rounds)
    sys.stdout.write("\n".join(table(rows)) + "\n")
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
