"""The recipe that an output of mergeflow tells of itself, read back: with it the same file can be made again."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, get_args

from mergeflow.errors import ConfigError, IncompatibleSources, SelectionError, raise_all
from mergeflow.recipe.ids import normal
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
    Recipe,
    RecordedFile,
    Surplus,
    Target,
)
from mergeflow.recipe.tree import INPUTS, Arithmetic, Node, Rules, Scalars, Tree
from mergeflow.recipe.webui.naming import printable
from mergeflow.tensors import OUTPUT_DTYPES, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.request import Request, TargetRequest
    from mergeflow.tensors import Checkpoint

KEY = "mergeflow"
"""Where in the metadata of a file its recipe stands."""
_FRACTION = re.compile(r"-?[0-9]{1,4000}(/[0-9]{1,4000})?")


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
            self._models = replace(models, composites=self._composites(_mapping(told["composites"])))
            self._trees = {name: self._tree(one) for name, one in _mapping(told["trees"]).items()}
            self.policies = _policies(told)
            self.architecture = _text(told["architecture"])
            self._file = _text(told["file"])
            self._dtype = _one_of(told["dtype"], tuple(OUTPUT_DTYPES))
            self._keys_from, self._base = (self._single(told["keys"][role]) for role in ("from", "base"))
            self._parts = tuple(self._part(name, one) for name, one in _mapping(told["components"]).items())
            if not self._parts:
                raise Unreadable("it has no components")
        except KeyError as error:
            raise ConfigError(_not_ours(path, f"it has no {error}")) from error
        except (Unreadable, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ConfigError(_not_ours(path, str(error))) from error

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
                    f"{self._path} was made with arch={printable(self.architecture)}, not "
                    f"{request.architecture.name}; give arch={printable(self.architecture)}"
                )
            )
        known = request.architecture.components
        strange = [printable(p.component) for p in self._parts if p.component not in known and not self._is_rest(p)]
        if strange and not problems:
            problems.append(
                ConfigError(
                    f"{self._path} has {some(strange)}, which arch '{request.architecture.name}' does not have; choose "
                    "the arch= that it was made with"
                )
            )
        if [target.recorded for target in request.targets] != [True]:
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
            if one.identity.sha256 is not None and source.sha256 is not None:
                now["sha256"] = one.identity.sha256
            odd = [
                f"its {what} is {_short(value)}, not {_short(vars(source)[what])}"
                for what, value in now.items()
                if value != vars(source)[what]
            ]
            if odd:
                name = printable(source.name)
                told.append(f"model {one.id} ({name}) is not the file that {self._path} was made of: {odd[0]}")
        return told

    def _found(self, models: ModelSet) -> dict[str, str]:
        """The id that each recorded model has now: by the name of its file, or by its id.

        Files of one name may lie in several directories; then both have to be the same.
        """
        by_name: dict[str, list[str]] = {}
        for id, path in models.paths.items():
            by_name.setdefault(path.rpartition("/")[2], []).append(id)
        named = {id: by_name.get(source.name, []) for id, source in self._sources.items()}
        own = {id: models.find(id) for id in self._sources if id in models}
        found: dict[str, str] = {}
        for candidates in (
            {id: local for id, local in own.items() if local in named[id]},
            {id: locals[0] for id, locals in named.items() if len(locals) == 1},
            {id: local for id, local in own.items() if local in models.paths},
        ):
            for id, local in candidates.items():
                if id not in found and local not in found.values():
                    found[id] = local
        missing = [f"{printable(id)} ({printable(one.name)})" for id, one in self._sources.items() if id not in found]
        if missing:
            raise SelectionError(
                f"recipe.file={self._path}: {len(missing)} of its {len(self._sources)} models are not in "
                f"{models.place or 'the model set'}: {some(missing, 12)}; add them, or set models.dir"
            )
        return found

    def _target(self, wanted: TargetRequest, check: bool) -> Target:
        file = wanted.file or self._file
        if "/" in file or not file.endswith(".safetensors") or not file.isprintable():
            raise ConfigError(f"the output cannot be called '{printable(file)}'; give recipe.name=NAME.safetensors")
        same_as = self._path if check and not self._path.endswith(".json") else None
        return Target(wanted.name, file, self._dtype, self._parts, self._keys_from, self._base, same_as)

    def _is_rest(self, part: Part) -> bool:
        """Whether it is what belongs to no component, which only the web UI's rules for keys know."""
        return part.component == REST and part.tree is not None and self.policies.keys == "webui"

    def _single(self, id: Any) -> str | None:
        return None if id is None else self._at(id)

    def _part(self, component: str, told: Any) -> Part:
        told = _mapping(told)
        entries = tuple(self._entry(id, self._models.composites) for id in _list(told["list"]))
        method = _one_of(told["method"], (UNIFORM, PAIRWISE, COPY))
        tree = rules = None
        if method == PAIRWISE:
            tree = self._trees[_text(told["tree"])]
            rules = Rules(
                _one_of(told["arithmetic"], get_args(Arithmetic)), _one_of(told["scalars"], get_args(Scalars))
            )
        shares = self._shares(_mapping(told["shares"]), tree)
        reached = {id for entry in entries for id in self._models.members(entry)}
        if reached != shares.keys() or (tree is not None and reached != set(tree.leaves)):
            raise Unreadable(f"the list of {component} is not of the models that it has shares for")
        if sum(shares.values()) != 1:
            raise Unreadable(f"the shares of {component} do not add up to 1")
        if tree is None and (min(shares.values()) <= 0 or (method == COPY and len(shares) > 1)):
            raise Unreadable(f"the shares of {component} cannot be those of {method}")
        return Part(component, entries, shares, method, tree, rules)

    def _shares(self, told: Mapping[str, Any], tree: Tree | None) -> dict[str, Fraction]:
        """The exact shares; those of a tree may have been too long to be written out."""
        written = {self._at(id): _text(share) for id, share in told.items()}
        odd = [share for share in written.values() if not _FRACTION.fullmatch(share)]
        if odd and tree is not None:
            return tree.weights()
        if odd:
            raise Unreadable(f"{_short(odd[0])} is no share")
        return {id: Fraction(share) for id, share in written.items()}

    def _at(self, id: Any) -> str:
        """The id that a recorded model has now."""
        if _text(id) not in self._local:
            raise Unreadable(f"{_short(id)} is not among its sources")
        return self._local[id]

    def _entry(self, id: Any, composites: Iterable[str]) -> str:
        """A model as the set that is replayed from spells it, or a composite."""
        wanted = normal(_text(id))
        local = {normal(one): now for one, now in self._local.items()}.get(wanted)
        if local is None and wanted not in map(normal, composites):
            raise Unreadable(f"{_short(id)} is not among its sources")
        return id if local is None or normal(local) == wanted else local

    def _composites(self, told: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        return {id: tuple(self._entry(member, told) for member in _list(members)) for id, members in told.items()}

    def _tree(self, told: Any) -> Tree:
        told = _mapping(told)
        leaves = tuple(self._at(id) for id in _list(told["leaves"]))
        nodes: list[Node] = []
        for written in _list(told["nodes"]):
            if len(_list(written)) != len(Node._fields):
                raise Unreadable(f"{_short(written)} is no node")
            name, inputs, multiplier, formula, save_half, bake = written
            node = Node(
                _text(name),
                tuple(_number(place) for place in _list(inputs)),
                float(_number(multiplier, whole=False)),
                _one_of(formula, tuple(INPUTS)),
                _one_of(save_half, (True, False)),
                self._single(bake),
            )
            places = range(len(leaves) + len(nodes))
            if len(node.inputs) != INPUTS[node.formula] or any(place not in places for place in node.inputs):
                raise Unreadable(f"node {_short(name)} merges {_short(inputs)}")
            nodes.append(node)
        if not leaves or len(set(leaves)) != len(leaves):
            raise Unreadable("a tree has no leaves, or one of them twice")
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
        raise ConfigError(_not_ours(path, str(error))) from error


def _not_ours(path: str, reason: str) -> str:
    return f"recipe.file={path}: its recipe is not as mergeflow writes it ({reason})"


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
    hash = None if sha256 is None else _text(sha256)
    return Source(_text(told["name"]), _number(told["size"]), _text(told["header"]), hash)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable(f"{_short(value)} is no table")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Unreadable(f"{_short(value)} is no list")
    return value


def _number(value: Any, *, whole: bool = True) -> Any:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise Unreadable(f"{_short(value)} is no number that belongs here")
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
    return printable(f"{value:,}" if type(value) is int else str(value), 24)
