"""What everything but bytes costs: many models with all keys of SDXL, of which each has a few elements."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from benchmarks import disk
from benchmarks.figures import figure, interleaved
from benchmarks.place import emptied, machine
from benchmarks.program import merge
from benchmarks.section import Section, settings_of
from benchmarks.synthetic import layout, models, sdxl
from benchmarks.tables import Table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.program import Ran
    from benchmarks.tables import Cell
    from mergeflow.tensors import Layout, TensorInfo

COUNTS, SMALL_COUNTS = (42, 257), (5, 42)
ELEMENTS = 4
SCALE = 1 / 32
"""Of the models whose keys are taken; their shapes are not."""


def measure(wanted: Options, place: Path) -> Section:
    """Seconds of whole processes, for a plan and for a merge on threads."""
    counts = SMALL_COUNTS if wanted.small else COUNTS
    directories = {count: place / f"tiny-{count}" for count in counts}
    for count, directory in directories.items():
        disk.warm(models(directory, count, tiny))

    def run(count: int, job: str) -> Ran:
        arguments = ["arch=any", "target=single", "executor=local", f"job={job}"]
        return merge(directories[count], emptied(place / "out"), arguments)

    acts = {(count, job): partial(run, count, job) for count in counts for job in ("plan", "merge")}
    took = interleaved(acts, wanted.rounds)
    rows: list[tuple[Cell, ...]] = []
    for count in counts:
        plans, merges = took[count, "plan"], took[count, "merge"]
        rows.append(
            (
                count,
                count * len(tiny(1).tensors),
                figure([one.wall for one in plans]),
                figure([one.wall for one in merges]),
                figure([one.seconds for one in merges]),
            )
        )
    columns = ("models", "tensors", "job=plan, whole process", "merge, whole process", "of it after the start")
    note = (
        f"Each tensor has {ELEMENTS} elements, and each model a header of its own. executor=local, from the page cache."
    )
    told = {"rounds": settings_of(wanted)["rounds"]}
    return Section("bookkeeping", (Table(columns, tuple(rows), note=note),), told, machine(place))


def tiny(number: int) -> Layout:
    """A checkpoint with the keys of SDXL, `ELEMENTS` elements in each, and a header that no other model has.

    Mergeflow reads equal headers once, and those of a collection are seldom all equal.
    """
    return layout([(key, info.dtype, (ELEMENTS,)) for key, info in _keys().items()], f"model {number:04}")


@lru_cache(maxsize=1)
def _keys() -> Mapping[str, TensorInfo]:
    return sdxl(SCALE).tensors
