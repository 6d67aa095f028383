"""A recorded tree as a config writes it: every merge by its name, and of what it was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from mergeflow.errors import ConfigError, MergeflowError, raise_all
from mergeflow.recipe.ids import nearest
from mergeflow.recipe.tree import INPUTS, Formula, Node, Tree
from mergeflow.text import short, shown, some

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeflow.recipe.modelset import ModelSet

FIELDS = ("a", "b", "c", "multiplier", "formula", "save_half", "bake")
FEW = 4
"""Unknown names that are told one by one."""


class Merge(NamedTuple):
    """One recorded merge: what went into it by name, of other merges or of models."""

    inputs: tuple[str, ...]
    multiplier: float = 0.5
    formula: Formula = "weighted_sum"
    save_half: bool = True
    bake: str | None = None
    """The model whose VAE was baked in."""


def read_merges(nodes: Mapping[str, object], vae: str | None) -> dict[str, Merge]:
    """The merges that a config tells: `[A, B]`, `[A, B, M]` or a mapping with some of `FIELDS`, by name.

    `vae` is baked in at every node that does not say otherwise. Raises all that is wrong together.
    """
    merges: dict[str, Merge] = {}
    problems: list[MergeflowError] = []
    for name, written in nodes.items():
        try:
            merges[name] = _merge(f"recipe.nodes.{shown(name)}", written, vae)
        except ConfigError as error:
            problems.append(error)
    raise_all(problems)
    return merges


def _merge(where: str, written: object, vae: str | None) -> Merge:
    told: Mapping[str, object]
    if isinstance(written, Mapping):
        told = written
    elif isinstance(written, Sequence) and not isinstance(written, str) and len(written) in (2, 3):
        told = dict(zip(("a", "b", "multiplier"), written, strict=False))
    else:
        raise ConfigError(f"{where} is neither [A, B], [A, B, M] nor a mapping of {', '.join(FIELDS)}")
    if unknown := [str(key) for key in told if key not in FIELDS]:
        raise ConfigError(f"{where} has {some(unknown)}; a merge has {', '.join(FIELDS)}")
    formula = told.get("formula", "weighted_sum")
    if not isinstance(formula, str) or formula not in INPUTS:
        raise ConfigError(f"{where} has the formula {short(formula)}; choose {', '.join(INPUTS)}")
    letters = ("a", "b", "c")[: INPUTS[formula]]
    if any(letter not in told for letter in letters) or any(
        letter in told for letter in "abc" if letter not in letters
    ):
        raise ConfigError(
            f"{where}: {formula} takes {', '.join(letters)}, and this has {some(list(told), 8) or 'nothing'}"
        )
    save_half, bake = told.get("save_half", True), told.get("bake", vae)
    if not isinstance(save_half, bool):
        raise ConfigError(f"{where} has save_half {short(save_half)}; write true or false")
    return Merge(
        tuple(_name(where, letter, told[letter]) for letter in letters),
        _multiplier(where, told.get("multiplier", 0.5)),
        cast("Formula", formula),
        save_half,
        None if bake is None else _name(where, "bake", bake),
    )


def _name(where: str, field: str, written: object) -> str:
    if isinstance(written, bool) or not isinstance(written, str | int):
        raise ConfigError(f"{where} has {short(written)} as {field}, where a model or another merge is named")
    return str(written)


def _multiplier(where: str, written: object) -> float:
    try:
        if not isinstance(written, bool) and isinstance(written, int | float) and math.isfinite(written):
            return float(written)
    except OverflowError:
        pass
    raise ConfigError(f"{where} has the multiplier {short(written, 24)}, which is no number to multiply by")


def recorded_tree(merges: Mapping[str, Merge], models: ModelSet) -> Tree:
    """The tree of `merges` over the checkpoints of `models`; raises all that is wrong together.

    The result is the one merge that no other takes.
    """
    problems: list[MergeflowError] = []
    named: dict[str, str] = {}
    for name, merge in merges.items():
        for wanted in (*merge.inputs, *([merge.bake] if merge.bake else [])):
            if wanted not in merges or wanted == merge.bake:
                named.setdefault(wanted, name)
    leaves: dict[str, str] = {}
    for wanted, name in named.items():
        if wanted in models:
            try:
                leaves[wanted] = _checkpoint(wanted, models)
            except MergeflowError as error:
                problems.append(ConfigError(f"recipe.nodes.{shown(name)}: {error}"))
    problems += _unknown({wanted: name for wanted, name in named.items() if wanted not in models}, merges, models)
    taken = {wanted for merge in merges.values() for wanted in merge.inputs}
    tops = [name for name in merges if name not in taken]
    levels = _levels(merges)
    if not merges:
        problems.append(ConfigError("recipe.nodes is empty; give the merges of the tree"))
    elif circle := _circle(merges, levels):
        problems.append(ConfigError(f"recipe.nodes goes round in a circle: {some(circle)}; a merge is made of others"))
    elif len(tops) > 1:
        problems.append(ConfigError(f"recipe.nodes has {len(tops)} results, {some(tops)}; a tree has one"))
    raise_all(problems)
    return _tree(merges, leaves, sorted(merges, key=levels.__getitem__))


def _tree(merges: Mapping[str, Merge], leaves: Mapping[str, str], order: Sequence[str]) -> Tree:
    """The tree whose nodes come in `order`, and whose leaves in that in which A before B leads to them."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    waiting = [order[-1]]
    while waiting:
        name = waiting.pop()
        if name not in merges:
            found[leaves[name]] = None
        elif name not in seen:
            seen.add(name)
            waiting += reversed(merges[name].inputs)
    places = {id: place for place, id in enumerate(found)}
    at = {name: places[leaves[name]] for name in leaves if leaves[name] in places and name not in merges}
    at |= {name: len(places) + rank for rank, name in enumerate(order)}
    nodes = [
        Node(name, tuple(at[one] for one in merge.inputs), merge.multiplier, merge.formula, merge.save_half, baked)
        for name, merge in ((name, merges[name]) for name in order)
        for baked in [leaves[merge.bake] if merge.bake else None]
    ]
    return Tree(tuple(found), tuple(nodes))


