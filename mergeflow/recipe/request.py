"""From what was typed to what is meant: a `Request` in raw words, a `Recipe` in which every name is resolved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mergeflow.errors import ConfigError, MergeflowError, SelectionError, raise_all
from mergeflow.recipe.ids import nearest
from mergeflow.recipe.modelset import ModelSet, model_set
from mergeflow.recipe.selection import parse_selection
from mergeflow.tensors import OUTPUT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from fractions import Fraction

    from mergeflow.recipe.architecture import Architecture

Missing = Literal["error", "skip", "base"]
Surplus = Literal["ignore", "error"]
Integers = Literal["error", "first"]
Nonfinite = Literal["error", "skip", "propagate"]


@dataclass(frozen=True)
class ModelSource:
    """Where the checkpoints of a model set come from."""

    dir: str = ""
    """A directory whose files are searched, not its subdirectories; empty for none."""
    pattern: str = "{id}.safetensors"
    files: Mapping[str, str] = field(default_factory=dict)
    """Further checkpoints by id."""
    composites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """What to call it in messages."""
        return self.dir or "models.files"


@dataclass(frozen=True)
class PartRequest:
    """What one component of a target is made of: a named selection, or one model as it is."""

    selection: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class TargetRequest:
    """One wanted output, in the words of its config."""

    name: str
    file: str
    dtype: str | None = None
    """One of `OUTPUT_DTYPES`; the run's default where None."""
    selection: str | None = None
    """The list for every component that `components` does not name."""
    components: Mapping[str, PartRequest] = field(default_factory=dict)
    keys_from: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class Policies:
    """What happens where sources disagree. Strict by default, lenient by choice, always reported."""

    missing: Missing = "error"
    surplus: Surplus = "ignore"
    integers: Integers = "error"
    nonfinite: Nonfinite = "error"


@dataclass(frozen=True)
class Budget:
    """Where the work is done: how many workers, how many reads each keeps under way, how many bytes in all."""

    workers: int
    reads_in_flight: int
    memory: int
    """Bytes that the blocks of all workers may use together."""


@dataclass(frozen=True)
class Request:
    """Everything that was asked for."""

    models: ModelSource
    architecture: Architecture
    selections: Mapping[str, str | Sequence[object]]
    targets: tuple[TargetRequest, ...]
    method: str
    dtype: str
    policies: Policies
    budget: Budget
    out: str
    """The directory of the outputs; absolute."""
    overwrite: bool = False


@dataclass(frozen=True)
class Part:
    """One component of a target, resolved."""

    component: str
    entries: tuple[str, ...]
    """What was listed, composites unopened."""
    shares: Mapping[str, Fraction]
    """The exact share of every checkpoint; they sum to one."""
    method: str
    """`copy` for one model as it is."""


@dataclass(frozen=True)
class Target:
    """One wanted output, resolved."""

    name: str
    file: str
    dtype: str
    parts: tuple[Part, ...]
    keys_from: str | None
    base: str | None

    def checkpoints(self) -> tuple[str, ...]:
        """Every checkpoint whose header it needs, in the order in which they are first named."""
        named = [id for part in self.parts for id in part.shares]
        named += [id for id in (self.keys_from, self.base) if id is not None]
        return tuple(dict.fromkeys(named))


@dataclass(frozen=True)
class Recipe:
    """What will be made of what, with every id known to exist."""

    models: ModelSet
    architecture: Architecture
    targets: tuple[Target, ...]
    policies: Policies
    budget: Budget

    def checkpoints(self) -> tuple[str, ...]:
        """Every checkpoint that any target needs, in the order in which they are first named."""
        return tuple(dict.fromkeys(id for target in self.targets for id in target.checkpoints()))


def resolve(request: Request, names: Iterable[str]) -> Recipe:
    """The recipe, given the paths of all files in `request.models.dir`; raises all problems together."""
    source = request.models
    models = model_set(names, source.pattern, source.composites, source.files, source.place)
    problems: list[MergeflowError] = []
    if not request.targets:
        problems.append(ConfigError("no target is asked for; name one, as in target=single or target=[x17,x11c]"))
    problems += _same_file(request.targets)
    targets = []
    for wanted in request.targets:
        try:
            targets.append(_target(wanted, request, models))
        except MergeflowError as error:
            problems.append(error)
    raise_all(_once(problems))
    return Recipe(models, request.architecture, tuple(targets), request.policies, request.budget)


