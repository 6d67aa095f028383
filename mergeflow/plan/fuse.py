"""Several plans as one: what their outputs have in common is read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeflow.errors import OverBudget
from mergeflow.plan.families import Families
from mergeflow.plan.tiles import cut, memory_for
from mergeflow.tensors import LAYOUT_ORDER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.plan.plan import Cell, Place, Plan, Strip
    from mergeflow.tensors import Dtype


@dataclass(frozen=True)
class Fused:
    """One pass over the sources for the outputs of several jobs."""

    plan: Plan
    jobs: tuple[range, ...]
    """The outputs of each job, by their indices in `plan`."""
    alone: tuple[Plan, ...]
    """The plan of each job."""

    @property
    def bytes_apart(self) -> int:
        """Bytes that the jobs would read one after the other."""
        return sum(plan.bytes_read for plan in self.alone)


def fuse(plans: Sequence[Plan]) -> Fused:
    """The pass that makes the outputs of all `plans`, none of which has problems; raises `OverBudget`.

    They are over files of one model set, with one budget and one policy for values that are not finite.
    """
    first = plans[0]
    if len(plans) == 1:
        return Fused(first, (range(len(first.outputs)),), (first,))
    checkpoints = {one.id: one for plan in plans for one in plan.checkpoints}
    index = {id: number for number, id in enumerate(checkpoints)}
    jobs: list[range] = []
    alike: dict[tuple[str, int], list[_Use]] = {}
    for plan in plans:
        begin = jobs[-1].stop if jobs else 0
        jobs.append(range(begin, begin + len(plan.outputs)))
        sources = [index[one.id] for one in plan.checkpoints]
        for strip in plan.strips:
            alike.setdefault((strip.key, strip.elements), []).append(_Use(strip, sources, begin))
    families = Families()
    same: dict[object, object] = {}
    strips = [_strip(uses, families, same) for uses in alike.values()]
    strips.sort(key=lambda strip: (LAYOUT_ORDER[strip.cells[0].dtype], strip.key))
    memory = memory_for(strips, first.budget)
    plan = replace(
        first,
        checkpoints=tuple(checkpoints.values()),
        outputs=tuple(output for one in plans for output in one.outputs),
        strips=tuple(strips),
        shards=cut(strips, memory),
        memory=memory,
        apart=True,
        notes=(),
        problems=(),
    )
    return Fused(plan, tuple(jobs), tuple(plans))


def in_passes(plans: Sequence[Plan]) -> list[Fused]:
    """All `plans` in as few passes as the memory budget allows, in their order; each of them fits it alone."""
    try:
        return [fuse(plans)]
    except OverBudget:
        half = len(plans) // 2
        return [*in_passes(plans[:half]), *in_passes(plans[half:])]


@dataclass(frozen=True)
class _Use:
    """One strip of one plan, and what its numbers are in the whole."""

    strip: Strip
    sources: Sequence[int]
    output: int
    """The index of the plan's first output."""


def _one(value: Any, same: dict[object, object]) -> Any:
    """`value`, or an equal one that is there already, so that a plan pickles each only once."""
    return same.setdefault(value, value)


def _strip(uses: Sequence[_Use], families: Families, same: dict[object, object]) -> Strip:
    """The rows that any of `uses` needs, and the cells of them all; equal ones are one."""
    found: dict[int, tuple[Dtype, int]] = {}
    for use in uses:
        strip = use.strip
        for source, dtype, offset in zip(strip.sources, strip.dtypes, strip.offsets, strict=True):
            found[use.sources[source]] = (dtype, offset)
    ordered = sorted(found, key=lambda source: (LAYOUT_ORDER[found[source][0]], source))
    row_of = {source: row for row, source in enumerate(ordered)}
    places: dict[Cell, list[Place]] = {}
    for use in uses:
        rows = [row_of[use.sources[source]] for source in use.strip.sources]
        for cell in use.strip.cells:
            moved = cell._replace(rows=tuple([rows[row] for row in cell.rows]), places=())
            there = [place._replace(output=use.output + place.output) for place in cell.places]
            places.setdefault(moved, []).extend(there)
    cells = tuple(
        cell._replace(places=tuple(there), rows=_one(cell.rows, same), shares=_one(cell.shares, same))
        for cell, there in places.items()
    )
    return uses[0].strip._replace(
        sources=_one(tuple(ordered), same),
        dtypes=_one(tuple([found[source][0] for source in ordered]), same),
        offsets=tuple([found[source][1] for source in ordered]),
        cells=cells,
        sums=families.of(cells),
    )
