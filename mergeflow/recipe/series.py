"""A series: one target in many variations, each of which differs from it by one model.

It is told in terms of targets and lists, so that each output is what it would be if somebody had typed it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError, MergeflowError, raise_all
from mergeflow.recipe.ids import nearest
from mergeflow.recipe.request import PAIRWISE, Member, PartRequest, TargetRequest
from mergeflow.recipe.selection import parse_selection
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.request import Request, SeriesRequest
    from mergeflow.recipe.selection import Written

SUFFIX = ".safetensors"
ALL = "all"
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
"""What some file system does not take in a name."""


def expanded(request: Request, models: ModelSet) -> Request:
    """`request` with its series told as targets and lists; raises all that is wrong with the series together."""
    return request if request.series is None else _Expansion(request, request.series, models).run()


def with_base_file(models: ModelSet, series: SeriesRequest | None) -> ModelSet:
    """`models` and the file that is the base of `series`, unless it is one of them; raises `ConfigError`."""
    path = None if series is None else series.base
    if path is None or not path.endswith(SUFFIX) or path in models or path in models.paths.values():
        return models
    id = _stem(_name(path))
    if id in models:
        raise ConfigError(f"series.base: {path} would have the id of another model, '{id}'; rename one of the files")
    return replace(models, paths={**models.paths, id: path})


def written_list(where: str, name: str, lists: Mapping[str, Written]) -> Written:
    """The selection called `name`, as it is written; raises `ConfigError` that says `where` it is named."""
    if name in lists:
        return lists[name]
    raise ConfigError(
        f"{where}: there is no selection '{name}'{nearest(name, lists)} (there is {', '.join(lists) or 'none'})"
        f"; choose another group with selection=, or add +selection.{name}=..."
    )


class _Expansion:
    """One series while it becomes targets."""

    def __init__(self, request: Request, series: SeriesRequest, models: ModelSet) -> None:
        self._request = request
        self._series = series
        self._models = models
        self._lists: dict[str, tuple[str, ...]] = {}
        """What lists without a model, or with one more, are called."""

    def run(self) -> Request:
        problems: list[MergeflowError] = list(_contradictions(self._request, self._series))
        base: TargetRequest | None = None
        tried: tuple[str, ...] | None = None
        try:
            base = self._base()
        except MergeflowError as error:
            problems.append(error)
        try:
            tried = self._tried()
        except MergeflowError as error:
            problems.append(error)
        raise_all(problems)
        assert base is not None, "there is one, or a problem"
        made = [self._member(base, id) for id in self._varied(base, tried)]
        raise_all(self._collisions(made))
        return replace(
            self._request,
            targets=tuple(self._placed(base, made)),
            selections={**self._request.selections, **self._lists},
        )

    def _base(self) -> TargetRequest:
        """The target that varies; raises `ConfigError` if there is none, or it lacks what should vary."""
        series, targets = self._series, {target.name: target for target in self._request.targets}
        if series.base is not None:
            return self._one_model(series.base)
        if series.target is None and len(targets) != 1:
            raise ConfigError(f"the run has {len(targets)} targets; say which one varies: series.target=NAME")
        if series.target is not None and series.target not in targets:
            raise ConfigError(
                f"series.target: there is no target '{series.target}'{nearest(series.target, targets)} "
                f"(there is {', '.join(targets) or 'none'})"
            )
        base = targets[series.target] if series.target is not None else next(iter(targets.values()))
        where = f"target '{base.name}'"
        if base.recorded:
            raise ConfigError(f"{where} is made of a recorded tree, which has no series; vary another target")
        raise_all(
            ConfigError(f"{where} is made without {name}, so nothing of it can vary; leave it out of series.components")
            for name in series.components
            if name in self._request.architecture.components and _part(base, name) is None
        )
        return base

    def _one_model(self, id: str) -> TargetRequest:
        """Everything from one checkpoint, as it is."""
        try:
            id = self._id_of_base(id)
        except MergeflowError as error:
            raise ConfigError(f"series.base: {error}") from error
        if id in self._models.composites:
            raise ConfigError(f"series.base: '{id}' is a composite; name one model, or use series.target")
        parts = {name: PartRequest(model=id) for name in self._request.architecture.components}
        return TargetRequest(id, _stem(_name(self._models.paths[id])) + SUFFIX, components=parts)

    def _id_of_base(self, base: str) -> str:
        """The id of `series.base`, which may be written as the path of its file; raises `SelectionError`."""
        by_path = {path: id for id, path in self._models.paths.items()}
        return by_path[base] if base in by_path else self._models.find(base)

    def _tried(self) -> tuple[str, ...] | None:
        """What `series.selection` lists, if it is given; `all` needs no list."""
        name = self._series.selection
        if name is None:
            return None
        if name == ALL and name not in self._request.selections:
            return tuple(id for id, path in self._models.paths.items() if self._series.base not in (id, path))
        return parse_selection(name, written_list("series.selection", name, self._request.selections), self._models)

    def _varied(self, base: TargetRequest, tried: tuple[str, ...] | None) -> list[str]:
        """The models by which the outputs differ from `base`, each in turn; raises `UsageError` if there are none."""
        series, lists = self._series, self._entries(base)
        every = list(dict.fromkeys(id for entries in lists.values() for id in entries))
        if series.kind == "swap":
            found = every if tried is None else list(tried)
            remedy = f"target '{base.name}' has no list of them; say which models are tried: series.selection=NAME"
        elif series.kind == "leave_one_out":
            found = every if tried is None else [id for id in every if id in tried]
            remedy = f"series.selection={series.selection} has none of the models that are in the list"
        else:
            pool = tuple(self._models.paths) if tried is None else tried
            found = [id for id in pool if any(self._is_new(id, entries) for entries in lists.values())]
            remedy = "every model is in the list already"
        if not found:
            raise ConfigError(f"series={series.kind} of {', '.join(series.components)} has nothing to vary: {remedy}")
        return found

    def _entries(self, base: TargetRequest) -> dict[str, tuple[str, ...]]:
        """The list of every component that varies; raises `UsageError` where a list is needed and there is none."""
        problems: list[MergeflowError] = []
        lists = {}
        for component in self._series.components:
            part = _part(base, component)
            where = f"target '{base.name}', {component}"
            if part is not None and part.selection is not None:
                written = written_list(where, part.selection, self._request.selections)
                lists[component] = parse_selection(part.selection, written, self._models)
            elif self._series.kind != "swap":
                problems.append(ConfigError(f"{where} is one model, and series={self._series.kind} varies a list"))
        if self._series.kind == "leave_one_out":
            problems += [
                ConfigError(f"target '{base.name}', {component} is of one model alone, and nothing is left without it")
                for component, entries in lists.items()
                if len(entries) == 1
            ]
        raise_all(problems)
        return lists

    def _is_new(self, id: str, entries: Sequence[str]) -> bool:
        """Whether a list has nothing of model `id` yet; what a composite is made of is in it."""
        return id not in entries and id not in self._models.shares(entries)

    def _member(self, base: TargetRequest, id: str) -> TargetRequest:
        """The output that differs by model `id`."""
        series = self._series
        changed = {component: self._changed(_part(base, component), id) for component in series.components}
        label = "-".join((series.kind, *series.components))
        which = " and ".join(series.components)
        change = {
            "swap": f"{which} of {id}",
            "leave_one_out": f"{which} without {id}",
            "add_one": f"{which} with {id}",
        }[series.kind]
        files = tuple(_name(self._models.paths[one]) for one in self._models.members(id))
        whole = series.write == "file"
        return replace(
            base,
            name=f"{base.name}-{label}-{id}",
            file=f"{_stem(base.file)}-{label}-{_UNSAFE.sub('_', id)}{SUFFIX}",
            selection=base.selection if whole else None,
            components={**base.components, **changed} if whole else changed,
            member=Member(series.kind, series.components, series.write, id, files, change),
        )

    def _changed(self, part: PartRequest | None, id: str) -> PartRequest:
        """One component of such an output."""
        if self._series.kind == "swap":
            return PartRequest(model=id)
        assert part is not None, "what varies has a list"
        assert part.selection is not None, "what varies has a list"
        entries = parse_selection(part.selection, self._request.selections[part.selection], self._models)
        if self._series.kind == "leave_one_out" and id in entries:
            return self._listed(f"{part.selection}-without-{id}", [one for one in entries if one != id])
        if self._series.kind == "add_one" and self._is_new(id, entries):
            return self._listed(f"{part.selection}-with-{id}", [*entries, id])
        return part  # it is another component's list that this model makes a difference to

    def _listed(self, name: str, entries: Sequence[str]) -> PartRequest:
        if name in self._request.selections:
            raise ConfigError(f"selection '{name}' has the name that a list of the series needs; give it another")
        self._lists[name] = tuple(entries)
        return PartRequest(selection=name)

    def _collisions(self, made: Iterable[TargetRequest]) -> Iterator[ConfigError]:
        """Models whose outputs would be one file."""
        by_file: dict[str, list[str]] = {}
        for target in made:
            assert target.member is not None, "it was made for the series"
            by_file.setdefault(target.file, []).append(target.member.id)
        for file, ids in by_file.items():
            if len(ids) > 1:
                yield ConfigError(f"models {' and '.join(ids)} would both be tried in {file}; give one another id")

    def _placed(self, base: TargetRequest, made: Sequence[TargetRequest]) -> Iterator[TargetRequest]:
        """All targets of the run, with the series where its base was."""
        series = self._series
        if series.base is not None:
            yield from (*self._request.targets, *made)
            return
        useful = series.kind != "swap" or series.write == "component"
        kept = useful if series.with_base is None else series.with_base
        member = Member(series.kind, series.components, series.write, "", (), "the base")
        for target in self._request.targets:
            if target.name != base.name:
                yield target
                continue
            if kept:
                yield replace(base, member=member)
            yield from made


def _contradictions(request: Request, series: SeriesRequest) -> Iterator[ConfigError]:
    """What is wrong with a series, whatever models there are."""
    components = request.architecture.components
    if not series.components:
        yield ConfigError("series.components is empty; say what varies, as in series.components=[te0]")
    for name in dict.fromkeys(series.components):
        if name not in components:
            yield ConfigError(
                f"series.components names '{name}', which arch '{request.architecture.name}' does not have"
                f"{nearest(name, components)} (it has {', '.join(components)})"
            )
        elif series.components.count(name) > 1:
            yield ConfigError(f"series.components names '{name}' twice; name it once")
    if series.base is not None and series.kind != "swap":
        yield ConfigError(
            f"series.base is one model, and series={series.kind} varies a list; use series.target, or series=swap"
        )
    if series.base is not None and series.target is not None:
        yield ConfigError("series.base and series.target are both the base of the series; leave one")
    if series.base is not None and series.selection is None:
        yield ConfigError("series.base has no lists; say which models are tried: series.selection=NAME")
    if series.base is not None and series.with_base:
        yield ConfigError("series.with_base has no effect with series.base, whose file is there already; leave it")
    if request.method == PAIRWISE and series.kind != "swap":
        options = request.tree
        nodes = [name for name in options.multipliers if not re.fullmatch(r"level\d+", name)]
        if nodes:
            yield ConfigError(
                f"method.multipliers tells nodes of one tree ({some(nodes)}), and every output of series={series.kind} "
                "has another; leave them out, or tell levels"
            )
        if not isinstance(options.shape, str):
            yield ConfigError(
                f"method.shape tells the nodes of one tree, and every output of series={series.kind} has another; "
                "choose method.shape=balanced or chain"
            )


def _part(base: TargetRequest, component: str) -> PartRequest | None:
    """What `base` has as that component, if anything."""
    usual = None if base.selection is None else PartRequest(base.selection)
    return base.components.get(component, usual)


def _stem(file: str) -> str:
    return file.removesuffix(SUFFIX)


def _name(path: str) -> str:
    return path.rpartition("/")[2]
