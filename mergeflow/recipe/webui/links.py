"""What every recorded merge was made of: by its hashes, by inference where one is missing, or as somebody says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mergeflow.errors import ConfigError, MergeflowError
from mergeflow.recipe.ids import nearest
from mergeflow.recipe.webui.lineage import UNLISTED, settled
from mergeflow.recipe.webui.merges import GIVEN, LETTERS, Merge, Model, Recorded, walked
from mergeflow.recipe.webui.naming import comparable, stem, vocabulary
from mergeflow.text import printable, some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeflow.recipe.webui.lineage import Doubt, Lineage, Place, Settled, Text

    Hashes = tuple[str | None, ...] | frozenset[str]
    """Of what a model was merged, None where that was not recorded; or a set, of what another tool mentions."""

_PART_OF_HASH = re.compile(r"[0-9a-f]{8,64}")


def linked(
    models: Sequence[Model],
    references: Sequence[Hashes],
    texts: Mapping[int, Sequence[Text]],
    ordered: bool,
    given: Mapping[str, str],
) -> Recorded:
    """The graph: `models` in the order of the metadata, 0 being the file itself.

    `texts` are the names that merges were given, `ordered` says whether the order means anything, and `given` is
    what an input is, by the name of its merge.
    """
    by_hash = {model.hash: number for number, model in reversed(list(enumerate(models))) if model.hash}
    numbers = [_numbers(hashes, by_hash) for hashes in references]
    found = settled(numbers, texts, {number: model.name for number, model in enumerate(models) if number}, ordered)
    said, problems = _said(given, models, references)
    linker = _Linker(models, found, said)
    for number, hashes in enumerate(references):
        linker.link(number, hashes, numbers[number])
    made, order = walked(linker.models)
    problems += _idle(said, made, set(order))
    return Recorded(made, order, tuple(problems))


def _numbers(hashes: Hashes, by_hash: Mapping[str, int]) -> Lineage:
    if isinstance(hashes, frozenset):
        return frozenset(by_hash[hash] for hash in hashes if hash in by_hash)
    return tuple(None if hash is None else by_hash.get(hash, UNLISTED) for hash in hashes)


class _Linker:
    """Models, and those that the metadata has no entry for."""

    def __init__(self, models: Sequence[Model], found: Settled, said: Mapping[Place, int | Model]) -> None:
        self.models = list(models)
        self._found = found
        self._said = said
        self._added: dict[Model, int] = {}

    def link(self, number: int, hashes: Hashes, numbers: Lineage) -> None:
        """Give one merge its inputs."""
        merge = self.models[number].merge
        if merge is None or isinstance(hashes, frozenset) or isinstance(numbers, frozenset):
            return
        for place, (hash, known) in enumerate(zip(hashes, numbers, strict=True)):
            at = (number, place)
            if at in self._said:
                below: int | None = self._number(self._said[at])
                merge = _noted(merge, f"{merge.place(place)} is {self.models[below or 0]}, as given")
            elif hash is None:
                below = self._found.filled.get(at)
                merge = self._inferred(merge, place, below, self._found.doubts.get(at))
            else:
                below = self._number(Model("", hash)) if known == UNLISTED else known
            merge = merge._replace(inputs=(*merge.inputs, below))
        self.models[number] = self.models[number]._replace(merge=merge)

    def _number(self, model: int | Model) -> int:
        if isinstance(model, int):
            return model
        if model not in self._added:
            self._added[model] = len(self.models)
            self.models.append(model)
        return self._added[model]

    def _inferred(self, merge: Merge, place: int, below: int | None, doubt: Doubt | None) -> Merge:
        """The merge, and how it is known, or why it is not, what was not recorded."""
        if below is not None:
            how = "the order of the entries" if self._found.explained else "its name only"
            return _noted(
                merge, f"{merge.place(place)} was recorded without a hash; by {how} it is {self.models[below]}"
            )
        order, names = self._shown(doubt.order if doubt else ()), self._shown(doubt.names if doubt else ())
        if order and names and doubt and not set(doubt.order) & set(doubt.names):
            why = f"by the order of the entries it is {order}, but by the names it is {names}"
        elif doubt and len(doubt.names) == 1:
            why = f"by the names it is {names}, which the order of the entries does not allow"
        elif names or order:
            why = f"it may be {names or order}"
        else:
            why = "neither the order of the entries nor the names tell which it was"
        error = ConfigError(
            f"{merge.place(place)} was recorded without a hash, and {why}; "
            f"say which with {GIVEN}.{merge.place(place)}=NAME"
        )
        return merge._replace(problems=(*merge.problems, error))

    def _shown(self, numbers: Sequence[int]) -> str:
        return some([str(self.models[number]) for number in numbers[:100]]) if numbers else ""


def _noted(merge: Merge, note: str) -> Merge:
    return merge._replace(notes=(*merge.notes, note))


# --- what is given -------------------------------------------------------------------------------------------------


def _said(
    given: Mapping[str, str], models: Sequence[Model], references: Sequence[Hashes]
) -> tuple[dict[Place, int | Model], list[MergeflowError]]:
    """What is given, by merge and input; and what of it means nothing."""
    said: dict[Place, int | Model] = {}
    problems: list[MergeflowError] = []
    merges = {model.merge.node.name: number for number, model in enumerate(models) if model.merge} if given else {}
    words = vocabulary({number: model.name for number, model in enumerate(models) if number}) if given else {}
    for key, value in given.items():
        name, _, letter = key.rpartition(".")
        hashes = references[merges[name]] if name in merges else ()
        letters = "" if isinstance(hashes, frozenset) else LETTERS[: len(hashes)]
        if name not in merges:
            problems.append(ConfigError(f"{GIVEN}: there is no merge '{name}' for '{key}'{nearest(name, merges)}"))
        elif len(letter) != 1 or letter.lower() not in letters:
            problems.append(
                ConfigError(
                    f"{GIVEN}: '{name}' has no input '{letter}' for '{key}', only {', '.join(letters) or 'none'}"
                )
            )
        else:
            meant = _meant(value, models, words)
            if len(meant) > 1:
                may_be = some([str(models[number]) for number in meant])
                problems.append(ConfigError(f"{GIVEN}: '{key}' is '{value}', which may be {may_be}; give its hash"))
            else:
                said[merges[name], letters.index(letter.lower())] = meant[0] if meant else _unlisted(value)
    return said, problems


def _meant(value: str, models: Sequence[Model], words: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The models that a hash, the beginning of one, or a name may mean."""
    value = comparable(value)
    if _PART_OF_HASH.fullmatch(value):
        begins = [number for number, model in enumerate(models) if model.hash and model.hash.startswith(value)]
        if begins:
            return begins
    return words.get(value) or words.get(comparable(stem(value))) or ()


def _unlisted(value: str) -> Model:
    """What no entry is: a file that is known by its hash, or else a model of the model set."""
    return Model("", value.lower()) if re.fullmatch("[0-9a-fA-F]{64}", value) else Model("", given=value)


def _idle(said: Mapping[Place, object], models: Sequence[Model], reached: set[int]) -> list[MergeflowError]:
    """What is given for merges that the file does not lead to."""
    return [
        ConfigError(
            f"{GIVEN}: '{merge.place(place)}' has no effect, because '{merge.node.name}' is no part of "
            f"'{printable(models[0].name)}'; leave it out"
        )
        for number, place in said
        if number not in reached and (merge := models[number].merge)
    ]
