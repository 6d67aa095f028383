"""The recipe that an output of mergeflow tells of itself, read back: with it the same file can be made again."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, get_args

from mergeflow import __version__
from mergeflow.errors import ConfigError, IncompatibleSources, SelectionError, raise_all
from mergeflow.recipe.ids import normal
from mergeflow.recipe.reading import (
    Unreadable,
    listed,
    mapping,
    not_ours,
    number,
    one_of,
    policies_of,
    short,
    source_of,
    text_of,
    told_by,
)
from mergeflow.recipe.request import (
    COPY,
    PAIRWISE,
    REST,
    UNIFORM,
    Part,
    Recipe,
    RecordedFile,
    Target,
)
from mergeflow.recipe.tree import INPUTS, MOST_MERGES, Arithmetic, Node, Rules, Scalars, Tree, of_vae_alone
from mergeflow.tensors import OUTPUT_DTYPES
from mergeflow.text import printable, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mergeflow.recipe.architecture import Architecture
    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.request import Request, TargetRequest
    from mergeflow.tensors import Checkpoint

_FRACTION = re.compile(r"-?[0-9]{1,4000}(/[0-9]{1,4000})?")


class Replay:
    """One recorded recipe, and the model set that it is to be made of."""

    def __init__(
        self, metadata: Mapping[str, str], path: str, models: ModelSet, file: RecordedFile | None = None
    ) -> None:
        """Read the recipe in `metadata` of the file at `path`, which was asked for by `file`.

        Raises `ConfigError` if there is none or it is not whole, and `SelectionError` with all models that `models`
        does not have.
        """
        self._path = path
        self._file_asked = file = file or RecordedFile(path, "mergeflow")
        told = told_by(metadata, path, file.option)
        try:
            self._sources = {id: source_of(one) for id, one in mapping(told["sources"]).items()}
            self._local = self._found(models)
            if file.verified:
                models = replace(models, paths={id: models.paths[local] for id, local in self._local.items()})
                self._local = {id: id for id in self._sources}
            self._models = replace(models, composites=self._composites(mapping(told["composites"])))
            self._trees = {name: self._tree(one) for name, one in mapping(told["trees"]).items()}
            self.policies = policies_of(told)
            self.version = text_of(told["mergeflow"])
            self.architecture = text_of(told["architecture"])
            self._file = text_of(told["file"])
            self._dtype = one_of(told["dtype"], tuple(OUTPUT_DTYPES))
            self._keys_from, self._base = (self._single(told["keys"][role]) for role in ("from", "base"))
            self._parts = tuple(self._part(name, one) for name, one in mapping(told["components"]).items())
            if not self._parts:
                raise Unreadable("it has no components")
        except KeyError as error:
            raise ConfigError(not_ours(path, f"it has no {error}", file.option)) from error
        except (Unreadable, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ConfigError(not_ours(path, str(error), file.option)) from error

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
        target = self._target(request.targets[0], check, request.architecture)
        version = self.version if self._file_asked.verified else __version__
        return Recipe(self._models, request.architecture, (target,), self.policies, request.budget, version)

    def names(self) -> dict[str, str]:
        """What the file of each model was called, by the id that it has now."""
        return {self._local[id]: source.name for id, source in self._sources.items()}

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
                f"its {what} is {short(value)}, not {short(vars(source)[what])}"
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
                f"{self._file_asked.option}={self._path}: {len(missing)} of its {len(self._sources)} models are not in "
                f"{models.place or 'the model set'}: {some(missing, 12)}; add them, or set models.dir"
            )
        return found

    def _target(self, wanted: TargetRequest, check: bool, architecture: Architecture) -> Target:
        file = wanted.file or self._file
        if "/" in file or not file.endswith(".safetensors") or not file.isprintable():
            raise ConfigError(f"the output cannot be called '{printable(file)}'; give recipe.name=NAME.safetensors")
        same_as = self._path if check and not self._path.endswith(".json") else None
        parts = [
            part if part.tree is None else replace(part, only_vae=of_vae_alone(architecture, part.component))
            for part in self._parts
        ]
        return Target(wanted.name, file, self._dtype, tuple(parts), self._keys_from, self._base, same_as)

    def _is_rest(self, part: Part) -> bool:
        """Whether it is what belongs to no component, which only the web UI's rules for keys know."""
        return part.component == REST and part.tree is not None and self.policies.keys == "webui"

    def _single(self, id: Any) -> str | None:
        return None if id is None else self._at(id)

    def _part(self, component: str, told: Any) -> Part:
        told = mapping(told)
        entries = tuple(self._entry(id, self._models.composites) for id in listed(told["list"]))
        method = one_of(told["method"], (UNIFORM, PAIRWISE, COPY))
        tree = rules = None
        if method == PAIRWISE:
            tree = self._trees[text_of(told["tree"])]
            rules = Rules(one_of(told["arithmetic"], get_args(Arithmetic)), one_of(told["scalars"], get_args(Scalars)))
        shares = self._shares(mapping(told["shares"]), tree)
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
        written = {self._at(id): text_of(share) for id, share in told.items()}
        odd = [share for share in written.values() if not _FRACTION.fullmatch(share)]
        if odd and tree is not None:
            return tree.weights()
        if odd:
            raise Unreadable(f"{short(odd[0])} is no share")
        return {id: Fraction(share) for id, share in written.items()}

    def _at(self, id: Any) -> str:
        """The id that a recorded model has now."""
        if text_of(id) not in self._local:
            raise Unreadable(f"{short(id)} is not among its sources")
        return self._local[id]

    def _entry(self, id: Any, composites: Iterable[str]) -> str:
        """A model as the set that is replayed from spells it, or a composite."""
        wanted = normal(text_of(id))
        local = {normal(one): now for one, now in self._local.items()}.get(wanted)
        if local is None and wanted not in map(normal, composites):
            raise Unreadable(f"{short(id)} is not among its sources")
        return id if local is None or normal(local) == wanted else local

    def _composites(self, told: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        return {id: tuple(self._entry(member, told) for member in listed(members)) for id, members in told.items()}

    def _tree(self, told: Any) -> Tree:
        told = mapping(told)
        leaves = tuple(self._at(id) for id in listed(told["leaves"]))
        nodes: list[Node] = []
        if len(listed(told["nodes"])) > MOST_MERGES:
            raise Unreadable(f"a tree has {len(told['nodes']):,} merges, and {MOST_MERGES:,} at most are replayed")
        for written in told["nodes"]:
            if len(listed(written)) != len(Node._fields):
                raise Unreadable(f"{short(written)} is no node")
            name, inputs, multiplier, formula, save_half, bake = written
            node = Node(
                text_of(name),
                tuple(number(place) for place in listed(inputs)),
                float(number(multiplier, whole=False)),
                one_of(formula, tuple(INPUTS)),
                one_of(save_half, (True, False)),
                self._single(bake),
            )
            places = range(len(leaves) + len(nodes))
            if len(node.inputs) != INPUTS[node.formula] or any(place not in places for place in node.inputs):
                raise Unreadable(f"node {short(name)} merges {short(inputs)}")
            nodes.append(node)
        if not leaves or len(set(leaves)) != len(leaves):
            raise Unreadable("a tree has no leaves, or one of them twice")
        return Tree(leaves, tuple(nodes))


def changed(differences: Iterable[str]) -> list[IncompatibleSources]:
    """The problems that differing sources are."""
    remedy = "find the file of then, or choose recipe.check=false to merge what is there now"
    return [IncompatibleSources(f"{text}; {remedy}") for text in differences]
