"""From a recipe and the headers of its checkpoints to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.errors import IncompatibleSources, MergeflowError, OverBudget
from mergeflow.plan.agree import Agreement
from mergeflow.plan.metadata import metadata
from mergeflow.plan.plan import Cell, Memory, Output, Place, Plan, Strip
from mergeflow.plan.tiles import cut, memory_for
from mergeflow.tensors import LAYOUT_ORDER, some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeflow.interfaces import Format
    from mergeflow.plan.agree import Wanted
    from mergeflow.recipe.request import Recipe, Target
    from mergeflow.tensors import Checkpoint, Dtype


def make_plan(recipe: Recipe, checkpoints: Sequence[Checkpoint], format: Format, out: str) -> Plan:
    """Everything that will happen. What forbids it is in `plan.problems`; nothing is raised for it.

    `checkpoints` are those of `recipe.checkpoints()` whose headers could be read; `out` is the directory of the
    outputs. Pure: the same arguments give an equal plan anywhere.
    """
    indexed = {checkpoint.id: (index, checkpoint) for index, checkpoint in enumerate(checkpoints)}
    problems: list[MergeflowError] = _one_file_twice(checkpoints)
    found = Found()
    agreement = Agreement(indexed, recipe.architecture, recipe.policies)
    outputs: list[Output] = []
    rows: list[list[Wanted]] = []
    for target in recipe.targets:
        if any(id not in indexed for id in target.checkpoints()):
            continue  # why is told with the file that could not be read
        wanted, findings = agreement.settle(target)
        found.add(target, [*_double_counts(target, recipe), *findings.notes], findings.problems)
        layout = format.layout(
            ((tensor.key, tensor.dtype, tensor.shape) for tensor in wanted),
            metadata(target, recipe, wanted, indexed),
        )
        outputs.append(Output(target, f"{out}/{target.file}", layout, _written_as(wanted)))
        rows.append(wanted)
    problems += [IncompatibleSources(text) for text in found.sentences(found.problems)]
    strips = _strips(outputs, rows)
    try:
        memory = memory_for(strips, recipe.budget)
        shards = cut(strips, memory)
    except OverBudget as error:
        problems.append(error)
        memory, shards = Memory(recipe.budget.memory, 0, 0, 0), ()
    return Plan(
        checkpoints=tuple(checkpoints),
        outputs=tuple(outputs),
        strips=strips,
        shards=shards,
        memory=memory,
        budget=recipe.budget,
        nonfinite=recipe.policies.nonfinite,
        strict_integers=recipe.policies.integers == "error",
        notes=tuple(found.sentences(found.notes)),
        problems=tuple(problems),
    )


class Found:
    """Notes and problems of all targets. Targets share lists, so most sentences hold for several of them."""

    def __init__(self) -> None:
        self.notes: dict[str, list[str]] = {}
        self.problems: dict[str, list[str]] = {}

    def add(self, target: Target, notes: Sequence[str], problems: Sequence[str]) -> None:
        """Note what was found for `target`."""
        for gathered, texts in ((self.notes, notes), (self.problems, problems)):
            for text in texts:
                gathered.setdefault(text, []).append(target.name)

    def sentences(self, gathered: Mapping[str, Sequence[str]]) -> list[str]:
        """Each text once, headed by the targets that it concerns."""
        return [f"[{', '.join(names)}] {text}" for text, names in gathered.items()]


def _strips(outputs: Sequence[Output], rows: Sequence[Sequence[Wanted]]) -> tuple[Strip, ...]:
    """One strip per key, with the rows that any output needs; in the order in which files are laid out."""
    alike: dict[tuple[str, tuple[int, ...]], list[tuple[int, Wanted]]] = {}
    for index, wanted in enumerate(rows):
        for tensor in wanted:
            alike.setdefault((tensor.key, tensor.shape), []).append((index, tensor))
    strips = [_strip(key, users, outputs) for (key, _), users in alike.items()]
    strips.sort(key=lambda strip: (LAYOUT_ORDER[strip.cells[0].dtype], strip.key))
    return tuple(strip for strip in strips if strip.elements)


def _strip(key: str, users: list[tuple[int, Wanted]], outputs: Sequence[Output]) -> Strip:
    infos = {source: info for _, tensor in users for source, info in tensor.sources}
    ordered = sorted(infos, key=lambda source: (LAYOUT_ORDER[infos[source].dtype], source))
    row_of = {source: row for row, source in enumerate(ordered)}
    places: dict[tuple[str, Dtype, tuple[int, ...], tuple[int, ...]], list[Place]] = {}
    for index, tensor in users:
        row_indices = tuple(row_of[source] for source, _ in tensor.sources)
        wanted = (tensor.method, tensor.dtype, row_indices, tensor.shares)
        places.setdefault(wanted, []).append(Place(index, outputs[index].layout.tensors[key].begin))
    return Strip(
        key=key,
        elements=outputs[users[0][0]].layout.tensors[key].elements,
        sources=tuple(ordered),
        dtypes=tuple(infos[source].dtype for source in ordered),
        offsets=tuple(infos[source].begin for source in ordered),
        cells=tuple(Cell(*wanted, tuple(at)) for wanted, at in places.items()),
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
        for entry in part.entries:
            members = recipe.models.members(entry)
            beside = [id for id in members if id in part.entries] if members != (entry,) else []
            notes += [
                f"{part.component}: {id} is listed beside {entry}, of which it is a member; it has "
                f"{float(part.shares[id] * len(part.entries)):g} shares of {len(part.entries)}"
                for id in beside
            ]
    return notes
