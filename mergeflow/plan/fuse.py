"""Several plans as one: what their outputs have in common is read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeflow.collector import collector_paused
from mergeflow.errors import OverBudget
from mergeflow.plan.strips import joined
from mergeflow.plan.tiles import cut, memory_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeflow.plan.plan import Plan, Strip


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


@collector_paused()
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
    parts: list[Strip] = []
    for plan in plans:
        begin = jobs[-1].stop if jobs else 0
        jobs.append(range(begin, begin + len(plan.outputs)))
        parts += _renumbered(plan, index, begin)
    strips = joined(parts)
    memory = memory_for(strips, first.budget)
    plan = replace(
        first,
        checkpoints=tuple(checkpoints.values()),
        outputs=tuple(output for one in plans for output in one.outputs),
        strips=strips,
        shards=cut(strips, memory),
        memory=memory,
        apart=True,
        notes=(),
        problems=(),
    )
    return Fused(plan, tuple(jobs), tuple(plans))


def in_passes(plans: Sequence[Plan]) -> list[Fused]:
    """All `plans` in as few passes as the memory budget allows, in their order; each of them fits it alone.

    Every pass has as many as fit, which is the fewest passes there can be as long as the order is kept.
    """
    passes: list[Fused] = []
    left, guess = plans, len(plans)
    while left:
        passes.append(_most(left, guess))
        guess = len(passes[-1].alone)  # alternatives are much alike: as many of the next will probably fit
        left = left[guess:]
    return passes


def _most(plans: Sequence[Plan], guess: int) -> Fused:
    """As many of `plans`, from the first on, as fit into one pass; `guess` is how many that may be.

    Fusing takes as long as there are plans, so no more than twice as many are tried as have been seen to fit.
    """
    fits, too_many = fuse(plans[:1]), len(plans) + 1
    count = min(guess, len(plans))
    while len(fits.alone) + 1 < too_many:
        try:
            fits = fuse(plans[:count])
        except OverBudget:
            too_many = count
        count = min(2 * len(fits.alone), (len(fits.alone) + too_many) // 2)
    return fits


def _renumbered(plan: Plan, index: Mapping[str, int], begin: int) -> Iterator[Strip]:
    """The strips of one plan, with the numbers that its checkpoints and outputs have in the whole."""
    sources = [index[one.id] for one in plan.checkpoints]
    for strip in plan.strips:
        cells = [
            cell._replace(places=tuple([place._replace(output=begin + place.output) for place in cell.places]))
            for cell in strip.cells
        ]
        yield strip._replace(sources=tuple([sources[source] for source in strip.sources]), cells=tuple(cells))
