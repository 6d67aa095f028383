"""Selections as people write them: `--,--,05,--,11=2`, a list, `all`, `all but 03,10`.

`--` (or more dashes) holds the place of a model that is not selected. `=14` at the end is the count that the
writer had in mind, and is checked.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from mergeflow.errors import SelectionError
from mergeflow.recipe.ids import normal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeflow.recipe.modelset import ModelSet

_PLACEHOLDER = re.compile(r"-{2,}")
_COUNT = re.compile(r"=\s*(\d+)\s*$")
_ALL = re.compile(r"all(?:\s+but\s+(?P<but>.+))?", re.IGNORECASE | re.DOTALL)


def parse_selection(name: str, written: str | Sequence[object], models: ModelSet) -> tuple[str, ...]:
    """The ids that `written` selects, in its order and as the model set spells them.

    `name` is what the list is called in messages. Raises one `SelectionError` that shows the list and says
    everything that is wrong with it: an unknown id, an id twice, a count that differs, no id at all.
    """
    shown = written if isinstance(written, str) else ", ".join(str(item) for item in written)
    items, count = _items(name, written)
    wanted = _ALL.fullmatch(items[0]) if isinstance(written, str) and items else None
    if wanted is None and isinstance(written, str):
        items = [item.strip() for item in items[0].split(",")] if items else []
        wanted = None
    problems: list[str] = []
    if wanted:
        left_out = [item.strip() for item in wanted["but"].split(",")] if wanted["but"] else []
        out = {normal(id) for id in _listed(left_out, models, problems)}
        ids = [id for id in models.paths if normal(id) not in out]
    else:
        ids = _listed(items, models, problems)
    if not ids and not problems:
        problems.append("it selects no model")
    if count is not None and count != len(ids):
        problems.append(f"it says ={count}, but selects {len(ids)}")
    if problems:
        raise SelectionError(f"selection '{name}': {'; '.join(problems)}; the list is: {shown.strip() or '(empty)'}")
    return tuple(ids)


def _items(name: str, written: str | Sequence[object]) -> tuple[list[str], int | None]:
    """A text stays one item until it is known not to be `all but ...`; the count is taken off its end."""
    if isinstance(written, str):
        items = [written.strip()]
    else:
        for item in written:
            if isinstance(item, bool) or not isinstance(item, str | int):
                raise SelectionError(
                    f"selection '{name}' holds {item!r}, which YAML does not read as text or a whole number; "
                    "put the id into quotes"
                )
        items = [str(item).strip() for item in written]
    match = _COUNT.search(items[-1]) if items else None
    if match is None:
        return [item for item in items if item or len(items) > 1], None
    items[-1] = items[-1][: match.start()].strip()
    return items if items[-1] else items[:-1], int(match[1])


def _listed(items: Sequence[str], models: ModelSet, problems: list[str]) -> list[str]:
    """The known ids among `items`; what is wrong with the others goes to `problems`."""
    ids: list[str] = []
    for item in items:
        if _PLACEHOLDER.fullmatch(item):
            continue
        if not item:
            problems.append("there is nothing between two commas (write -- for a model that is left out)")
            continue
        try:
            ids.append(models.find(item))
        except SelectionError as error:
            problems.append(str(error))
    problems += [f"'{id}' is listed {times} times" for id, times in Counter(ids).items() if times > 1]
    return ids
