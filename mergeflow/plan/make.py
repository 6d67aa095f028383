"""From a recipe and the headers of its checkpoints to a plan."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from mergeflow.collector import collector_paused
from mergeflow.errors import FormatError, IncompatibleSources, MergeflowError, OverBudget
from mergeflow.plan.agree import Agreement
from mergeflow.plan.metadata import metadata
from mergeflow.plan.plan import Cell, Memory, Output, Place, Plan, Strip
from mergeflow.plan.strips import joined
from mergeflow.plan.tiles import cut, memory_for
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeflow.interfaces import Format
    from mergeflow.plan.plan import Tile
    from mergeflow.plan.sources import Wanted
    from mergeflow.recipe.request import Budget, Recipe, Target
    from mergeflow.tensors import Checkpoint


@collector_paused()
def make_plan(recipe: Recipe, checkpoints: Sequence[Checkpoint], format: Format, out: str) -> Plan:
    """Everything that will happen. What forbids it is in `plan.problems`; nothing is raised for it.

    `checkpoints` are those of `recipe.checkpoints()` whose headers could be read; `out` is the directory of the
    outputs. Pure: the same arguments give an equal plan anywhere.
    """
    indexed = {checkpoint.id: (index, checkpoint) for index, checkpoint in enumerate(checkpoints)}
    agreement = Agreement(indexed, recipe.architecture, recipe.policies)
    problems: list[MergeflowError] = _one_file_twice(checkpoints)
    notes: dict[str, list[str]] = defaultdict(list)
    forbidden: dict[str, list[str]] = defaultdict(list)
    outputs: list[Output] = []
    rows: list[list[Wanted]] = []
    for target in recipe.targets:
        if any(id not in indexed for id in target.checkpoints()):
            continue  # why is told with the file that could not be read
        wanted, findings = agreement.settle(target)
        for told, texts in ((notes, _double_counts(target, recipe) + findings.notes), (forbidden, findings.problems)):
            for text in texts:
                told[text].append(target.name)
        tensors = ((tensor.key, tensor.dtype, tensor.shape) for tensor in wanted)
        try:
            layout = format.layout(tensors, metadata(target, recipe, wanted, indexed))
        except FormatError as error:
            forbidden[str(error)].append(target.name)
            continue
        outputs.append(Output(target, f"{out.rstrip('/')}/{target.file}", layout, _written_as(wanted)))
        rows.append(wanted)
    strips = joined(_parts(outputs, rows))
    problems += map(IncompatibleSources, _headed(forbidden))
    memory, shards = _work(strips, recipe.budget, problems)
    return Plan(
        checkpoints=tuple(checkpoints),
        outputs=tuple(outputs),
        strips=strips,
        shards=shards,
        memory=memory,
        budget=recipe.budget,
        nonfinite=recipe.policies.nonfinite,
        notes=tuple(_headed(notes)),
        problems=tuple(problems),
    )


def _headed(told: Mapping[str, Sequence[str]]) -> list[str]:
    """Each text once, headed by the targets that it concerns: they share lists, so most concern several."""
    return [f"[{some(list(targets))}] {text}" for text, targets in told.items()]


def _work(
    strips: Sequence[Strip], budget: Budget, problems: list[MergeflowError]
) -> tuple[Memory, tuple[tuple[Tile, ...], ...]]:
    try:
        memory = memory_for(strips, budget)
    except OverBudget as error:
        problems.append(error)
        return Memory(budget.memory, 0, 0, 0), ()
    return memory, cut(strips, memory)


def _parts(outputs: Sequence[Output], rows: Sequence[Sequence[Wanted]]) -> Iterator[Strip]:
    """Every tensor that has elements, with what is made of it; outputs of a series have most tensors in common."""
    places: dict[int, list[Place]] = {}
    tensors: list[Wanted] = []
    for index, (output, wanted) in enumerate(zip(outputs, rows, strict=True)):
        for tensor in wanted:
            if id(tensor) not in places:
                places[id(tensor)] = []
                tensors.append(tensor)
            places[id(tensor)].append(Place(index, output.layout.tensors[tensor.key].begin))
    for tensor in tensors:
        infos = tensor.infos
        if elements := infos[0].elements:
            own, at = tuple(range(len(infos))), tuple(places[id(tensor)])
            yield Strip(
                key=tensor.key,
                elements=elements,
                sources=tensor.sources,
                dtypes=tuple([info.dtype for info in infos]),
                offsets=tuple([info.begin for info in infos]),
                cells=(Cell(tensor.method, tensor.dtype, own, tensor.shares, at, tensor.steps),),
            )


def _written_as(wanted: Sequence[Wanted]) -> tuple[tuple[str, str], ...]:
    """The dtypes of each component of an output, for the page that explains the plan."""
    dtypes: dict[str, dict[str, None]] = {}
    for tensor in wanted:
        dtypes.setdefault(tensor.component, {})[tensor.dtype.code] = None
    return tuple((component, ", ".join(sorted(codes))) for component, codes in dtypes.items())


def _one_file_twice(checkpoints: Sequence[Checkpoint]) -> list[MergeflowError]:
    by_file: dict[tuple[int, int], list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        by_file.setdefault((checkpoint.stat.device, checkpoint.stat.inode), []).append(checkpoint)
    return [
        IncompatibleSources(
            f"ids {' and '.join(same.id for same in group)} are one file ({some([same.path for same in group])}); "
            "it would count twice; remove one id, or copy the file if that is meant"
        )
        for group in by_file.values()
        if len(group) > 1
    ]


def _double_counts(target: Target, recipe: Recipe) -> list[str]:
    """Composites that stand beside their own members: right by the letter, and rarely meant."""
    notes = []
    for part in target.parts:
        reached: dict[str, list[str]] = defaultdict(list)
        for entry in part.entries:
            for id in recipe.models.members(entry):
                reached[id].append(entry)
        notes += [
            f"{part.component}: model {id} counts more than once, by {' and '.join(entries)}; it has "
            f"{float(part.shares[id] * len(part.entries)):g} shares of {len(part.entries)}"
            for id, entries in reached.items()
            if len(entries) > 1
        ]
    return notes
