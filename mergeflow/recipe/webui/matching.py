"""From recorded merges to a tree: what is replayed, what is taken as it is, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError, MergeflowError, SelectionError, raise_all
from mergeflow.recipe.tree import MOST_MERGES, Tree
from mergeflow.recipe.webui.files import File, Files, Vaes
from mergeflow.recipe.webui.merges import GIVEN
from mergeflow.text import printable, some

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping

    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.tree import Node
    from mergeflow.recipe.webui.merges import Merge, Model, Recorded

MAX_LISTED = 1000
"""More missing models than this are counted."""


def matched(
    recorded: Recorded,
    models: ModelSet,
    identities: Mapping[str, tuple[str | None, str | None]],
    vaes: Mapping[str, str],
) -> tuple[Tree, list[str]]:
    """The tree of what was recorded over checkpoints of `models`, and notes of what a person should know about it.

    `identities` has the `Identity` of checkpoints by id; `vaes` has ids of models by the name of a VAE's file, or by
    '*' for any. A merge is replayed if all that it was made of is there; otherwise its own file is taken, if that is
    there. Raises all problems together.
    """
    files = Files(models, identities, [recorded.models[number] for number in recorded.order])
    found = _Found(recorded, files, Vaes(models, files, vaes))
    for number in recorded.order:
        found.settle(number)
    problems = list(recorded.problems)
    if not found.has(0):
        problems += _problems(found, models.place or "the model set")
    raise_all(problems)
    return _tree(found), list(dict.fromkeys(_notes(found)))


class _Found:
    """What became of every model; the order in which they are settled is that of `Recorded`."""

    def __init__(self, recorded: Recorded, files: Files, vaes: Vaes) -> None:
        self.models = recorded.models
        self.order = recorded.order
        self.vaes = vaes
        self._files = files
        self.replayed: dict[int, Merge] = {}
        self.files: dict[int, File] = {}
        self.wrong: dict[int, MergeflowError] = {}
        """Why it cannot be told which file it is."""

    def has(self, number: int | None) -> bool:
        """Whether that model is there: as a file, or by replaying how it was made."""
        return number in self.replayed or number in self.files

    def is_one(self, number: int, present: Container[int]) -> bool:
        """Whether a merge is missed as a file of its own, and not for something that it was made of."""
        return number not in present or self._files.numbered(self.models[number])

    def settle(self, number: int) -> None:
        """Find one model, after all that it was made of."""
        model = self.models[number]
        if model.merge is None:
            self._settle_leaf(number, model)
            return
        obstacle = self._obstacle(model.merge)
        if obstacle is None:
            self.replayed[number] = model.merge
        elif number and (file := self._files.itself(model)):
            note = f"{model} is a merge, and {obstacle}: its own file, '{file.id}', is taken as it is"
            self.files[number] = file.noted(note)

    def _settle_leaf(self, number: int, model: Model) -> None:
        try:
            file = self._files.find(model)
        except MergeflowError as error:
            self.wrong[number] = error
            return
        if file and model.tool:
            note = (
                f"{model} was merged by {model.tool}, which is not replayed: its file, '{file.id}', is taken as it is"
            )
            file = file.noted(note)
        if file:
            self.files[number] = file

    def _obstacle(self, merge: Merge) -> str | None:
        """Why a merge cannot be replayed, or None."""
        if merge.problems:
            return str(merge.problems[0]).partition("; ")[0]
        for below in merge.inputs:
            if not self.has(below):
                return f"{self.models[below or 0]}, of which it was made, is missing"
        bake = merge.node.bake
        if bake is not None and isinstance(self.vaes.find(bake), MergeflowError):
            return f"the VAE '{printable(bake)}', which it bakes in, is missing"
        return None


# --- what is missing -----------------------------------------------------------------------------------------------


def _problems(found: _Found, place: str) -> list[MergeflowError]:
    """All that keeps the file from being replayed."""
    problems: list[MergeflowError] = []
    missing: dict[str, str] = {}
    baking: dict[str, list[str]] = {}
    present = _present(found)
    seen: set[int] = set()
    pending = [(0, "")]
    while pending:
        number, input = pending.pop()
        if number in seen or found.has(number):
            continue
        seen.add(number)
        model, merge = found.models[number], found.models[number].merge
        if merge is None and number in found.wrong:
            problems.append(found.wrong[number])
        elif merge is None:
            missing[_missing(model)] = input
        elif number and found.is_one(number, present):
            below = [_missing(found.models[leaf]) for leaf in _leaves(found, number, seen)]
            missing[f"{model}{' or else all of ' if below else ''}{_listed(below)}"] = input
        else:
            itself = f"; the file of {model} itself would do" if number else ""
            problems += [type(error)(f"{error}{itself}") for error in merge.problems]
            if merge.node.bake is not None:
                baking.setdefault(merge.node.bake, []).append(f"'{merge.node.name}'")
            pending += reversed([(at, merge.place(i)) for i, at in enumerate(merge.inputs) if at is not None])
    problems += _without_vae(found, baking)
    if missing:
        example = next(iter(missing.values()))
        problems.append(
            SelectionError(
                f"{place} lacks what '{printable(found.models[0].name)}' was made of: {_listed(list(missing))}; "
                f"add the files, or say what stands for one with {GIVEN}.{example}=ID"
            )
        )
    return problems


def _present(found: _Found) -> set[int]:
    """The models of which there is a part, or a problem that somebody might solve."""
    present: set[int] = set()
    for number in found.order:
        merge = found.models[number].merge
        below = merge is not None and (merge.problems or any(at in present for at in merge.inputs))
        if below or found.has(number) or number in found.wrong:
            present.add(number)
    return present


def _leaves(found: _Found, number: int, seen: set[int]) -> list[int]:
    """The models that a merge of which nothing is there goes back to, but for those that were seen."""
    leaves: list[int] = []
    pending = [number]
    while pending:
        at = pending.pop()
        merge = found.models[at].merge
        if merge is None:
            leaves.append(at)
        for below in reversed(merge.inputs if merge else ()):
            if below is not None and below not in seen:
                seen.add(below)
                pending.append(below)
    return leaves


def _missing(model: Model) -> str:
    return f"{model}, merged by {model.tool}" if model.tool else str(model)


def _listed(items: list[str]) -> str:
    return some(items, MAX_LISTED)


def _without_vae(found: _Found, baking: Mapping[str, list[str]]) -> list[MergeflowError]:
    """The VAEs that nobody knows."""
    problems: list[MergeflowError] = []
    for bake, merges in baking.items():
        error = found.vaes.find(bake)
        if isinstance(error, MergeflowError):
            problems.append(type(error)(f"{error} ({some(merges)} baked it in)"))
    return problems


# --- what comes of it ----------------------------------------------------------------------------------------------


def _used(found: _Found) -> list[int]:
    """The models that take part, the file first, A before B."""
    used: dict[int, None] = {}
    pending = [0]
    while pending:
        number = pending.pop()
        if number not in used:
            used[number] = None
            merge = found.replayed.get(number)
            pending += reversed(_inputs(merge)) if merge else ()
    return list(used)


def _tree(found: _Found) -> Tree:
    """Leaves as they are met first, merges by level and then as they are met first."""
    used = _used(found)
    if len(used) > 2 * MOST_MERGES:
        raise ConfigError(
            f"'{printable(found.models[0].name)}' was made by merging {len(used):,} models, and trees of up to "
            f"{2 * MOST_MERGES:,} are replayed; have some of those below as files of their own"
        )
    leaves: dict[str, int] = {}
    places = {
        number: leaves.setdefault(found.files[number].id, len(leaves)) for number in used if number in found.files
    }
    levels = dict.fromkeys(places, 0)
    merges = set(used) - set(levels)
    for number in found.order:
        if number in merges:
            levels[number] = 1 + max(levels[below] for below in _inputs(found.replayed[number]))
    ranked = sorted((number for number in used if number in merges), key=levels.__getitem__)
    places.update({number: place for place, number in enumerate(ranked, start=len(leaves))})
    nodes = [_node(found, found.replayed[number], places) for number in ranked]
    return Tree(tuple(leaves), tuple(nodes))


def _node(found: _Found, merge: Merge, places: Mapping[int, int]) -> Node:
    bake = merge.node.bake and found.vaes.find(merge.node.bake)
    assert bake is None or isinstance(bake, str)
    return merge.node._replace(inputs=tuple(places[below] for below in _inputs(merge)), bake=bake)


def _inputs(merge: Merge) -> list[int]:
    return [below for below in merge.inputs if below is not None]


def _notes(found: _Found) -> Iterator[str]:
    unknown: dict[str, list[str]] = {}
    used = _used(found)
    for number in used:
        if number in found.files:
            yield from found.files[number].notes
        else:
            merge = found.replayed[number]
            yield from merge.notes
            for field in merge.unknown:
                unknown.setdefault(field, []).append(f"'{merge.node.name}'")
    for field, merges in unknown.items():
        yield f"the field '{field}' is unknown, and empty: {some(merges)}"
    yield from found.vaes.idle()