def _target(wanted: TargetRequest, request: Request, models: ModelSet) -> Target:
    where = f"target '{wanted.name}'"
    problems = list(_contradictions(wanted, where, request))
    parts = []
    for component in request.architecture.components:
        asked = wanted.components.get(component)
        if asked is None and wanted.selection is None:
            continue  # the output does without it
        try:
            parts.append(_part(component, asked or PartRequest(wanted.selection), where, request, models))
        except MergeflowError as error:
            problems.append(error)
    single: dict[str, str | None] = {}
    for role, id in (("keys_from", wanted.keys_from), ("base", wanted.base)):
        try:
            single[role] = None if id is None else _checkpoint(id, models)
        except MergeflowError as error:
            problems.append(ConfigError(f"{where}, {role}: {error}"))
    if not parts and not problems:
        problems.append(
            ConfigError(f"{where} has no components; give it selection=NAME or components.NAME.selection=NAME")
        )
    raise_all(problems)
    dtype = wanted.dtype or request.dtype
    return Target(wanted.name, wanted.file, dtype, tuple(parts), single["keys_from"], single["base"])


def _contradictions(wanted: TargetRequest, where: str, request: Request) -> Iterator[MergeflowError]:
    """What is wrong with a target, whatever models there are."""
    components, missing = request.architecture.components, request.policies.missing
    for name in wanted.components:
        if name not in components:
            yield ConfigError(
                f"{where} names the component '{name}', which arch '{request.architecture.name}' does not have"
                f"{nearest(name, components)} (it has {', '.join(components)})"
            )
    dtype = wanted.dtype or request.dtype
    if dtype not in OUTPUT_DTYPES:
        yield ConfigError(f"{where} has dtype '{dtype}'; choose one of {', '.join(OUTPUT_DTYPES)}")
    if "/" in wanted.file or not wanted.file.endswith(".safetensors"):
        yield ConfigError(f"{where} has file '{wanted.file}'; give a name ending in .safetensors, and out=DIR")
    if missing == "base" and wanted.base is None:
        yield ConfigError(f"keys.missing=base needs target.{wanted.name}.base=ID, the model to take them from")
    if missing != "base" and wanted.base is not None:
        yield ConfigError(f"{where} has a base, which only keys.missing=base uses; leave one or add the other")


def _part(component: str, asked: PartRequest, where: str, request: Request, models: ModelSet) -> Part:
    where = f"{where}, {component}"
    if (asked.selection is None) == (asked.model is None):
        raise ConfigError(f"{where}: give either selection=NAME or model=ID")
    if asked.model is not None:
        try:
            shares = models.shares([asked.model])
        except MergeflowError as error:
            raise ConfigError(f"{where}: {error}") from error
        return Part(component, (models.find(asked.model),), shares, "copy" if len(shares) == 1 else request.method)
    lists, name = request.selections, str(asked.selection)
    if name not in lists:
        raise ConfigError(
            f"{where}: there is no selection '{name}'{nearest(name, lists)} (there is {', '.join(lists) or 'none'}); "
            f"choose another group with selection=, or add +selection.{name}=..."
        )
    entries = parse_selection(name, lists[name], models)
    try:
        shares = models.shares(entries)
    except MergeflowError as error:
        raise SelectionError(f"selection '{name}': {error}") from error
    return Part(component, entries, shares, request.method)


def _checkpoint(id: str, models: ModelSet) -> str:
    """The id of one checkpoint; raises `UsageError` for a composite too."""
    found = models.find(id)
    if found in models.composites:
        raise ConfigError(f"'{found}' is a composite of {', '.join(models.composites[found])}; name one model")
    return found


def _same_file(targets: Sequence[TargetRequest]) -> list[MergeflowError]:
    by_file: dict[str, list[str]] = {}
    for target in targets:
        by_file.setdefault(target.file, []).append(target.name)
    return [
        ConfigError(f"targets {' and '.join(names)} would both write {file}; give each its own file")
        for file, names in by_file.items()
        if len(names) > 1
    ]


def _once(problems: Iterable[MergeflowError]) -> list[MergeflowError]:
    """Targets share lists; what is wrong with a list is said once."""
    flat = [error for problem in problems for error in getattr(problem, "errors", (problem,))]
    return list({str(error): error for error in flat}.values())
