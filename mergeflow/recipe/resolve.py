"""From what was typed to what is meant: every list parsed, every id found, every contradiction told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError, MergeflowError, SelectionError, raise_all
from mergeflow.recipe.ids import nearest
from mergeflow.recipe.modelset import ModelSet, model_set
from mergeflow.recipe.request import COPY, PAIRWISE, REST, Part, PartRequest, Recipe, Target
from mergeflow.recipe.selection import parse_selection
from mergeflow.recipe.series import expanded, with_base_file, written_list
from mergeflow.recipe.shapes import TreeOptions, grow, multiplier_problems
from mergeflow.recipe.tree import VAE, of_vae_alone
from mergeflow.tensors import OUTPUT_DTYPES
from mergeflow.text import some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from fractions import Fraction

    from mergeflow.recipe.request import Request, TargetRequest
    from mergeflow.recipe.tree import Tree

TOLD_BY_A_TREE = ("shape", "save_half", "bake")
"""Options of trees that a recorded one has of its own; multipliers are looked for in all trees that are made."""


def resolve(request: Request, names: Iterable[str], recorded: Callable[[ModelSet], Tree] | None = None) -> Recipe:
    """The recipe, given the paths of all files in `request.models.dir`; raises all problems together.

    `recorded` finds the leaves of a recorded tree in the model set; it is needed where a target is `recorded`.
    """
    source = request.models
    models = model_set(names, source.pattern, source.composites, source.files, source.place)
    problems: list[MergeflowError] = []
    try:
        models = with_base_file(models, request.series)
        request = expanded(request, models)
    except MergeflowError as error:
        problems.append(error)  # the targets are looked at as they are, to tell what is wrong with them too
    if not request.targets:
        problems.append(ConfigError("no target is asked for; name one, as in target=single or target=[x17,x11c]"))
    problems += _same_file(request.targets)
    problems += _tree_contradictions(request, recorded is not None)
    resolver = _Resolver(request, models)
    targets = []
    try:
        if recorded is not None:
            resolver.tree = recorded(models)
        if request.method == PAIRWISE and request.tree.vae is not None:
            resolver.options = replace(request.tree, vae=_named("method.vae", request.tree.vae, models))
    except MergeflowError as error:
        raise_all(_once([*problems, error]))
    for wanted in request.targets:
        try:
            targets.append(resolver.target(wanted))
        except MergeflowError as error:
            problems.append(error)
    if not problems:
        problems += resolver.unused()
    raise_all(_once(problems))
    return Recipe(models, request.architecture, tuple(targets), request.policies, request.budget)


class _Resolver:
    """Targets in words to targets over one model set."""

    def __init__(self, request: Request, models: ModelSet) -> None:
        self._request = request
        self._models = models
        self.tree: Tree | None = None
        """The recorded one."""
        self.options = request.tree
        self._grown: dict[tuple[str, tuple[str, ...]], Tree] = {}
        self._bakes = False
        """Whether a tree makes anything that a VAE could replace."""

    def target(self, wanted: TargetRequest) -> Target:
        """The target, with every id known to exist; raises all its problems together."""
        where = f"target '{wanted.name}'"
        problems = list(_contradictions(wanted, where, self._request))
        parts = []
        for component in self._components(wanted):
            asked = wanted.components.get(component)
            if asked is None and wanted.selection is None and not wanted.recorded:
                continue  # the output does without it
            try:
                parts.append(self._part(component, asked, wanted, where))
            except MergeflowError as error:
                problems.append(error)
        single: dict[str, str | None] = {}
        for role, id in (("keys_from", wanted.keys_from), ("base", wanted.base)):
            try:
                single[role] = None if id is None else _named(f"{where}, {role}", id, self._models)
            except MergeflowError as error:
                problems.append(error)
        if not parts and not problems:
            problems.append(
                ConfigError(f"{where} has no components; give it selection=NAME or components.NAME.selection=NAME")
            )
        raise_all(problems)
        dtype = wanted.dtype or self._request.dtype
        return Target(
            wanted.name, wanted.file, dtype, tuple(parts), single["keys_from"], single["base"], member=wanted.member
        )

    def unused(self) -> Iterator[MergeflowError]:
        """Options of trees that no tree has taken."""
        yield from multiplier_problems(self.options.multipliers, self._grown.values())
        if self.options.bake != "none" and not self._bakes:
            yield ConfigError(f"method.bake={self.options.bake} has no effect: no tree of any target makes a VAE")
        if isinstance(self.options.shape, Mapping):
            names = {name for name, _ in self._grown}
            for name in self.options.shape:
                if name not in names:
                    yield ConfigError(f"method.shape names '{name}', which is not a selection that a tree is made of")

    def _components(self, wanted: TargetRequest) -> list[str]:
        """The components that may be parts of an output, and what belongs to none where the web UI would keep it."""
        components = self._request.architecture.components
        whole = wanted.recorded or wanted.selection is not None
        open_one = any(component.open for component in components.values())
        rest = self._request.policies.keys == "webui" and whole and not open_one
        return [*components, *([REST] if rest else [])]

    def _part(self, component: str, asked: PartRequest | None, wanted: TargetRequest, where: str) -> Part:
        if asked is None and wanted.recorded:
            return self._recorded(component, where)
        where = f"{where}, {component}"
        asked = asked or PartRequest(wanted.selection)
        if (asked.selection is None) == (asked.model is None):
            raise ConfigError(f"{where}: give either selection=NAME or model=ID")
        if asked.model is None:
            return self._selected(component, str(asked.selection), where)
        try:
            shares = self._models.shares([asked.model])
        except MergeflowError as error:
            raise ConfigError(f"{where}: {error}") from error
        id = self._models.find(asked.model)
        if len(shares) == 1:
            return Part(component, (id,), shares, COPY)
        return self._merged(component, id, (id,), shares)

    def _selected(self, component: str, name: str, where: str) -> Part:
        entries = parse_selection(name, written_list(where, name, self._request.selections), self._models)
        try:
            shares = self._models.shares(entries)
        except MergeflowError as error:
            raise SelectionError(f"selection '{name}': {error}") from error
        return self._merged(component, name, entries, shares)

    def _merged(self, component: str, name: str, entries: tuple[str, ...], shares: Mapping[str, Fraction]) -> Part:
        if self._request.method != PAIRWISE:
            return Part(component, entries, shares, self._request.method)
        if (name, entries) not in self._grown:
            self._grown[name, entries] = grow(name, entries, self._models, self.options)
        tree = self._grown[name, entries]
        self._bakes = self._bakes or self._has_vae(component)
        weights = tree.weights() if self.options.multipliers else shares
        return self._grown_part(component, entries, weights, tree)

    def _recorded(self, component: str, target: str) -> Part:
        """The recorded tree, or the mean with the weights that it amounts to."""
        tree = self.tree
        if tree is None:
            raise ConfigError(
                f"{target} is made of a recorded tree, and there is none; give recipe=x39a, webui or file"
            )
        if self._request.method == PAIRWISE:
            return self._grown_part(component, tree.leaves, tree.weights(), tree)
        weights = tree.weights(baked=self._has_vae(component))
        if negative := [id for id, weight in weights.items() if weight < 0]:
            raise ConfigError(
                f"the recorded tree takes {some(negative)} away, which a mean cannot; use method=pairwise"
            )
        shares = {id: weight for id, weight in weights.items() if weight}
        return Part(component, tuple(shares), shares, self._request.method if len(shares) > 1 else COPY)

    def _grown_part(self, component: str, entries: tuple[str, ...], shares: Mapping[str, Fraction], tree: Tree) -> Part:
        only_vae = of_vae_alone(self._request.architecture, component)
        return Part(component, entries, shares, PAIRWISE, tree, self._request.rules, only_vae)

    def _has_vae(self, component: str) -> bool:
        """Whether a VAE may be in a part: also in what no component has."""
        found = self._request.architecture.components.get(component)
        return found is None or found.open or any(key.startswith(VAE) for key in found.keys)


def _tree_contradictions(request: Request, recorded: bool) -> Iterator[MergeflowError]:
    """Options about trees that cannot be honoured together."""
    pairwise, policies, tree = request.method == PAIRWISE, request.policies, request.tree
    targets = [target.name for target in request.targets if target.recorded]
    if recorded and not targets:
        yield ConfigError("recipe= has no effect: no target is made of the recorded tree; use target=recorded")
    if targets and len(targets) == len(request.targets):
        for name, usual in vars(TreeOptions()).items():
            if name in TOLD_BY_A_TREE and vars(tree)[name] != usual:
                yield ConfigError(f"method.{name} has no effect on a recorded tree, which tells it; leave it out")
    if policies.nonfinite == "skip" and pairwise:
        yield ConfigError("nonfinite=skip has no meaning for a tree; use error or propagate, or method=uniform")
    if policies.keys == "webui" and not pairwise:
        chosen = ", which recipe= has chosen," if recorded else ""
        yield ConfigError(
            f"keys=webui{chosen} are the rules of a tree, and method={request.method} makes none; add keys=strict, or "
            "use method=pairwise"
        )
    if policies.keys == "webui" and policies.missing != "error":
        yield ConfigError(
            f"keys.missing={policies.missing} has no effect with keys=webui: A decides which keys there are"
        )
    if policies.position_ids == "webui" and not (pairwise and request.rules.arithmetic == "webui"):
        yield ConfigError("position_ids=webui needs method=pairwise and method.arithmetic=webui")
    if request.rules.scalars == "half" and request.rules.arithmetic != "webui":
        yield ConfigError(f"method.scalars=half has no effect with method.arithmetic={request.rules.arithmetic}")
    if pairwise and tree.bake != "none" and tree.vae is None:
        yield ConfigError(f"method.bake={tree.bake} needs method.vae=ID, the model whose VAE is baked in")
    if pairwise and tree.bake == "none" and tree.vae is not None:
        yield ConfigError(f"method.vae={tree.vae} has no effect without method.bake=every or method.bake=top")


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
    unnamed = wanted.recorded and not wanted.file  # then there is no recipe either, which is told
    if not unnamed and ("/" in wanted.file or not wanted.file.endswith(".safetensors")):
        yield ConfigError(f"{where} has file '{wanted.file}'; give a name ending in .safetensors, and out=DIR")
    if missing == "base" and wanted.base is None:
        yield ConfigError(f"keys.missing=base needs target.{wanted.name}.base=ID, the model to take them from")
    if request.policies.keys == "webui" and wanted.keys_from is not None:
        yield ConfigError(f"{where} has keys_from, but with keys=webui A decides which keys there are; leave one")
    if missing != "base" and wanted.base is not None:
        yield ConfigError(f"{where} has a base, which only keys.missing=base uses; leave one or add the other")


def _named(where: str, id: str, models: ModelSet) -> str:
    """The id of one checkpoint; raises `ConfigError` that says `where` it is named."""
    try:
        return _checkpoint(id, models)
    except MergeflowError as error:
        raise ConfigError(f"{where}: {error}") from error


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
