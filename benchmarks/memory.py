"""How much memory all processes of a merge have at most, for few and for many models, with small and large tensors.

The projection of a plan is what the blocks use, at most. Beside it every process has its interpreter, torch and
mergeflow, so each row also says how much more there was than in a merge of five models of a few elements, by the same
executor: that has to be less than what is projected.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.bookkeeping import tiny
from benchmarks.figures import Figure
from benchmarks.place import emptied, machine
from benchmarks.program import merge, timed
from benchmarks.pss import Pss, Watch
from benchmarks.section import Picture, Section, line
from benchmarks.synthetic import layout, models
from benchmarks.tables import Table
from mergeflow.tensors import Dtype, si_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.program import Ran
    from benchmarks.tables import Cell
    from mergeflow.tensors import Layout

COUNTS, SMALL_COUNTS = (5, 42, 257), (3, 12)
LARGEST, SMALL_LARGEST = (1_000_000, 32_000_000, 1_000_000_000), (1_000_000, 32_000_000)
"""Bytes of the largest tensor."""
OTHERS, ELEMENTS = 64, 4096
"""How many further tensors there are, and of how many elements each."""
FILLED = 8 << 20
"""Bytes of a model that are not a hole: 257 models of 1 GB take 2 GB of the disk, and all of it is read."""
ALLOWED = "512MiB"
EXECUTORS = ("local", "ray")
IDLE = 5
"""Models of a few elements: what is there whatever is merged."""
TORCH = "import torch, time; time.sleep(2)"


class Measured(NamedTuple):
    """One merge."""

    peak: Pss
    projected: int
    """Bytes that the plan says its blocks use."""
    seconds: float


def measure(wanted: Options, place: Path) -> Section:
    """Peaks of merges with `executor.memory` of half a gigabyte."""
    counts, largest = (SMALL_COUNTS, SMALL_LARGEST) if wanted.small else (COUNTS, LARGEST)
    alone = _torch_alone(place)
    models(place / "idle", IDLE, tiny)
    idle = {executor: _peak(place / "idle", place / "out", executor, IDLE) for executor in EXECUTORS}
    found: dict[tuple[str, int, int], Measured] = {}
    for size in largest:
        directory = place / f"largest-{size}"
        models(directory, max(counts), one_large(size), FILLED)
        for count in counts:
            for executor in EXECUTORS:
                found[executor, size, count] = _peak(directory, place / "out", executor, count)
    keys = place / "keys"
    models(keys, max(counts), tiny)
    many = {executor: _peak(keys, place / "out", executor, max(counts)) for executor in EXECUTORS}
    tables = (_idle(alone, idle), _peaks(found, many, idle, max(counts)))
    told = {"executor.memory": ALLOWED} | {"models": max(counts)}
    return Section("memory", tables, told, machine(place), (_picture(found, idle, counts, largest),))


def one_large(size: int) -> Layout:
    """A model whose largest tensor has `size` bytes in fp16."""
    others = [(f"layers.{number}.weight", Dtype.F16, (ELEMENTS,)) for number in range(OTHERS)]
    return layout([("embedding.weight", Dtype.F16, (size // Dtype.F16.itemsize,)), *others])


def _peak(directory: Path, out: Path, executor: str, count: int) -> Measured:
    ids = ",".join(f"{number:02}" for number in range(1, count + 1))
    arguments = [
        "arch=any",
        f'selection.models="{ids}"',
        "target=single",
        f"executor={executor}",
        f"executor.memory={ALLOWED}",
    ]
    with Watch() as watch:
        ran: Ran = merge(directory, emptied(out), arguments, environment=watch.environment)
    emptied(out)
    return Measured(watch.peak, ran.manifest["memory"]["projected"], ran.seconds)


def _torch_alone(place: Path) -> Pss:
    with Watch() as watch:
        timed([sys.executable, "-c", TORCH], place, watch.environment)
    return watch.peak


def _idle(alone: Pss, idle: dict[str, Measured]) -> Table:
    rows: list[tuple[Cell, ...]] = [("Python with torch", _bytes(alone.total), _bytes(alone.files), None)]
    for executor, measured in idle.items():
        said = f"executor={executor}, {IDLE} models of a few elements"
        rows.append((said, _bytes(measured.peak.total), _bytes(measured.peak.files), _bytes(measured.projected)))
    return Table(("", "peak", "of it pages of files", "projected"), tuple(rows), "What is there whatever is merged")


def _peaks(
    found: dict[tuple[str, int, int], Measured], many: dict[str, Measured], idle: dict[str, Measured], most: int
) -> Table:
    rows: list[tuple[Cell, ...]] = []

    def add(executor: str, models: int, largest: str, measured: Measured) -> None:
        more = measured.peak.total - idle[executor].peak.total
        rows.append((executor, models, largest, *map(_bytes, (measured.peak.total, more, measured.projected))))

    for (executor, size, count), measured in found.items():
        add(executor, count, si_bytes(size), measured)
    for executor, measured in many.items():
        add(executor, most, "a few elements, 2,515 keys", measured)
    columns = ("executor", "models", "largest tensor", "peak", "more than idle", "projected")
    note = f"executor.memory={ALLOWED}. Peaks are PSS, summed over all processes, sampled ten times a second."
    return Table(columns, tuple(rows), "Peaks", note)


def _picture(
    found: dict[tuple[str, int, int], Measured],
    idle: dict[str, Measured],
    counts: tuple[int, ...],
    largest: tuple[int, ...],
) -> Picture:
    series = [
        line(
            f"{executor}, {count} models",
            largest,
            [_bytes((found[executor, size, count].peak.total - idle[executor].peak.total) / 1e6) for size in largest],
        )
        for executor in EXECUTORS
        for count in counts
    ]
    return Picture(
        "memory", "Peak memory beside an idle merge", "largest tensor (bytes)", "MB", tuple(series), (), True
    )


def _bytes(count: float) -> Figure:
    return Figure(count, count, count, "B")
