"""The recipe that an output of mergeflow tells of itself, read back: with it the same file can be made again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, get_args

from mergeflow.errors import ConfigError, IncompatibleSources, SelectionError, raise_all
from mergeflow.recipe.request import (
    COPY,
    PAIRWISE,
    REST,
    UNIFORM,
    Integers,
    Keys,
    Missing,
    Nonfinite,
    Part,
    Policies,
    PositionIds,
    RecordedFile,
    Recipe,
    Surplus,
    Target,
)
from mergeflow.recipe.tree import INPUTS, Arithmetic, Node, Rules, Scalars, Tree
from mergeflow.tensors import OUTPUT_DTYPES, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.request import Request, TargetRequest
    from mergeflow.tensors import Checkpoint

KEY = "mergeflow"
"""Where in the metadata of a file its recipe stands."""


@dataclass(frozen=True)
class Source:
    """What a recipe says of the file of one checkpoint."""

    name: str
    size: int
    header: str
    sha256: str | None


class Unreadable(Exception):
    """The text is not what mergeflow writes."""


class Replay:
    """One recorded recipe, and the model set that it is to be made of."""

    def __init__(self, metadata: Mapping[str, str], path: str, models: ModelSet) -> None:
        """Read the recipe in `metadata` of the file at `path`.

        Raises `ConfigError` if there is none or it is not whole, and `SelectionError` with all models that `models`
        does not have.
        """
        self._path = path
        told = _told(metadata, path)
        try:
            self._sources = {id: _source(one) for id, one in _mapping(told["sources"]).items()}
            self._local = self._found(models)
            self._models = replace(models, composites=self._composites(told))
            self._trees = {name: self._tree(one) for name, one in _mapping(told["trees"]).items()}
            self.policies = _policies(told)
            self.architecture = _text(told["architecture"])
            self.version = _text(told["mergeflow"])
            self._told = told
            self._parts = tuple(self._part(name, one) for name, one in _mapping(told["components"]).items())
        except (Unreadable, KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
            raise ConfigError(f"recipe.file={path}: its recipe is not as mergeflow writes it ({error})") from error

    @property
    def hashed(self) -> bool:
        """Whether the recipe knows its sources by the hash of their whole files."""
        return any(source.sha256 is not None for source in self._sources.values())

    def recipe(self, request: Request) -> Recipe:
        """The recorded recipe for the only target of `request`, which names no file if it is to be called as then."""
        problems = []
        if self.architecture != request.architecture.name:
            problems.append(
                ConfigError(
                    f"{self._path} was made with arch={self.architecture}, not {request.architecture.name}; "
                    f"give arch={self.architecture}"
                )
            )
        strange = [p.component for p in self._parts if p.component not in (*request.architecture.components, REST)]
        if strange and not problems:
            problems.append(ConfigError(f"arch '{request.architecture.name}' does not have {some(strange)}"))
        if len(request.targets) != 1:
            problems.append(ConfigError("recipe=file makes one output; give target=recorded and no other"))
        raise_all(problems)
        check = isinstance(request.recorded, RecordedFile) and request.recorded.check
        target = self._target(request.targets[0], check)
        return Recipe(self._models, request.architecture, (target,), self.policies, request.budget)

    def differences(self, checkpoints: Iterable[Checkpoint]) -> list[str]:
        """Sources that are not what they were, as far as their headers and hashes tell."""
        recorded = {self._local[id]: source for id, source in self._sources.items()}
        told = []
        for one in checkpoints:
            source = recorded[one.id]
            now = {"size": one.stat.size, "header": one.header.digest}
            if one.sha256 is not None and source.sha256 is not None:
                now["sha256"] = one.sha256
            odd = [
                f"its {what} is {_short(value)}, not {_short(vars(source)[what])}"
                for what, value in now.items()
                if value != vars(source)[what]
            ]
            if odd:
                told.append(f"model {one.id} ({source.name}) is not the file that {self._path} was made of: {odd[-1]}")
        return told

    def _found(self, models: ModelSet) -> dict[str, str]:
        """The id that each recorded model has now: by the name of its file, or by its id."""
        by_name = {path.rpartition("/")[2]: id for id, path in models.paths.items()}
        found, missing = {}, []
        for id, source in self._sources.items():
            if source.name in by_name:
                found[id] = by_name[source.name]
            elif id in models and models.find(id) in models.paths:
                found[id] = models.find(id)
            else:
                missing.append(f"{id} ({source.name})")
        if missing:
            raise SelectionError(
                f"recipe.file={self._path}: {len(missing)} of its {len(self._sources)} models are not in "
                f"{models.place or 'the model set'}: {some(missing, 12)}; add them, or set models.dir"
            )
        return found

    def _target(self, wanted: TargetRequest, check: bool) -> Target:
        told, keys = self._told, _mapping(self._told["keys"])
        single = {role: None if keys[role] is None else self._local[_text(keys[role])] for role in ("from", "base")}
        file = wanted.file or _text(told["file"])
        if "/" in file or not file.endswith(".safetensors"):
            raise ConfigError(f"recipe.file={self._path} names the output '{file}'; give target.recorded.file=NAME")
        dtype = _one_of(told["dtype"], tuple(OUTPUT_DTYPES))
        same_as = self._path if check and not self._path.endswith(".json") else None
        return Target(wanted.name, file, dtype, self._parts, single["from"], single["base"], same_as)

    def _part(self, component: str, told: Any) -> Part:
        told = _mapping(told)
        shares = {self._local[id]: Fraction(_text(share)) for id, share in _mapping(told["shares"]).items()}
        if sum(shares.values()) != 1:
            raise Unreadable(f"the shares of {component} add up to {sum(shares.values())}")
        entries = tuple(self._entry(id) for id in told["list"])
        method = _one_of(told["method"], (UNIFORM, PAIRWISE, COPY))
        if method != PAIRWISE:
            return Part(component, entries, shares, method)
        rules = Rules(_one_of(told["arithmetic"], get_args(Arithmetic)), _one_of(told["scalars"], get_args(Scalars)))
        return Part(component, entries, shares, method, self._trees[_text(told["tree"])], rules)

    def _entry(self, id: Any) -> str:
        """A model or composite as the set that is replayed from spells it."""
        return self._local.get(_text(id), _text(id))

    def _composites(self, told: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        return {
            id: tuple(self._entry(member) for member in members) for id, members in _mapping(told["composites"]).items()
        }

    def _tree(self, told: Any) -> Tree:
        told = _mapping(told)
        leaves = tuple(self._local[_text(id)] for id in told["leaves"])
        nodes: list[Node] = []
        for name, inputs, multiplier, formula, save_half, bake in told["nodes"]:
            node = Node(
                _text(name),
                tuple(inputs),
                float(multiplier),
                _one_of(formula, tuple(INPUTS)),
                bool(save_half),
                None if bake is None else self._local[_text(bake)],
            )
            places = range(len(leaves) + len(nodes))
            if len(node.inputs) != INPUTS[node.formula] or any(place not in places for place in node.inputs):
                raise Unreadable(f"node {node.name} merges {list(node.inputs)}")
            if not math.isfinite(node.multiplier):
                raise Unreadable(f"node {node.name} has the multiplier {node.multiplier}")
            nodes.append(node)
        if not leaves:
            raise Unreadable("a tree has no leaves")
        return Tree(leaves, tuple(nodes))


def changed(differences: Iterable[str]) -> list[IncompatibleSources]:
    """The problems that differing sources are."""
    remedy = "find the file of then, or choose recipe.check=false to merge what is there now"
    return [IncompatibleSources(f"{text}; {remedy}") for text in differences]


def _told(metadata: Mapping[str, str], path: str) -> Mapping[str, Any]:
    text = metadata.get(KEY)
    if text is None:
        other = " (it has one of a web UI: use recipe=webui)" if "sd_merge_recipe" in metadata else ""
        raise ConfigError(f"recipe.file={path} has no recipe of mergeflow in its metadata{other}")
    try:
        return _mapping(json.loads(text))
    except (Unreadable, ValueError, RecursionError) as error:
        raise ConfigError(f"recipe.file={path}: its recipe is not as mergeflow writes it ({error})") from error


def _policies(told: Mapping[str, Any]) -> Policies:
    keys, ids = _mapping(told["keys"]), told["position_ids"]
    return Policies(
        missing=_one_of(keys["missing"], get_args(Missing)),
        surplus=_one_of(keys["surplus"], get_args(Surplus)),
        integers=_one_of(keys["integers"], get_args(Integers)),
        nonfinite=_one_of(told["nonfinite"], get_args(Nonfinite)),
        keys=_one_of(keys["rule"], get_args(Keys)),
        position_ids=None if ids is None else _one_of(ids, get_args(PositionIds)),
    )


def _source(told: Any) -> Source:
    told = _mapping(told)
    sha256 = told.get("sha256")
    return Source(_text(told["name"]), int(told["size"]), _text(told["header"]), sha256 and _text(sha256))


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable(f"{_short(value)} is no table")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"{_short(value)} is no text")
    return value


def _one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise Unreadable(f"{_short(value)} is none of {', '.join(map(str, choices))}")
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."
