"""The plan of an assembly: every tensor is copied, bit by bit, from the one file that it comes from.

It is carried out as every other plan is: read once, written to a draft, covered by receipts, then renamed.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from mergeflow import __version__
from mergeflow.errors import FormatError, IncompatibleSources, MergeflowError, OverBudget
from mergeflow.plan.metadata import as_json, writable
from mergeflow.plan.plan import Cell, Memory, Output, Place, Plan, Strip
from mergeflow.plan.sources import AGREE
from mergeflow.plan.tiles import cut, memory_for
from mergeflow.recipe.request import COPY, REST, Part, Target
from mergeflow.tensors import LAYOUT_ORDER, Dtype
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeflow.interfaces import Format
    from mergeflow.recipe.assembly import Assembly
    from mergeflow.tensors import Checkpoint, TensorInfo

BITS = {1: Dtype.U8, 2: Dtype.I16, 4: Dtype.I32, 8: Dtype.I64}
"""As what values are copied, by their size: whole numbers have no NaN, so nothing is looked at or refused."""


class _Tensor(NamedTuple):
    """One tensor of the result, and where it comes from."""

    component: str
    source: int
    info: TensorInfo


def make_assembly(assembly: Assembly, checkpoints: Sequence[Checkpoint], format: Format) -> Plan:
    """Everything that will happen; `checkpoints` are those of `assembly.paths` whose headers could be read."""
    sources = {checkpoint.path: index for index, checkpoint in enumerate(checkpoints)}
    problems: list[MergeflowError] = [*assembly.problems(), *_lacking(assembly, sources, checkpoints)]
    tensors = _tensors(assembly, sources, checkpoints)
    outputs: list[Output] = []
    strips: list[Strip] = []
    try:
        layout = format.layout(((key, one.info.dtype, one.info.shape) for key, one in tensors.items()), _told(assembly))
        path = f"{assembly.out.rstrip('/')}/{assembly.file}"
        target = _target(assembly, tensors, checkpoints)
        outputs.append(Output(target, path, layout, _written_as(tensors)))
        strips = [_strip(key, one, layout.tensors[key].begin) for key, one in tensors.items() if one.info.elements]
        strips.sort(key=lambda strip: (LAYOUT_ORDER[tensors[strip.key].info.dtype], strip.key))
    except FormatError as error:
        problems.append(error)
    try:
        memory = memory_for(strips, assembly.budget)
        shards = cut(strips, memory)
    except OverBudget as error:
        problems.append(error)
        memory, shards = Memory(assembly.budget.memory, 0, 0, 0), ()
    return Plan(
        checkpoints=tuple(checkpoints),
        outputs=tuple(outputs),
        strips=tuple(strips),
        shards=shards,
        memory=memory,
        budget=assembly.budget,
        nonfinite="propagate",
        problems=tuple(problems),
    )


def _lacking(
    assembly: Assembly, sources: Mapping[str, int], checkpoints: Sequence[Checkpoint]
) -> Iterator[IncompatibleSources]:
    """Files without the component that is to be taken from them, or without some of what the base has of it."""
    base = checkpoints[sources[assembly.base]].header.tensors if assembly.base in sources else {}
    architecture = assembly.architecture
    for component, path in assembly.parts.items():
        if component not in architecture.components or path not in sources:
            continue
        header = checkpoints[sources[path]].header.tensors
        its = [key for key in header if architecture.component_of(key) == component]
        keys = architecture.components[component].keys
        absent = [key for key, spec in keys.items() if not spec.optional and key in base and key not in header]
        if not its:
            yield IncompatibleSources(f"{component}={path} has no tensor of {component}; name a file that has them")
        elif absent:
            yield IncompatibleSources(
                f"{component}={path} lacks {len(absent):,} tensor(s) of {component} that the base has: "
                f"{some(absent, 2)}; name a file that has the whole of it"
            )


def _tensors(assembly: Assembly, sources: Mapping[str, int], checkpoints: Sequence[Checkpoint]) -> dict[str, _Tensor]:
    """Every tensor of the result by its key: those of the base, unless they belong to what is replaced."""
    found = {}
    for path, source in sources.items():
        for key, info in checkpoints[source].header.tensors.items():
            component = assembly.architecture.component_of(key) or REST
            if assembly.parts.get(component, assembly.base) == path:
                found[key] = _Tensor(component, source, info)
    return found


def _strip(key: str, tensor: _Tensor, begin: int) -> Strip:
    info, dtype = tensor.info, BITS[tensor.info.dtype.itemsize]
    cell = Cell(AGREE, dtype, rows=(0,), shares=(1,), places=(Place(0, begin),))
    return Strip(key, info.elements, (tensor.source,), (dtype,), (info.begin,), (cell,))


def _target(assembly: Assembly, tensors: Mapping[str, _Tensor], checkpoints: Sequence[Checkpoint]) -> Target:
    """The result, as a target whose every component is one file's as it is."""
    from_file = {tensor.component: checkpoints[tensor.source].id for tensor in tensors.values()}
    order = [name for name in (*assembly.architecture.components, REST) if name in from_file]
    parts = [Part(name, (from_file[name],), {from_file[name]: Fraction(1)}, COPY) for name in order]
    return Target("assembled", assembly.file, "keep", tuple(parts), None, None)


def _written_as(tensors: Mapping[str, _Tensor]) -> tuple[tuple[str, str], ...]:
    codes: dict[str, set[str]] = {}
    for tensor in tensors.values():
        codes.setdefault(tensor.component, set()).add(tensor.info.dtype.code)
    return tuple((component, ", ".join(sorted(found))) for component, found in codes.items())


def _told(assembly: Assembly) -> dict[str, str]:
    """The metadata: of which files it was put together. What the base says of itself is no longer true of it."""
    names = {component: path.rpartition("/")[2] for component, path in assembly.parts.items()}
    told = {
        "mergeflow": __version__,
        "architecture": assembly.architecture.name,
        "base": assembly.base.rpartition("/")[2],
        "assembled": names,
    }
    return {"format": "pt", "mergeflow": writable(" " + as_json(told))}  # the space: see `plan.metadata`
