"""Selections as people write them: `--,--,05,--,11=2`, a list, `all`, `all but 03,10=-2`, `{05: true, 11: false}`.

`--` (or more dashes) holds the place of a model that is not selected. `=14` at the end is the count that the
writer had in mind, and is checked. A negative one says that the list is of those that are left out, with or without
`all but` before it: `03,10=-2`. In a mapping each model is selected or not by a switch of its own, which a sweep can
turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from mergeflow.errors import MergeflowError, SelectionError
from mergeflow.text import short, shown, some

if TYPE_CHECKING:
    from mergeflow.recipe.modelset import ModelSet

Written: TypeAlias = str | Sequence[object] | Mapping[str, object]
"""A selection before it is read."""

LONGEST_LIST = 5000
"""Characters of a list that a message shows; 257 models take a thousand."""
LARGEST = 10**18
"""Of an id that YAML reads as a number."""
FEW = 2
"""Unknown ids; more of them are a list made for other models, and no slips of the hand."""

_PLACEHOLDER = re.compile(r"-{2,}")
_COUNT = re.compile(r"(?P<rest>.*)=\s*(?P<count>-?[0-9]{1,9})", re.DOTALL)
_ALL_BUT = re.compile(r"all\s+but\b", re.IGNORECASE)


def parse_selection(name: str, written: Written, models: ModelSet) -> tuple[str, ...]:
    """The ids that `written` selects, in its order and as the model set spells them.

    `name` is what the list is called in messages. Raises one `SelectionError` that shows the list and says
    everything that is wrong with it: an unknown id, an id twice, a count that differs, no id at all.
    """
    reading = _Reading(models)
    if isinstance(written, str):
        told = written.strip()
        ids, count = reading.from_text(told)
    elif isinstance(written, Mapping):
        told = ", ".join(f"{id}: {(on if isinstance(on, str) else short(on)).lower()}" for id, on in written.items())
        ids, count = reading.from_switches(written), None
    else:
        told = ", ".join(item if isinstance(item, str) else short(item) for item in written)
        ids, count = reading.from_list(written)
    problems = reading.problems
    if reading.excepted is not None and _negative(count):
        if count != -reading.excepted:
            problems.append(f"it says ={count}, but leaves out {reading.excepted}")
    elif count is not None and count != len(ids):
        problems.append(f"it says ={count}, but selects {len(ids)}")
    elif not ids and not problems:
        problems.append("it selects no model")
    if problems:
        raise SelectionError(
            f"selection '{name}': {'; '.join(problems)}; the list is: {shown(told, LONGEST_LIST) or '(empty)'}"
        )
    return tuple(ids)


def _negative(count: int | None) -> bool:
    """Whether a count is that of models left out."""
    return count is not None and count < 0


class _Reading:
    """One list while it is being read, and what is wrong with it."""

    def __init__(self, models: ModelSet) -> None:
        self.models = models
        self.problems: list[str] = []
        self.excepted: int | None = None
        """How many entries are listed, if they are those that are left out."""

    def from_text(self, written: str) -> tuple[list[str], int | None]:
        """The ids in a text, and the count that it ends with."""
        but = _ALL_BUT.match(written)
        items = written[but.end() if but else 0 :].split(",")
        items[-1], count = self._counted(items[-1])
        if not but and [item.strip().lower() for item in items] == ["all"]:
            return list(self.models.paths), count
        if but or _negative(count):
            return self._all_but(items), count
        return self._ids([] if items == [""] else items), count

    def from_list(self, written: Sequence[object]) -> tuple[list[str], int | None]:
        """The ids in a list, whose last item may end with a count, or be one."""
        items = []
        for item in written:
            if isinstance(item, bool) or not isinstance(item, str | int) or (isinstance(item, int) and item > LARGEST):
                self.problems.append(
                    f"YAML reads {short(item)} as neither text nor a whole number; put the id into quotes"
                )
            else:
                items.append(str(item))
        if not items:
            return [], None
        items[-1], count = self._counted(items[-1])
        if count is not None and not items[-1]:
            items.pop()
        return self._all_but(items) if _negative(count) else self._ids(items), count

    def from_switches(self, written: Mapping[str, object]) -> list[str]:
        """The ids that are `true`; those that are not must exist as well."""
        for id, on in written.items():
            if not isinstance(on, bool):
                self.problems.append(f"'{shown(id)}' is {short(on)}; write true or false")
        self._ids(list(written))
        return [self.models.find(item) for item, on in written.items() if on is True and item in self.models]

    def _counted(self, item: str) -> tuple[str, int | None]:
        """What stands before `=14`, and the 14, unless all of it is an id."""
        counted = _COUNT.fullmatch(item.strip())
        if counted is None or item in self.models:
            return item, None
        return counted["rest"].strip(), int(counted["count"])

    def _all_but(self, items: Sequence[str]) -> list[str]:
        """All checkpoints, without those that are listed; a composite stands for its members."""
        left_out: set[str] = set()
        listed = self._ids(items)
        self.excepted = len(listed)
        for id in listed:
            try:
                left_out.update(self.models.members(id))
            except MergeflowError as error:
                self.problems.append(str(error))
        return [id for id in self.models.paths if id not in left_out]

    def _ids(self, items: Sequence[str]) -> list[str]:
        """The known ids among `items`; what is wrong with the others is a problem."""
        ids, unknown = [], []
        for item in map(str.strip, items):
            if _PLACEHOLDER.fullmatch(item):
                continue
            if item in self.models:
                ids.append(self.models.find(item))
            elif not item:
                self.problems.append("a place is empty (write -- for a model that is left out)")
            elif "," in item:
                self.problems.append(f"'{shown(item)}' is one item of a list; write its ids as items of their own")
            else:
                unknown.append(item)
        self.problems += self._none_of(unknown)
        self.problems += [f"'{id}' is listed {times} times" for id, times in Counter(ids).items() if times > 1]
        return ids

    def _none_of(self, unknown: Sequence[str]) -> list[str]:
        """That there are no such ids: each with what may have been meant, unless these are many."""
        if len(unknown) <= FEW:
            return [self.models.unknown(id) for id in unknown]
        known = list(self.models.paths)
        place = self.models.place or "the model set"
        return [f"{some(list(unknown))} are not in {place}, which has {len(known)} models: {some(known)}"]