def _levels(merges: Mapping[str, Merge]) -> dict[str, int]:
    """The level of every merge but those that stand on a circle."""
    levels: dict[str, int] = {}
    waiting = dict(merges)
    while waiting:
        ready = [name for name, merge in waiting.items() if not any(one in waiting for one in merge.inputs)]
        if not ready:
            break
        for name in ready:
            levels[name] = 1 + max(levels.get(one, 0) for one in waiting.pop(name).inputs)
    return levels


def _circle(merges: Mapping[str, Merge], levels: Mapping[str, int]) -> list[str]:
    """Those of the merges without a level that others of them are made of: the rest only stand on them."""
    left, before = [name for name in merges if name not in levels], len(merges) + 1
    while len(left) < before:
        taken = {one for name in left for one in merges[name].inputs}
        left, before = [name for name in left if name in taken], len(left)
    return left


def _unknown(named: Mapping[str, str], merges: Mapping[str, Merge], models: ModelSet) -> Iterator[ConfigError]:
    """Names that nothing has, each with the first merge that uses it: a few are typing errors, many another folder."""
    if len(named) > FEW:
        yield ConfigError(
            f"recipe.nodes names {len(named)} models that are not in {models.place}: {some(list(named), 12)}; "
            "add them, or set models.dir"
        )
        return
    known = (*merges, *models.paths, *models.composites)
    for id, name in named.items():
        if id in merges:
            yield ConfigError(
                f"recipe.nodes.{shown(name)}: '{shown(id)}' is a merge, and only the VAE of a model is baked in"
            )
        else:
            what = f"is neither a merge of the recipe nor in {models.place}"
            yield ConfigError(f"recipe.nodes.{shown(name)}: '{shown(id)}' {what}{nearest(id, known)}")


def _checkpoint(id: str, models: ModelSet) -> str:
    found = models.find(id)
    if found in models.composites:
        raise ConfigError(
            f"'{shown(found)}' is a composite of {some(list(models.composites[found]), 12)}; name one model"
        )
    return found
