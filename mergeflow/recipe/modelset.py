"""The model set: which checkpoint an id stands for, and which ids are composites.

Files are found by the id in their name. The order in which a directory, an operating system or a locale lists
them has no meaning anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError, MergeflowError, SelectionError, raise_all
from mergeflow.recipe.ids import natural, nearest, normal
from mergeflow.text import shown, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

ID_PLACE = "{id}"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
PICKLED = "; .ckpt, .pt and .bin files can run code when they are loaded, so convert them to safetensors first"
DEEPEST = 100
"""Composites within each other; nobody's collection has ten."""


@dataclass(frozen=True)
class ModelSet:
    """Ids in an explicit order, each a checkpoint or a composite."""

    paths: Mapping[str, str]
    """The file of every checkpoint, by its id as the file name spells it; in natural order of the ids."""
    composites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The members of every composite, by its id."""
    place: str = ""
    """Where the set came from, for messages."""

    def __contains__(self, id: str) -> bool:
        """Whether there is such a checkpoint or composite, however the id is spelled."""
        return normal(id) in self._spelling

    def find(self, id: str) -> str:
        """The id as the set spells it; raises `SelectionError` naming the nearest one."""
        if id not in self:
            raise SelectionError(self.unknown(id))
        return self._spelling[normal(id)]

    def unknown(self, id: str) -> str:
        """That there is no such id, and which one is nearest."""
        return f"'{shown(id)}' is not in {self.place or 'the model set'}{nearest(id, self._spelling.values())}"

    def shares(self, entries: Iterable[str]) -> dict[str, Fraction]:
        """The exact share of every checkpoint when all `entries` have equal shares.

        A composite is one entry whose share is divided equally among its members. A checkpoint that is
        reached in two ways has the sum. The order is that in which checkpoints are first reached.
        """
        return self._together([self.find(entry) for entry in entries], ())

    def members(self, id: str) -> tuple[str, ...]:
        """The checkpoints that `id` stands for: itself, or what its composite leads to."""
        return tuple(self.shares([id]))

    @cached_property
    def _spelling(self) -> Mapping[str, str]:
        return {normal(id): id for id in (*self.paths, *self.composites)}

    @cached_property
    def _divided(self) -> dict[str, dict[str, Fraction]]:
        """What composites lead to, as far as anybody has asked: twenty that name two others each lead to a million."""
        return {}

    def _together(self, listed: Sequence[str], above: tuple[str, ...]) -> dict[str, Fraction]:
        total: dict[str, Fraction] = {}
        for id in listed:
            for leaf, share in self._divide(id, above).items():
                total[leaf] = total.get(leaf, Fraction(0)) + share / len(listed)
        return total

    def _divide(self, id: str, above: tuple[str, ...]) -> dict[str, Fraction]:
        if id in above:
            raise ConfigError(f"composite '{shown(id)}' contains itself: {' > '.join(map(shown, (*above, id)))}")
        if id not in self.composites:
            return {id: Fraction(1)}
        if id not in self._divided:
            if len(above) >= DEEPEST:
                raise ConfigError(f"composite '{shown(id)}' lies within {DEEPEST} others; name its members instead")
            members = self.composites[id]
            for member in members:
                if member not in self:
                    raise SelectionError(
                        f"composite '{shown(id)}' has the member '{shown(member)}', which is not in "
                        f"{self.place or 'the model set'}"
                    )
            self._divided[id] = self._together([self.find(member) for member in members], (*above, id))
        return self._divided[id]


def model_set(
    names: Iterable[str],
    pattern: str,
    composites: Mapping[str, Iterable[str]],
    files: Mapping[str, str],
    place: str,
) -> ModelSet:
    """The set made of the paths in `names` whose file name matches `pattern`, of `files`, and of `composites`.

    In `pattern`, `{id}` stands for the id and `*` for anything: `_x{id}-*.safetensors`. All problems are
    raised together: an id with two files, a composite that is a file too, or has no members, or one twice.
    """
    matcher = _matcher(pattern)
    listed = sorted(names)
    found: list[tuple[str, str]] = []
    for path in listed:
        match = matcher.fullmatch(path.rpartition("/")[2])
        if match:
            found.append((match["id"], path))
    found.extend(files.items())
    found.sort(key=lambda item: (natural(normal(item[0])), item))
    problems: list[MergeflowError] = []
    if not found:
        what = f"none of its {len(listed):,} files matches '{pattern}'" if listed else "it holds no files"
        example = f" ('{shown(listed[0].rpartition('/')[2])}' is one of them)" if listed else ""
        pickled = PICKLED if any(name.endswith(PICKLES) for name in listed) else ""
        problems.append(
            ConfigError(f"no models in {place}: {what}{example}{pickled}; set models.dir or models.pattern")
        )
    problems += _twice(found, composites)
    made = ModelSet(dict(found), {id: tuple(members) for id, members in composites.items()}, place)
    problems += _composite_problems(made)
    raise_all(problems)
    return made


def _matcher(pattern: str) -> re.Pattern[str]:
    if pattern.count(ID_PLACE) != 1:
        raise ConfigError(
            f"models.pattern '{pattern}' must contain {ID_PLACE} once, as in '_x{ID_PLACE}-*.safetensors'"
        )
    text = re.escape(pattern).replace(re.escape(ID_PLACE), "(?P<id>.+?)").replace(r"\*", ".*")
    return re.compile(text, re.DOTALL)


def _twice(found: Iterable[tuple[str, str]], composites: Iterable[str]) -> Iterator[MergeflowError]:
    """Ids that stand for more than one thing. `05` and `5` are one id."""
    by_id: dict[str, list[str]] = {}
    for id, path in found:
        by_id.setdefault(normal(id), []).append(path)
    for id, paths in by_id.items():
        if len(paths) > 1:
            yield ConfigError(f"id '{shown(id)}' has {len(paths)} files: {some(paths)}; rename or remove all but one")
    first: dict[str, str] = {}
    for composite in composites:
        if normal(composite) in by_id:
            yield ConfigError(f"'{shown(composite)}' is both a file and a composite; rename the composite")
        other = first.setdefault(normal(composite), composite)
        if other != composite:
            yield ConfigError(f"composites '{shown(other)}' and '{shown(composite)}' have the same id; rename one")


def _composite_problems(models: ModelSet) -> Iterator[MergeflowError]:
    """A composite may name models that this collection lacks: that matters only to who selects it."""
    for id, members in models.composites.items():
        if not members:
            yield ConfigError(f"composite '{shown(id)}' has no members")
        if len({normal(member) for member in members}) != len(members):
            yield ConfigError(f"composite '{shown(id)}' names a member twice: {some(list(members), 12)}")
